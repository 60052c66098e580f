"""The hybrid-attention VLA on transformers' PaliGemma classes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

from dtvla.errors import UserError
from dtvla.policy.action_bins import ActionBins
from dtvla.policy.attention import Rule, Segment, block_mask, positions, unfused, visible
from dtvla.policy.language import runs, use_language_layers
from dtvla.policy.layout import IGNORE, Batch
from dtvla.policy.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

DECODERS = ("hybrid", "autoregressive")
DECODER_KEY = "action_decoder"  # in config.json; transformers takes a key "decoder" for a nested configuration
ATTENTION = {"sdpa": "sdpa", "flex": "flex_attention"}  # name in the configuration -> name in transformers


class HybridVLA(PaliGemmaForConditionalGeneration):
    """PaliGemma whose thought is causal and whose action block is bidirectional and read in one pass.

    Modules and weights are those of PaliGemma, so its checkpoints load. With ``config.slot_embedding`` the action
    slots, whose inputs are zero in the published model, receive a learned embedding of their index: zeroed slots are
    equal in the first layer and differ by position only, which small models learn slowly.

    With ``config.action_decoder`` ``"autoregressive"`` (absent: ``"hybrid"``) it is the baseline that writes actions as
    it writes thoughts: one token after the other, each seeing those before it.

    Attributes:
        pads_visible: see :class:`~dtvla.policy.attention.Rule`; a setting of the run, not of the weights.
    """

    def __init__(self, config: PaliGemmaConfig) -> None:
        """Build the modules with fresh weights (:meth:`initialize_action_rows` is up to the caller).

        Raises:
            UserError: an unknown decoder, or slot embeddings for one without slots.
        """
        super().__init__(config)
        use_language_layers(self.model.language_model.layers)
        if self.decoder not in DECODERS:
            raise UserError(f"model.decoder: {self.decoder!r} is unknown; use {' or '.join(DECODERS)}")
        if self.autoregressive and getattr(config, "slot_embedding", False):
            raise UserError(
                "model.slot_embedding: true, but an autoregressive decoder reads the actions, not slots; set it false"
            )
        self.pads_visible = False
        self.slot_embedding: nn.Embedding | None = None
        if getattr(config, "slot_embedding", False):
            text: Any = config.text_config
            self.slot_embedding = nn.Embedding(config.action_slots, text.hidden_size)
            nn.init.normal_(self.slot_embedding.weight, std=text.initializer_range)

    @property
    def decoder(self) -> str:
        """How actions are written: one of :data:`DECODERS`."""
        return str(getattr(self.config, DECODER_KEY, DECODERS[0]))

    @property
    def autoregressive(self) -> bool:
        """Whether actions are written one by one."""
        return self.decoder == "autoregressive"

    @property
    def rule(self) -> Rule:
        """Who sees whom."""
        return Rule(causal_actions=self.autoregressive, pads_visible=self.pads_visible)

    def forward(self, batch: Batch, head: Callable[[Tensor], Any] | None = None) -> Any:
        """Logits where the next token is supervised, or whatever is to be made of the hidden states there.

        Args:
            batch: with labels.
            head: takes hidden states (M, D). It runs inside of the forward, where sharded weights are whole.

        Returns:
            Without a head float32 (M, V) in row-major order of :func:`supervised_positions`; else what it returns.

        Raises:
            UserError: as :meth:`encode`.
        """
        embeddings_BTD, mask, places_BT = self._inputs(batch)
        hidden_MD = self._supervised(batch, embeddings_BTD, mask, places_BT)
        return self.logits(hidden_MD) if head is None else head(hidden_MD)

    def encode(self, batch: Batch) -> Tensor:
        """Hidden states (B, T, D) of whole sequences after the final norm, the way of transformers.

        A batch on a GPU is taken as it is, since looking at it would cost a wait: :func:`check_batch` is for before.

        Raises:
            UserError: ids outside the vocabulary, pictures that do not fit the sequences or the model, or gradients
                through FlexAttention on the CPU.
        """
        return self.transform(*self._inputs(batch))

    def mask(self, segment_BT: Tensor, sample_BT: Tensor | None = None) -> Tensor | BlockMask:
        """The attention mask of whole rows, in the form that ``model.attention`` needs.

        Args:
            segment_BT: :class:`~dtvla.policy.attention.Segment` values.
            sample_BT: for packed rows, which sample a position belongs to.
        """
        make = block_mask if self._flex else visible
        return make(segment_BT, sample_BT, rule=self.rule)

    def embed(self, batch: Batch) -> Tensor:
        """Input embeddings (B, T, D) of whole rows, which may be packed; each picture passes the vision tower once."""
        images_BID = self.embed_images(batch.pixels_BNCHW)
        text_BTD = self.embed_text(batch.input_ids_BT, batch.slot_BT)
        is_image_BT1 = image_positions(batch, self.config).unsqueeze(-1)
        return text_BTD.masked_scatter(is_image_BT1, images_BID.to(text_BTD.dtype))

    def embed_images(self, pixels_BNCHW: Tensor) -> Tensor:
        """Image tokens (B, N * tokens per camera, D): cameras in order, on the scale of the token embeddings.

        Raises:
            UserError: pictures of another size than the model's.
        """
        vision: Any = self.config.vision_config
        if pixels_BNCHW.ndim != 5 or pixels_BNCHW.shape[2:] != (3, vision.image_size, vision.image_size):
            wanted = f"(batch, cameras, 3, {vision.image_size}, {vision.image_size})"
            raise UserError(f"pictures: shape {tuple(pixels_BNCHW.shape)}, not {wanted}; resize them as the model does")
        features = self.model.get_image_features(self.pixel_values(pixels_BNCHW)).pooler_output
        return features.reshape(len(pixels_BNCHW), -1, features.shape[-1])

    def pixel_values(self, pixels_BNCHW: Tensor) -> Tensor:
        """uint8 pictures as the vision tower takes them: (B * N, 3, H, W) in [-1, 1].

        In float32 at least, whatever the type of the weights: the tower rounds them to its own type, once.
        """
        dtype = torch.float64 if self.model.vision_tower.dtype == torch.float64 else torch.float32
        return pixels_BNCHW.flatten(0, 1).to(dtype) / 127.5 - 1.0

    def embed_text(self, input_ids_BT: Tensor, slot_BT: Tensor | None) -> Tensor:
        """Token embeddings (B, T, D), scaled by sqrt(D) as in Gemma.

        Action slots are zeroed or learned, so their ids are of no account; an autoregressive decoder reads them.
        """
        embeddings_BTD: Tensor = self.model.language_model.embed_tokens(input_ids_BT)
        return embeddings_BTD if slot_BT is None else self._fill_slots(embeddings_BTD, slot_BT)

    def transform(self, embeddings_BTD: Tensor, mask: Tensor | BlockMask, position_ids_BT: Tensor) -> Tensor:
        """Run transformers' language model on whole rows.

        Args:
            embeddings_BTD: inputs.
            mask: from :meth:`mask`.
            position_ids_BT: 1-based positions.

        Returns:
            Hidden states (B, T, D) after the final norm.

        Raises:
            UserError: gradients through FlexAttention on the CPU.
        """
        with self._attention_on(embeddings_BTD.device):
            output = self.model.language_model(
                inputs_embeds=embeddings_BTD,
                attention_mask=mask[:, None] if isinstance(mask, Tensor) else mask,
                position_ids=position_ids_BT,
                use_cache=False,
            )
        hidden_BTD: Tensor = output.last_hidden_state
        return hidden_BTD

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor | BlockMask, Tensor]:
        """Embeddings (B, T, D), the mask and positions (B, T)."""
        if batch.input_ids_BT.device.type == "cpu":
            check_batch(batch, self.config)
        embeddings_BTD = self.embed(batch)
        places_BT = positions(batch.segment_BT, batch.sample_BT, self.rule)
        return embeddings_BTD, self.mask(batch.segment_BT, batch.sample_BT), places_BT

    def _supervised(
        self, batch: Batch, embeddings_BTD: Tensor, mask: Tensor | BlockMask, position_ids_BT: Tensor
    ) -> Tensor:
        """What :meth:`transform` gives where the next token is supervised (M, D), without computing all of the rest."""
        language: Any = self.model.language_model
        masks = runs(mask, first_supervised(batch))
        read_M = supervised_places(batch, rows=masks[-1].shape[-2])
        rotation = language.rotary_emb(embeddings_BTD, position_ids=position_ids_BT)
        *layers, last = language.layers
        with self._attention_on(embeddings_BTD.device):
            hidden_BTD = embeddings_BTD
            for layer in layers:
                hidden_BTD = layer(hidden_BTD, masks=masks, rotation=rotation)
            hidden_MD: Tensor = last(hidden_BTD, masks=masks[-1:], rotation=rotation, read_M=read_M)
        normed_MD: Tensor = language.norm(hidden_MD)
        return normed_MD

    @contextmanager
    def _attention_on(self, device: torch.device) -> Iterator[None]:
        on_cpu = self._flex and device.type == "cpu"
        if on_cpu and torch.is_grad_enabled() and self._trains:
            raise UserError("model.attention: flex has no gradient on the CPU; use sdpa, or train on a GPU")
        with unfused(on_cpu):
            yield

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary, float32 at least, for hidden states of any leading shape."""
        logits: Tensor = self.lm_head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()

    @torch.no_grad()
    def initialize_action_rows(self, bins: ActionBins, generator: torch.Generator, bandwidth: float = 4.0) -> None:
        """Give the (tied) rows of the action bins random Fourier features of their value (Rahimi and Recht, 2007).

        Rows of neighbouring bins start out similar, with a Gaussian similarity of length 1 / ``bandwidth``, so a
        small model learns the order of the bins from few examples. Their scale is that of the other rows.
        """
        weight_VD = self.model.language_model.embed_tokens.weight
        text: Any = self.config.text_config
        size, std = weight_VD.shape[1], text.initializer_range
        frequency_D = torch.randn(size, generator=generator, dtype=torch.float64) * bandwidth
        phase_D = torch.rand(size, generator=generator, dtype=torch.float64) * 2 * math.pi
        value_K = bins.value(torch.arange(bins.count)).double()
        rows_KD = torch.cos(value_K[:, None] * frequency_D + phase_D) * math.sqrt(2.0) * std
        weight_VD[bins.first_id : bins.last_id + 1] = rows_KD.flip(0).to(weight_VD)

    @property
    def _flex(self) -> bool:
        text: Any = self.config.text_config
        return bool(text._attn_implementation == ATTENTION["flex"])

    @property
    def _trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    def _fill_slots(self, embeddings_BTD: Tensor, slot_BT: Tensor) -> Tensor:
        if self.autoregressive:
            return embeddings_BTD
        if self.slot_embedding is None:
            return embeddings_BTD * (~slot_BT).unsqueeze(-1)
        slots = self.slot_embedding.num_embeddings  # of each sample of a packed row
        index_BT = (slot_BT.cumsum(dim=1) - 1).clamp(min=0) % slots
        learned_BTD = self.slot_embedding(index_BT) * math.sqrt(embeddings_BTD.shape[-1])
        return torch.where(slot_BT.unsqueeze(-1), learned_BTD.to(embeddings_BTD.dtype), embeddings_BTD)


