"""A policy as one folder: weights, configuration, tokenizer, pictures and actions.

``config.json`` and ``model.safetensors`` are those of transformers' PaliGemma, ``tokenizer.json`` is a fast tokenizer,
and ``policy.json`` holds the rest: prompt, cameras, action bins, normalisation statistics with their digest, versions.
A policy with adapters is saved as those alone (in peft's format) and ``policy.json``; they name their base. Published
checkpoints, which have no ``policy.json``, are read too; :mod:`dtvla.policy.published` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PaliGemmaConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from dtvla.data.images import ImagePipeline
from dtvla.data.normalization import ActionNormalizer, Statistics
from dtvla.errors import UserError
from dtvla.policy import adapters, build, quantization, weights
from dtvla.policy.hub import ADAPTER_FILE, ADAPTER_WEIGHTS, POLICY_FILE, Source, locate
from dtvla.policy.layout import Layout, PromptTemplate
from dtvla.policy.model import DECODER_KEY, HybridVLA, image_tokens
from dtvla.policy.policy import Policy
from dtvla.policy.processor import Processor
from dtvla.policy.vocabulary import Vocabulary

FORMAT_VERSION = 1
SHARD_SIZE = "5GB"


def save(policy: Policy, folder: Path | str, *, overwrite: bool = False) -> None:
    """Write a policy, or its adapters when it has some; the folder appears complete or not at all.

    Args:
        policy: what to write.
        folder: the new folder; its parents are made.
        overwrite: replace a policy that is there already.

    Raises:
        UserError: the folder exists and ``overwrite`` is off, or is something other than a policy; or the policy is
            quantised.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise UserError(f"{folder}: exists already; choose another folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / POLICY_FILE).is_file():
        raise UserError(f"{folder}: exists and is not a policy; choose another folder")
    with weights.new_folder(folder, replace=overwrite) as temporary:
        write(policy, temporary)


def write(policy: Policy, folder: Path, shard_size: str = SHARD_SIZE) -> None:
    """Write a policy's files into an empty folder; see :func:`save`."""
    write_without_weights(policy, folder)
    if adapters.has_adapter(policy.model):
        adapters.save_weights(policy.model, folder)
    else:
        _quietly_save(policy.model, folder, shard_size)


def write_without_weights(policy: Policy, folder: Path) -> None:
    """Write everything else into an empty folder, which :func:`add_weights` completes.

    Raises:
        UserError: the weights could not be saved either: quantised ones, or adapters to fresh ones.
    """
    if adapters.has_adapter(policy.model):
        base = adapters.base_of(policy.model)
        if not base:
            raise UserError(
                "model.lora: these adapters belong to fresh weights, which are nowhere; set model.checkpoint"
            )
        adapters.save_config(policy.model, folder, str(Path(base).resolve()) if Path(base).is_dir() else base)
    elif quantization.bits_of(policy.model):
        raise UserError("model.quantize: quantised weights are not saved; save the adapters trained on them")
    else:
        policy.model.config.save_pretrained(folder)
        try:
            policy.processor.layout.tokenizer.save_pretrained(folder)
        except Exception as error:  # the tokenizers library raises bare Exceptions, of the disk too
            raise OSError(f"{folder}: the tokenizer can't be written ({error})") from error
    # What an adapter's base may not say, or not have.
    own = {"decoder": policy.model.decoder, "quantize": quantization.bits_of(policy.model)}
    description = describe(policy.processor) | own
    (folder / POLICY_FILE).write_text(json.dumps(description, indent=2) + "\n")


def add_weights(folder: Path, tensors: Mapping[str, Tensor], shard_size: str = SHARD_SIZE) -> None:
    """Complete a folder of :func:`write_without_weights`.

    Args:
        folder: with an adapter's configuration or a model's.
        tensors: whole weights of this adapter or model, by their names in memory.
        shard_size: most bytes of one file.
    """
    if (folder / ADAPTER_FILE).is_file():
        save_file(adapters.in_file(tensors), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        return
    tied = weights.read_config(folder).tie_word_embeddings
    weights.write_weights({n: w for n, w in tensors.items() if not (tied and n == weights.HEAD)}, folder, shard_size)


def load(
    name: Path | str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    statistics: Statistics | None = None,
    settings: Mapping[str, Any] | None = None,
    as_trained: bool = True,
) -> Policy:
    """Read a policy, in evaluation mode; adapters are added, not merged.

    Args:
        name: a folder as :func:`save` writes it, a published one, one of adapters, or a hub id of such.
        device: where the model goes.
        dtype: of the weights; None keeps what is stored.
        statistics: for a published base model, which has none.
        settings: the ``model`` group, for what a published checkpoint does not say; None: conf/model/deepthinkvla.yaml.
        as_trained: whether a base whose last adapter was trained on quantised weights is quantised again; its adapters
            can't be merged then.

    Raises:
        UserError: files or weights are missing, damaged or superfluous, or the format version is another one.
    """
    source = locate(name)
    processor = read_processor(source, statistics, settings)
    return Policy(read_model(source, dtype, device, settings, as_trained), processor)


def read_model(
    source: Source,
    dtype: torch.dtype | None,
    device: str | torch.device = "cpu",
    settings: Mapping[str, Any] | None = None,
    as_trained: bool = False,
) -> HybridVLA:
    """Read a checkpoint's weights and adapters; for arguments and errors see :func:`load`."""
    config = weights.read_config(source.base)
    chosen = (settings or {}) if source.policy_file is None else _read_json(source.policy_file)
    if chosen.get("decoder"):
        setattr(config, DECODER_KEY, chosen["decoder"])
    model = weights.read_model(source.base, config, dtype, device)
    for folder in source.adapters:
        if adapters.has_adapter(model):
            adapters.merge(model)
        if as_trained and chosen.get("quantize") and folder == source.adapters[-1]:
            quantization.quantize(model, chosen["quantize"])
        adapters.load(model, folder)
    return model.eval()


def read_processor(
    source: Source, statistics: Statistics | None = None, settings: Mapping[str, Any] | None = None
) -> Processor:
    """Read everything but the weights; for arguments and errors see :func:`load`."""
    config, tokenizer = weights.read_config(source.base), weights.read_tokenizer(source.base)
    if source.policy_file is None:
        if source.statistics_file is not None:
            statistics = Statistics.load(source.statistics_file)
        if statistics is None:
            raise UserError(
                f"checkpoint {source.folder}: neither policy.json nor norm_stats.json, so the scale of its actions is "
                "unknown; a base model must be trained first, else copy norm_stats.json beside its weights"
            )
        return build.published_processor(source.base, config, tokenizer, statistics, settings)
    path, description = source.policy_file, _read_json(source.policy_file)
    if description.get("format_version") != FORMAT_VERSION:
        other = description.get("format_version")
        raise UserError(
            f"checkpoint {path.parent}: format version {other}, this dtvla reads {FORMAT_VERSION}; "
            "use the dtvla that wrote it or train again"
        )
    try:
        normalizer = ActionNormalizer.from_dict(description["normalizer"], source=f"{path}")
        images = ImagePipeline.from_dict(description["images"])
        layout = _layout(description, Vocabulary.from_config(config.to_dict()), tokenizer, config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {path.parent}: {POLICY_FILE} is damaged ({error!r}); copy it again") from None
    return Processor(layout, images, normalizer)


def describe(processor: Processor) -> dict[str, Any]:
    """What ``policy.json`` says."""
    layout = processor.layout
    packages = ("torch", "transformers", "tokenizers", "safetensors")
    return {
        "format_version": FORMAT_VERSION,
        "images": processor.images.to_dict(),
        "chunk": layout.chunk,
        "action_dim": layout.action_dim,
        "action_decode": layout.bins.mode,
        "prompt": layout.prompt_template.to_dict(),
        "max_prompt_tokens": layout.max_prompt_tokens,
        "max_thought_tokens": layout.max_thought_tokens,
        "normalizer": processor.normalizer.to_dict(),
        "versions": {name: version(name) for name in packages},
    }


def _layout(
    values: Mapping[str, Any], vocabulary: Vocabulary, tokenizer: PreTrainedTokenizerFast, config: PaliGemmaConfig
) -> Layout:
    vocabulary.check_tokenizer(tokenizer)
    return Layout(
        vocabulary=vocabulary,
        tokenizer=tokenizer,
        image_tokens=image_tokens(config, len(values["images"]["cameras"])),
        chunk=int(values["chunk"]),
        action_dim=int(values["action_dim"]),
        prompt_template=PromptTemplate.from_dict(values["prompt"]),
        bins=vocabulary.bins(values["action_decode"]),
        max_prompt_tokens=int(values["max_prompt_tokens"]),
        max_thought_tokens=int(values["max_thought_tokens"]),
    )


def _quietly_save(model: PreTrainedModel, folder: Path, shard_size: str) -> None:
    """``save_pretrained`` without its progress bar."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, max_shard_size=shard_size)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the checkpoint again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object; copy the checkpoint again")
    return values
