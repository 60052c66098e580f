"""Where a policy comes from when it is not a saved one: fresh weights, or a checkpoint of transformers' PaliGemma."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PaliGemmaConfig

from dtvla.data.images import ImagePipeline
from dtvla.data.normalization import ActionNormalizer, Statistics
from dtvla.errors import UserError
from dtvla.policy import checkpoint as checkpoints
from dtvla.policy.layout import Layout, PromptTemplate, normalize_instruction
from dtvla.policy.model import HybridVLA, image_tokens, make_config
from dtvla.policy.policy import Policy
from dtvla.policy.processor import Processor
from dtvla.policy.vocabulary import Vocabulary, train_tokenizer


def find_checkpoint(name: str) -> Path:
    """The folder of a checkpoint: a path, or a hub id that is in the local cache. Nothing is downloaded.

    Raises:
        UserError: neither; says what to download and where to put it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except HFValidationError:
        raise UserError(f"checkpoint: no folder {name}; give the folder of a saved policy or a hub id") from None
    except (LocalEntryNotFoundError, FileNotFoundError):
        short = name.rsplit("/", 1)[-1]
        raise UserError(
            f"checkpoint: {name} is neither a folder nor in the local Hugging Face cache; download it with "
            f"'hf download {name} --local-dir checkpoints/{short}' and set model.checkpoint=checkpoints/{short}"
        ) from None


def fresh(settings: Mapping[str, Any], texts: Iterable[str], statistics: Statistics) -> Policy:
    """Fresh weights, drawn from ``settings["seed"]``, and a tokenizer of the data's own words."""
    prompt = PromptTemplate.from_dict(settings["prompt"])
    texts = sorted(set(texts))
    words = [*texts, *(normalize_instruction(text) for text in texts), prompt.think_prefix, prompt("", True)]
    tokenizer = train_tokenizer(words, int(settings["action_bins"]), int(settings["tokenizer_size"]))
    vocabulary = Vocabulary.from_tokenizer(tokenizer, int(settings["action_bins"]))
    config = make_config(settings, vocabulary)
    processor = _processor(settings, vocabulary, tokenizer, config, statistics)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(settings["seed"]))
        model = HybridVLA(config)
    generator = torch.Generator().manual_seed(int(settings["seed"]))
    model.initialize_action_rows(processor.layout.bins, generator)
    return Policy(model, processor)


def from_transformers(folder: Path, settings: Mapping[str, Any], statistics: Statistics) -> Policy:
    """Weights, vocabulary and tokenizer of a PaliGemma checkpoint; the rest from the settings."""
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"checkpoint {folder}: no {', '.join(missing)}; download the whole repository")
    config = checkpoints.read_config(folder)
    vocabulary = Vocabulary.from_config(config.to_dict())
    if vocabulary.action_count != settings["action_bins"]:
        raise UserError(
            f"model.action_bins: {settings['action_bins']}, but the checkpoint has {vocabulary.action_count}; "
            "use that number"
        )
    processor = _processor(settings, vocabulary, checkpoints.read_tokenizer(folder), config, statistics)
    return Policy(checkpoints.read_model(folder, config, torch.float32), processor)


def _processor(
    settings: Mapping[str, Any], vocabulary: Vocabulary, tokenizer: Any, config: PaliGemmaConfig, statistics: Statistics
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
        bins=vocabulary.bins(settings["action_decode"]),
        max_prompt_tokens=int(settings["max_prompt_tokens"]),
        max_thought_tokens=int(settings["max_thought_tokens"]),
    )
    return Processor(layout, ImagePipeline(cameras, int(settings["image_size"])), normalizer)