def supervised_positions(batch: Batch) -> Tensor:
    """Where a next token is supervised: bool (B, T - 1); position t predicts the token at t + 1."""
    return batch.labels_BT[:, 1:] != IGNORE


def supervised_places(batch: Batch, rows: int | None = None) -> Tensor:
    """The same places as int64 (M,) indices into the flattened (B * T) positions; no GPU is asked for their number.

    Args:
        batch: with labels.
        rows: the indices are into the last so many positions (B * rows), which hold all places; None: all positions.
    """
    where_BT = functional.pad(supervised_positions(batch), (0, 1))
    where_BT = where_BT if rows is None else where_BT[:, where_BT.shape[1] - rows :]
    return torch.nonzero_static(where_BT.flatten(), size=batch.tokens)[:, 0]


def first_supervised(batch: Batch) -> int:
    """The first supervised position of all rows; 0 for a batch on a GPU, which would have to be waited for."""
    if batch.labels_BT.device.type != "cpu" or batch.tokens == 0:
        return 0
    return int(supervised_positions(batch).any(0).nonzero()[0])


def image_positions(batch: Batch, config: PaliGemmaConfig) -> Tensor:
    """Where pictures are: bool (B, T). A sampled thought may have the id of an image token, which then is a word."""
    return (batch.input_ids_BT == config.image_token_index) & (batch.segment_BT == Segment.PREFIX)


