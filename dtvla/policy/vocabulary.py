"""Every token id that the policy uses, and the small tokenizer of models that start from nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dtvla.errors import UserError
from dtvla.policy.action_bins import ActionBins, DecodeMode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"
IMAGE, THINK_START, THINK_END, ACTION_START, ACTION_END = TAGS = (
    "<image>",
    "<think>",
    "</think>",
    "<action>",
    "</action>",
)
# Vocabulary field -> key of the published config.json.
CONFIG_KEYS = {
    "pad_id": "pad_token_id",
    "eos_id": "eos_token_id",
    "bos_id": "bos_token_id",
    "image_id": "image_token_index",
    "think_start_id": "think_start_token_index",
    "think_end_id": "think_end_token_index",
    "action_start_id": "action_start_token_index",
    "action_end_id": "action_end_token_index",
}


@dataclass(frozen=True)
class Vocabulary:
    """All ids, taken from the tokenizer or from a checkpoint's configuration; no id is written anywhere else.

    Attributes:
        size: rows of the embedding table, at least the number of ids.
        action_first_id: lowest id of the band of action bins.
        action_count: number of action bins K.
    """

    size: int
    pad_id: int
    eos_id: int
    bos_id: int
    image_id: int
    think_start_id: int
    think_end_id: int
    action_start_id: int
    action_end_id: int
    action_first_id: int
    action_count: int

    def __post_init__(self) -> None:
        """Refuse ids that coincide, lie outside the table, or lie in the action band."""
        ids = self.control_ids
        last = self.action_first_id + self.action_count - 1
        if len(set(ids)) != len(ids):
            raise UserError(f"vocabulary: two control tokens share an id ({ids}); check the tokenizer")
        if min(*ids, self.action_first_id) < 0 or max(*ids, last) >= self.size:
            raise UserError(f"vocabulary: an id lies outside the {self.size} rows of the embedding table ({ids})")
        if any(self.action_first_id <= i <= last for i in ids):
            raise UserError(f"vocabulary: a control token lies in the action band {self.action_first_id}..{last}")

    @property
    def control_ids(self) -> tuple[int, ...]:
        """pad, eos, bos, image and the four tags: the ids that are not text."""
        tags = (self.think_start_id, self.think_end_id, self.action_start_id, self.action_end_id)
        return (self.pad_id, self.eos_id, self.bos_id, self.image_id, *tags)

    @property
    def banned_in_thought(self) -> tuple[int, ...]:
        """Ids that a decoded thought never contains: eos and the action band, as published."""
        return (self.eos_id, *range(self.action_first_id, self.action_first_id + self.action_count))

    def bins(self, mode: DecodeMode = "fixed") -> ActionBins:
        """The action bins on this vocabulary's band."""
        return ActionBins(count=self.action_count, first_id=self.action_first_id, mode=mode)

    @classmethod
    def from_tokenizer(
        cls, tokenizer: PreTrainedTokenizerFast, action_count: int, size: int | None = None
    ) -> Vocabulary:
        """Read the ids off a tokenizer whose base vocabulary ends with the action band.

        Args:
            tokenizer: of text, tags and action band.
            action_count: number of action bins K.
            size: rows of the embedding table, those without a token last; None for one per token.

        Raises:
            UserError: the tokenizer lacks one of the tags, or has more tokens than ``size``.
        """
        known = tokenizer.get_vocab()
        missing = [token for token in (PAD, EOS, BOS, *TAGS) if token not in known]
        if missing:
            raise UserError(f"tokenizer: no token {', '.join(missing)}; use the tokenizer of a DeepThinkVLA checkpoint")
        names = dict(zip(CONFIG_KEYS, (PAD, EOS, BOS, *TAGS), strict=True))
        ids = {field: known[token] for field, token in names.items()}
        bins = ActionBins.at_end_of(tokenizer.vocab_size, action_count)
        if size is not None and size < len(tokenizer):
            raise UserError(f"model.vocabulary_size: {size}, but the tokenizer has {len(tokenizer)} tokens; raise it")
        rows = len(tokenizer) if size is None else size
        return cls(size=rows, action_first_id=bins.first_id, action_count=action_count, **ids)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Vocabulary:
        """Read the ids from the keys of a published ``config.json``.

        Raises:
            UserError: a key is missing.
        """
        text = config.get("text_config") or {}
        found = {key: config.get(key, text.get(key)) for key in CONFIG_KEYS.values()}
        found |= {key: config.get(key) for key in ("action_token_begin_idx", "action_token_end_idx")}
        missing = sorted(key for key, value in found.items() if value is None)
        if missing or "vocab_size" not in text:
            missing += [] if "vocab_size" in text else ["text_config.vocab_size"]
            raise UserError(f"config.json: no {', '.join(missing)}; this is not a DeepThinkVLA checkpoint")
        first, last = int(found["action_token_begin_idx"]), int(found["action_token_end_idx"])
        ids = {field: int(found[key]) for field, key in CONFIG_KEYS.items()}
        return cls(size=int(text["vocab_size"]), action_first_id=first, action_count=last - first + 1, **ids)

    def to_config(self) -> dict[str, int]:
        """The published ``config.json`` keys (all but the size, which belongs to the text configuration)."""
        keys = {key: getattr(self, field) for field, key in CONFIG_KEYS.items()}
        last = self.action_first_id + self.action_count - 1
        return keys | {"action_token_begin_idx": self.action_first_id, "action_token_end_idx": last}

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raise :class:`UserError` when a tokenizer's tags have other ids than this vocabulary."""
        expected = dict(zip((PAD, EOS, BOS, *TAGS), self.control_ids, strict=True))
        known = tokenizer.get_vocab()
        wrong = [f"{token} is {known.get(token)}, not {i}" for token, i in expected.items() if known.get(token) != i]
        if wrong:
            raise UserError(f"tokenizer: does not belong to this model ({'; '.join(wrong)}); copy the right tokenizer")


def train_tokenizer(texts: Iterable[str], action_count: int, size_limit: int = 8192) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose merges do not cross words, so that each common word is one token.

    The order of ids is that of the published tokenizer: pad 0, eos 1, bos 2, text, the action band, then ``<image>``
    (special) and the four tags (added, *not* special: decoding with ``skip_special_tokens`` keeps them). The names in
    the band cannot arise from text. The result depends on the set of texts only, not on their order.

    Args:
        texts: what the model will read and write: prompts, instructions and thoughts.
        action_count: number of action bins K.
        size_limit: the most text tokens; words that do not fit are spelled with pieces.
    """
    import json

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size_limit,
        min_frequency=1,
        special_tokens=[PAD, EOS, BOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(sorted(set(texts)), trainer)
    # The band joins the base vocabulary by name only: no merge leads there.
    description = json.loads(core.to_str())
    words = description["model"]["vocab"]
    first_free = len(words)
    words |= {f"<bin_{action_count - 1 - i:04d}>": first_free + i for i in range(action_count)}
    core = Tokenizer.from_str(json.dumps(description))
    core.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    core.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS[1:]])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        clean_up_tokenization_spaces=False,
    )
