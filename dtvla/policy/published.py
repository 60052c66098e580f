"""Writes the format of the published checkpoints, which transformers 4.48 and the published code read.

Weights have the names of transformers 4.48, ``config.json`` its keys, ``norm_stats.json`` the statistics. Prompt, chunk
and cameras stand in the published code, not in its checkpoints; where a policy differs, ``policy.json`` is added, which
that code ignores and dtvla reads. What comes from a published folder goes back as it was: tokenizer, configuration,
and every file that means nothing here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PaliGemmaConfig, PreTrainedTokenizerFast

from dtvla.data.normalization import Statistics
from dtvla.errors import UserError
from dtvla.policy import build, checkpoint, weights
from dtvla.policy.hub import ADAPTER_FILE, PICKLED, POLICY_FILE, STATISTICS_FILE, Source
from dtvla.policy.model import HybridVLA, image_tokens
from dtvla.policy.placement import type_name
from dtvla.policy.processor import Processor

VERSION = "4.48.1"  # of transformers
CONFIG_FILE, CARD_FILE = "config.json", "README.md"
PROCESSOR = "PaliGemmaProcessor"
UNK, GEMMA_SPACE = "<unk>", "▁"
TEXT_KEYS = (
    "attention_bias",
    "attention_dropout",
    "head_dim",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
    "vocab_size",
)
VISION_KEYS = (
    "attention_dropout",
    "hidden_act",
    "hidden_size",
    "image_size",
    "intermediate_size",
    "layer_norm_eps",
    "model_type",
    "num_attention_heads",
    "num_channels",
    "num_hidden_layers",
    "patch_size",
    "vision_use_head",
)


def write(
    model: HybridVLA, processor: Processor | None, source: Source, folder: Path, shard_size: str = checkpoint.SHARD_SIZE
) -> int:
    """Write the files into an empty folder.

    Args:
        model: without adapters, in the type that is to be stored.
        processor: of the policy; None for a base model, which has no statistics.
        source: where the model was read; its own files are carried along when it is in this format.
        folder: where to.
        shard_size: the most bytes of a file of weights, such as ``5GB``.

    Returns:
        The number of weights (tensors) written.

    Raises:
        UserError: the published model lacks something that this one has.
    """
    lacking = {"slot embedding": model.slot_embedding is not None, "autoregressive decoder": model.autoregressive}
    if any(lacking.values()):
        names = ", ".join(name for name, has in lacking.items() if has)
        raise UserError(f"format: the published model has no {names}, this checkpoint does; use format=dtvla")
    stored = weights.find_weights(source.base)
    came_so = any(weights.published_name(weights.module_name(name)) == name for name in stored)
    head = weights.published_name(weights.HEAD)
    tensors = {weights.published_name(name): weight for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings and not (came_so and head in stored):
        del tensors[head]
    elif model.config.tie_word_embeddings:
        tensors[head] = tensors[head].clone()  # safetensors refuses two names of one memory
    weights.write_weights(tensors, folder, shard_size)
    if came_so:
        config = _edited(json.loads((source.base / CONFIG_FILE).read_text()), model)
        _carry(source, folder)
    else:
        tokenizer = weights.read_tokenizer(source.base)
        config = config_values(model.config, model.dtype)
        _write_new(folder, model.config, tokenizer)
    _dump(folder / CONFIG_FILE, config)
    if processor is not None:
        _write_processor(processor, source, model.config, folder)
    return len(tensors)


def config_values(config: PaliGemmaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The keys of ``config.json`` as transformers 4.48 wrote them for the published model.

    Args:
        config: of the model.
        dtype: of the weights.
    """
    values = config.to_dict()
    text, vision = values["text_config"], values["vision_config"]
    patches = image_tokens(config, 1)
    ids = {
        key: values[key] for key in sorted(values) if key.startswith(("think_", "action_")) and key.endswith("_index")
    }
    ids |= {key: values[key] for key in ("action_token_begin_idx", "action_token_end_idx", "image_token_index")}
    ids |= {key: values.get(key, text.get(key)) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    name = type_name(dtype)
    rope = text["rope_parameters"]["rope_theta"]
    activation = {"hidden_act": text["hidden_act"], "hidden_activation": text["hidden_act"]}
    return {
        **ids,
        "architectures": ["DeepThinkVLA"],
        "hidden_size": values["hidden_size"],
        "ignore_index": -100,
        "model_type": "paligemma",
        "projection_dim": values["projection_dim"],
        "text_config": {key: text[key] for key in TEXT_KEYS}
        | activation
        | {"num_image_tokens": patches, "rope_theta": rope, "torch_dtype": name},
        "torch_dtype": name,
        "transformers_version": VERSION,
        "vision_config": {key: vision[key] for key in VISION_KEYS}
        | {"num_image_tokens": patches, "projection_dim": values["projection_dim"], "torch_dtype": name},
    }


def _edited(config: dict[str, Any], model: HybridVLA) -> dict[str, Any]:
    """A published configuration with the model's type, and untied ends if merged adapters made them differ."""
    name = type_name(model.dtype)
    config["torch_dtype"] = name
    for part in ("text_config", "vision_config"):
        if "torch_dtype" in config[part]:
            config[part]["torch_dtype"] = name
    if not model.config.tie_word_embeddings:
        config["text_config"]["tie_word_embeddings"] = False
    return config


def _carry(source: Source, folder: Path) -> None:
    """Copy what is neither weights nor rewritten; pickled and hidden files are left."""
    written = {CONFIG_FILE, POLICY_FILE, ADAPTER_FILE, weights.INDEX_FILE}
    if source.adapters:
        written.add(CARD_FILE)  # tells of the base
    for path in sorted(source.base.iterdir()):
        kept = path.is_file() and not path.name.startswith(".") and path.name not in written
        if kept and path.suffix not in (".safetensors", *PICKLED):
            shutil.copyfile(path, folder / path.name)


def _write_new(folder: Path, config: PaliGemmaConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write what transformers 4.48 wants beside the weights: generation, pictures, tokenizer."""
    vision, text = (getattr(config, f"{part}_config") for part in ("vision", "text"))
    ids = {key: getattr(config, key, None) or getattr(text, key) for key in ("bos_token_id", "eos_token_id")}
    pad_id = text.pad_token_id
    _dump(
        folder / "generation_config.json",
        {"_from_model_config": True, **ids, "pad_token_id": pad_id, "transformers_version": VERSION},
    )
    pictures = {
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": image_tokens(config, 1),
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": PROCESSOR,
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"height": vision.image_size, "width": vision.image_size},
    }
    _dump(folder / "preprocessor_config.json", pictures)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in _tokenizer_values(tokenizer).items():
        _dump(folder / name, values)


def _tokenizer_values(tokenizer: PreTrainedTokenizerFast) -> dict[str, dict[str, Any]]:
    """The files beside ``tokenizer.json``, by name, as transformers 4.48 writes them."""
    flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
    added = {
        str(i): {"content": token.content, **{flag: getattr(token, flag) for flag in flags}}
        for i, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    known = tokenizer.get_vocab()
    special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    is_gemma = UNK in known and GEMMA_SPACE in known
    special |= {"unk_token": UNK} if is_gemma else {}  # Gemma's class adds one where there is none
    extra = [t["content"] for t in added.values() if t["special"] and t["content"] not in special.values()]
    base = tokenizer.vocab_size
    settings = {
        **({"add_bos_token": False, "add_eos_token": False} if is_gemma else {}),
        "added_tokens_decoder": added,
        "additional_special_tokens": extra,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
        "processor_class": PROCESSOR,
        "tokenizer_class": "GemmaTokenizer" if is_gemma else "PreTrainedTokenizerFast",
        **special,
    }
    return {
        "tokenizer_config.json": settings,
        "special_tokens_map.json": {"additional_special_tokens": extra, **special},
        "added_tokens.json": {token["content"]: int(i) for i, token in added.items() if int(i) >= base},
    }


def _write_processor(processor: Processor, source: Source, config: PaliGemmaConfig, folder: Path) -> None:
    statistics = processor.normalizer.statistics
    carried = folder / STATISTICS_FILE
    if not carried.is_file() or Statistics.load(carried).digest() != statistics.digest():
        statistics.save(carried)
    layout = processor.layout
    try:
        usual = build.published_processor(source.base, config, layout.tokenizer, statistics)
        told = checkpoint.describe(usual) == checkpoint.describe(processor)
    except UserError:  # other action dimensions, say
        told = False
    if not told:
        _dump(folder / POLICY_FILE, checkpoint.describe(processor))


def _dump(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