def check_batch(batch: Batch, config: PaliGemmaConfig) -> None:
    """Look at a batch's ids once; on a GPU a wrong one would end the process without a usable message.

    Raises:
        UserError: an id lies outside the vocabulary, or the rows do not hold the image tokens of their pictures.
    """
    text: Any = config.text_config
    ids_BT, cameras = batch.input_ids_BT, batch.pixels_BNCHW.shape[1]
    images = image_tokens(config, cameras)
    low, high = ids_BT.min(), torch.maximum(ids_BT.max(), batch.labels_BT.max())
    if low < 0 or high >= text.vocab_size:
        wrong = int(low if low < 0 else high)
        raise UserError(
            f"batch: token {wrong} is outside the model's {text.vocab_size} ids; use the tokenizer of this model"
        )
    sample_BT = torch.zeros_like(ids_BT) if batch.sample_BT is None else batch.sample_BT.clamp(min=0)
    row_BT = torch.arange(len(ids_BT), device=ids_BT.device)[:, None] * (len(batch) + 1) + sample_BT
    found = torch.bincount(row_BT[image_positions(batch, config)])
    if not torch.equal(found[found > 0], found.new_full((len(batch),), images)):
        raise UserError(
            f"batch: {cameras} pictures are {images} image tokens, but the rows have another number; "
            "encode them with this model's layout and cameras"
        )


