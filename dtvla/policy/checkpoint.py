"""A policy as one folder: weights, configuration, tokenizer, pictures and actions.

``config.json`` and ``model.safetensors`` are those of transformers' PaliGemma, ``tokenizer.json`` is a fast tokenizer,
and ``policy.json`` holds the rest: prompt, cameras, action bins, normalisation statistics with their digest, versions.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PaliGemmaConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from dtvla.data.images import ImagePipeline
from dtvla.data.normalization import ActionNormalizer, Statistics
from dtvla.errors import UserError
from dtvla.policy.layout import Layout, PromptTemplate
from dtvla.policy.model import HybridVLA, image_tokens
from dtvla.policy.policy import Policy
from dtvla.policy.processor import Processor
from dtvla.policy.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT_VERSION = 1
POLICY_FILE = "policy.json"
REQUIRED_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", POLICY_FILE)
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def save(policy: Policy, folder: Path | str, *, overwrite: bool = False) -> None:
    """Write a policy; the folder appears complete or not at all.

    Args:
        policy: what to write.
        folder: the new folder; its parents are made.
        overwrite: replace a policy that is there already.

    Raises:
        UserError: the folder exists and ``overwrite`` is off, or is something other than a policy.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise UserError(f"{folder}: exists already; choose another folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / POLICY_FILE).is_file():
        raise UserError(f"{folder}: exists and is not a policy; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _quietly_save(policy.model, temporary)
        policy.processor.layout.tokenizer.save_pretrained(temporary)
        (temporary / POLICY_FILE).write_text(json.dumps(_describe(policy.processor), indent=2) + "\n")
        os.chmod(temporary, 0o755)
        if folder.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            os.replace(folder, retired)
            os.replace(temporary, folder)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(
    folder: Path | str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    expect_statistics: Statistics | None = None,
) -> Policy:
    """Read a policy, in evaluation mode.

    Args:
        folder: as written by :func:`save`.
        device: where the model goes.
        dtype: of the weights.
        expect_statistics: of the data it shall be used with; None does not compare.

    Raises:
        UserError: files are missing or damaged, the format version is another one, or the statistics differ.
    """
    folder = Path(folder)
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    missing = [name for name in REQUIRED_FILES if name not in present]
    if not present & set(WEIGHT_FILES):
        missing.append(WEIGHT_FILES[0])
    if missing:
        found = f"no {', '.join(missing)}" if present else "no such folder, or an empty one"
        raise UserError(f"checkpoint {folder}: {found}; give the folder of a saved policy")
    description = _read_json(folder / POLICY_FILE)
    if description.get("format_version") != FORMAT_VERSION:
        other = description.get("format_version")
        raise UserError(
            f"checkpoint {folder}: format version {other}, this dtvla reads {FORMAT_VERSION}; "
            "use the dtvla that wrote it or train again"
        )
    config = read_config(folder)
    try:
        normalizer = ActionNormalizer.from_dict(description["normalizer"], source=f"{folder / POLICY_FILE}")
        images = ImagePipeline.from_dict(description["images"])
        layout = _layout(description, Vocabulary.from_config(config.to_dict()), read_tokenizer(folder), config)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {folder}: {POLICY_FILE} is damaged ({error!r}); copy it again") from None
    if expect_statistics is not None and expect_statistics.digest() != normalizer.statistics.digest():
        raise UserError(
            f"checkpoint {folder}: trained with other normalisation statistics ({normalizer.statistics.digest()[:12]}) "
            f"than this dataset's ({expect_statistics.digest()[:12]}); use its own dataset, or train again"
        )
    model = read_model(folder, config, dtype)
    model.to(torch.device(device))  # type: ignore[arg-type]  # transformers' decorator hides the signature
    return Policy(model, Processor(layout, images, normalizer))


def read_model(folder: Path, config: PaliGemmaConfig, dtype: torch.dtype) -> HybridVLA:
    """Read weights in transformers' format (safetensors only), in evaluation mode.

    Raises:
        UserError: the weights are damaged, or some are missing, superfluous or of another shape.
    """
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    read: Any = HybridVLA.from_pretrained
    try:
        model, report = read(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many kinds for damaged files; none is meant for users
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"checkpoint {folder}: the weights can't be read ({first}); copy the folder again") from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    wrong = [f"{kind.replace('_', ' ')}: {sorted(map(str, report[kind]))[:3]}" for kind in report if report[kind]]
    if wrong:
        raise UserError(
            f"checkpoint {folder}: weights do not fit config.json ({'; '.join(wrong)}); copy the folder again"
        )
    assert isinstance(model, HybridVLA)
    return model.eval()


def read_config(folder: Path) -> PaliGemmaConfig:
    """Read ``config.json``; :class:`UserError` when it is damaged."""
    try:
        return PaliGemmaConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {folder}: config.json is damaged ({error}); copy it again") from None


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Read a fast tokenizer; no code of the folder runs. :class:`UserError` when it is damaged."""
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"checkpoint {folder}: tokenizer.json is damaged ({error}); copy it again") from None
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


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


def _describe(processor: Processor) -> dict[str, Any]:
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


def _quietly_save(model: PreTrainedModel, folder: Path) -> None:
    """``save_pretrained`` without its progress bar."""
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
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
