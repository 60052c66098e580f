"""Weights in files: safetensors, one or many, under any of the names that transformers has given PaliGemma's modules.

Names on disk differ by the version that wrote them (4.48: ``language_model.model.layers...``, 5: with ``model.`` in
front, ``vision_tower`` with or without ``vision_model``); in memory they are those of transformers 5.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PaliGemmaConfig, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from dtvla.errors import UserError
from dtvla.policy.hub import INDEX_FILE, WEIGHTS_FILE
from dtvla.policy.model import HybridVLA

HEAD, EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
MODULES = (  # spelling on disk -> name in memory
    (re.compile(r"^(model\.)?(language_model\.)?lm_head\."), "lm_head."),
    (re.compile(r"^(model\.)?language_model\.(model\.)?"), "model.language_model."),
    (re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"), "model.vision_tower."),
    (re.compile(r"^(model\.)?multi_modal_projector\."), "model.multi_modal_projector."),
)
PUBLISHED = (  # name in memory -> transformers 4.48
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^model\.vision_tower\."), "vision_tower.vision_model."),
    (re.compile(r"^model\."), ""),
)
NAMED_AT_MOST = 5  # weights in one error message


def module_name(name: str) -> str:
    """The name in memory of a weight on disk; unknown names stay."""
    return _renamed(name, MODULES)


def published_name(name: str) -> str:
    """The name in transformers 4.48 of a weight in memory."""
    return _renamed(name, PUBLISHED)


def find_weights(folder: Path) -> dict[str, Path]:
    """Which file holds which weight, by the names on disk.

    Raises:
        UserError: a file is absent or damaged.
    """
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    try:
        places = {str(name): folder / str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"checkpoint {folder}: {index.name} is damaged ({error!r}); copy it again") from None
    absent = sorted({path.name for path in places.values() if not path.is_file()})
    if absent:
        raise UserError(f"checkpoint {folder}: no {', '.join(absent)}, which {index.name} names; copy the folder again")
    return places


def read_model(
    folder: Path, config: PaliGemmaConfig, dtype: torch.dtype | None, device: str | torch.device = "cpu"
) -> HybridVLA:
    """Read a model, in evaluation mode; the global random state is untouched.

    Args:
        folder: holds the weights.
        config: of the model.
        dtype: of the weights in memory; None keeps what is stored, weight by weight.
        device: where they go, one by one.

    Raises:
        UserError: a file is absent or damaged, or weights are missing, superfluous or of another shape.
    """
    with no_init_weights():
        model = HybridVLA(config)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    places = find_weights(folder)
    names = {name: module_name(name) for name in places}
    tied = bool(config.tie_word_embeddings)
    optional = {HEAD} if tied else set()
    _check_names(folder, expected, names, optional)
    weights: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files = {path: stack.enter_context(_open(path)) for path in sorted(set(places.values()))}
        _check_shapes(folder, expected, names, {name: files[path] for name, path in places.items()})
        for name, inner in names.items():
            tensor = files[places[name]].get_tensor(name)
            weights[inner] = tensor.to(device=device, dtype=dtype or tensor.dtype)
    if tied and HEAD in weights and not torch.equal(weights.pop(HEAD), weights[EMBEDDING]):
        raise UserError(
            f"checkpoint {folder}: the output layer (lm_head) differs from the embedding, but config.json ties them; "
            'add "tie_word_embeddings": false to its text_config if both were trained, else copy the weights again'
        )
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.to(torch.device(device))  # type: ignore[arg-type]  # the buffers; transformers' decorator hides the signature
    return model.eval()


def write_weights(weights: Mapping[str, Tensor], folder: Path, shard_size: str) -> None:
    """Write weights as transformers does: one file, or numbered shards and an index."""
    from huggingface_hub import split_torch_state_dict_into_shards

    pattern = WEIGHTS_FILE.replace(".safetensors", "{suffix}.safetensors")
    plan = split_torch_state_dict_into_shards(dict(weights), filename_pattern=pattern, max_shard_size=shard_size)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: weights[name].detach().cpu().contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        os.chmod(folder / file, 0o644)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def read_config(folder: Path) -> PaliGemmaConfig:
    """Read ``config.json``; :class:`UserError` when it is damaged."""
    try:
        config = PaliGemmaConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {folder}: config.json is damaged ({error}); copy it again") from None
    text: Any = config.text_config  # transformers 4.48 ties by its setting, 5 by the outer one
    config.tie_word_embeddings = bool(config.tie_word_embeddings and text.tie_word_embeddings)
    return config


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Read a fast tokenizer; no code of the folder runs. :class:`UserError` when it is damaged."""
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise UserError(f"checkpoint {folder}: tokenizer.json is damaged ({error}); copy it again") from None
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


@contextmanager
def new_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` when the block ends well, and vanishes when it does not.

    Args:
        folder: its parents are made.
        replace: whether an existing folder gives way.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        if replace and folder.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
            os.replace(folder, retired)
            os.replace(temporary, folder)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _renamed(name: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str:
    return next((pattern.sub(new, name, count=1) for pattern, new in rules if pattern.match(name)), name)


@contextmanager
def _open(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"checkpoint {path.parent}: {path.name} can't be read ({error}); copy it again") from None


def _check_names(
    folder: Path, expected: Mapping[str, tuple[int, ...]], names: Mapping[str, str], optional: set[str]
) -> None:
    found = Counter(names.values())
    missing = [name for name in expected if name not in found and name not in optional]
    if any(published_name(inner) == name != inner for name, inner in names.items()):
        missing = [published_name(name) for name in missing]
    problems = [f"missing weights: {_few(missing)}"] if missing else []
    for what, wrong in (
        ("unknown weights", [name for name, inner in names.items() if inner not in expected]),
        ("weights stored twice", [name for name, inner in names.items() if found[inner] > 1]),
    ):
        problems += [f"{what}: {_few(wrong)}"] if wrong else []
    if problems:
        raise UserError(
            f"checkpoint {folder}: {'; '.join(problems)}; copy the whole folder again, or use the config.json that "
            "these weights were saved with"
        )


def _check_shapes(
    folder: Path, expected: Mapping[str, tuple[int, ...]], names: Mapping[str, str], files: Mapping[str, Any]
) -> None:
    held = {id(file): set(file.keys()) for file in files.values()}
    wrong = []
    for name, inner in names.items():
        if name not in held[id(files[name])]:
            wrong.append(f"{name} is not in the file that {INDEX_FILE} names")
        elif (shape := tuple(files[name].get_slice(name).get_shape())) != expected[inner]:
            wrong.append(f"{name} has shape {shape}, config.json says {expected[inner]}")
    if wrong:
        raise UserError(
            f"checkpoint {folder}: {_few(wrong, '; ')}; copy the whole folder again, or use the config.json that "
            "these weights were saved with"
        )


def _few(names: list[str], separator: str = ", ") -> str:
    more = len(names) - NAMED_AT_MOST
    return separator.join(names[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")
