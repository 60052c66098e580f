"""Where a policy comes from when it is not a saved one: fresh weights, and what published checkpoints leave out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from transformers import PaliGemmaConfig, PreTrainedTokenizerFast

from dtvla.cli import config_dir
from dtvla.data.images import ImagePipeline
from dtvla.data.normalization import ActionNormalizer, Statistics
from dtvla.errors import UserError
from dtvla.policy.layout import Layout, PromptTemplate, normalize_instruction
from dtvla.policy.model import HybridVLA, image_tokens, make_config
from dtvla.policy.policy import Policy
from dtvla.policy.processor import Processor
from dtvla.policy.vocabulary import Vocabulary, train_tokenizer


def fresh(
    settings: Mapping[str, Any],
    texts: Iterable[str],
    statistics: Statistics,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Policy:
    """Fresh weights, drawn from ``settings["seed"]`` where they are to lie, and a tokenizer of the data's own words."""
    prompt = PromptTemplate.from_dict(settings["prompt"])
    texts = sorted(set(texts))
    words = [*texts, *(normalize_instruction(text) for text in texts), prompt.think_prefix, prompt("", True)]
    tokenizer = train_tokenizer(words, int(settings["action_bins"]), int(settings["tokenizer_size"]))
    vocabulary = Vocabulary.from_tokenizer(tokenizer, int(settings["action_bins"]), settings.get("vocabulary_size"))
    config = make_config(settings, vocabulary)
    processor = _processor(settings, vocabulary, tokenizer, config, statistics)
    with torch.random.fork_rng(devices=[]), torch.device(device), _default_type(dtype):
        torch.manual_seed(int(settings["seed"]))
        model = HybridVLA(config)
    generator = torch.Generator().manual_seed(int(settings["seed"]))
    model.initialize_action_rows(processor.layout.bins, generator)
    return Policy(model, processor)


@contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def published_processor(
    folder: Path,
    config: PaliGemmaConfig,
    tokenizer: PreTrainedTokenizerFast,
    statistics: Statistics,
    settings: Mapping[str, Any] | None = None,
) -> Processor:
    """Everything but the weights of a checkpoint in the published format, which says little about it.

    Args:
        folder: to name in errors.
        config: its configuration, which gives ids and picture size.
        tokenizer: its tokenizer.
        statistics: of the data.
        settings: the ``model`` group for the rest; None: conf/model/deepthinkvla.yaml.

    Raises:
        UserError: settings that contradict the checkpoint.
    """
    vocabulary, vision = Vocabulary.from_config(config.to_dict()), cast(Any, config.vision_config)
    own = {"action_bins": vocabulary.action_count, "image_size": int(vision.image_size)}
    if settings is None:
        settings = {**published_settings(), **own}
    for key, value in own.items():
        if settings[key] != value:
            raise UserError(f"model.{key}: {settings[key]}, but checkpoint {folder} has {value}; use that number")
    return _processor(settings, vocabulary, tokenizer, config, statistics)


def published_settings() -> dict[str, Any]:
    """The ``model`` group of the published model, as shipped."""
    values: dict[str, Any] = yaml.safe_load((config_dir() / "model" / "deepthinkvla.yaml").read_text())
    return values


def _processor(
    settings: Mapping[str, Any],
    vocabulary: Vocabulary,
    tokenizer: PreTrainedTokenizerFast,
    config: PaliGemmaConfig,
    statistics: Statistics,
) -> Processor:
    vocabulary.check_tokenizer(tokenizer)
    cameras = tuple(settings["cameras"])
    normalizer = ActionNormalizer(statistics, settings["normalizer"], tuple(settings["normalizer_mask"]))
    if normalizer.action_dim != settings["action_dim"]:
        found, wanted = normalizer.action_dim, settings["action_dim"]
        raise UserError(
            f"model.action_dim: {wanted}, but the data's actions have {found} dimensions; set it to {found}"
        )
    layout = Layout(
        vocabulary=vocabulary,
        tokenizer=tokenizer,
        image_tokens=image_tokens(config, len(cameras)),
        chunk=int(settings["chunk"]),
        action_dim=int(settings["action_dim"]),
        prompt_template=PromptTemplate.from_dict(settings["prompt"]),
        bins=vocabulary.bins(),
        max_prompt_tokens=int(settings["max_prompt_tokens"]),
        max_thought_tokens=int(settings["max_thought_tokens"]),
    )
    images = ImagePipeline(cameras, int(settings["image_size"]), float(settings.get("center_crop", 1.0)))
    return Processor(layout, images, normalizer)