def configure(model: HybridVLA, settings: Mapping[str, Any]) -> None:
    """Set how a model computes whole sequences, and make it ready to train; no weight changes.

    Args:
        model: the model.
        settings: of the ``model`` group: ``attention`` (sdpa), ``gradient_checkpointing`` and ``compile`` (false), and
            ``decoder`` (hybrid), which must be the model's own.

    Raises:
        UserError: an unknown attention, or the model was made with another decoder.
    """
    attention, decoder = str(settings.get("attention", "sdpa")), str(settings.get("decoder", DECODERS[0]))
    if attention not in ATTENTION:
        raise UserError(f"model.attention: {attention!r} is unknown; use {' or '.join(ATTENTION)}")
    if decoder != model.decoder:
        raise UserError(
            f"model.decoder: {decoder}, but the checkpoint's is {model.decoder}; add model/decoder={model.decoder}"
        )
    model.set_attn_implementation({"text_config": ATTENTION[attention]})
    if settings.get("gradient_checkpointing", False):
        with warnings.catch_warnings():  # it has a new name in transformers 5.23; this one is in all of version 5
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # a hook on the embeddings, of use to reentrant checkpointing only
    if settings.get("compile", False):
        from dtvla.policy.compiling import BUDGET, compile_layers  # its imports take seconds

        compile_layers(model, float(settings.get("compile_budget", BUDGET)))
    model.train()  # loaded models are in evaluation mode, in which nothing is checkpointed


def make_config(settings: Mapping[str, Any], vocabulary: Vocabulary) -> PaliGemmaConfig:
    """The transformers configuration of a model with fresh weights.

    Args:
        settings: the ``model`` group of the configuration: ``text``, ``vision``, ``image_size``, ``chunk``,
            ``action_dim``, ``slot_embedding``, ``initializer_range``, ``decoder``.
        vocabulary: all ids.

    Raises:
        UserError: the image size is not a multiple of the patch size.
    """
    text, vision = settings["text"], settings["vision"]
    if settings["image_size"] % vision["patch_size"]:
        size, patch = settings["image_size"], vision["patch_size"]
        raise UserError(f"model.image_size: {size} is not a multiple of model.vision.patch_size {patch}; change one")
    ids: dict[str, Any] = vocabulary.to_config()
    special = {key: ids.pop(key) for key in ("pad_token_id", "eos_token_id", "bos_token_id")}
    text_config = GemmaConfig(
        vocab_size=vocabulary.size, initializer_range=settings["initializer_range"], **text, **special
    )
    vision_config = SiglipVisionConfig(image_size=settings["image_size"], vision_use_head=False, **vision)
    extra: dict[str, Any] = {
        DECODER_KEY: settings.get("decoder", DECODERS[0]),
        "slot_embedding": bool(settings["slot_embedding"]),
        "action_slots": settings["chunk"] * settings["action_dim"],
    }
    return PaliGemmaConfig(
        vision_config=vision_config,
        text_config=text_config,
        projection_dim=text["hidden_size"],
        hidden_size=text["hidden_size"],
        vocab_size=vocabulary.size,
        **special,
        **ids,
        **extra,
    )


def image_tokens(config: PaliGemmaConfig, cameras: int) -> int:
    """Number of image tokens of all cameras together."""
    vision: Any = config.vision_config
    return cameras * int(vision.image_size // vision.patch_size) ** 2
