"""A training checkpoint of several ranks: each writes its shards, in the background, and all read what they need.

Beside the checkpoints' names, which are links, ``shards/step-<n>-<random>/`` holds the shards as
``torch.distributed.checkpoint`` writes them, and ``meta.pt`` with everything that is no weight and no moment. A name
is set when its folder is complete, in one operation, so whatever a name leads to is complete. Folders without a name
are removed.
"""

from __future__ import annotations

import json
import os
import pickle
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dtvla.errors import UserError

SHARDS, META = "shards", "meta.pt"
WEIGHTS, MOMENTS, GROUPS = "state_dict", "optimizer", "optimizer_groups"


class FolderWriter:
    """Writes the checkpoints of a training, one at a time, while it goes on. All ranks call it in the same order."""

    def __init__(self) -> None:
        """Start with nothing to write."""
        self._group: distributed.ProcessGroup | None = None
        self._future: Future[Any] | None = None
        self._folder = Path()
        self._names: dict[Path, dict[str, Any] | None] = {}

    def start(self, path: Path, tensors: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Wait for the checkpoint before; copy this one to main memory and begin to write it.

        Args:
            path: its name, which leads to it when it is complete.
            tensors: this rank's shards, nested.
            meta: the rest; rank 0 writes it.

        Raises:
            UserError: the checkpoint before was not written.
        """
        self.finish()
        if self._group is None:  # of its own: the training's operations come in between on the others
            self._group = distributed.new_group(backend="gloo")
        name = [f"step-{meta['global_step']:07d}-{secrets.token_hex(4)}"]
        distributed.broadcast_object_list(name, src=0, group=self._group)
        self._folder, self._names = path.parent / SHARDS / name[0], {path: None}
        if distributed.get_rank() == 0:
            with _explained(path):
                self._folder.mkdir(parents=True)
                write_file(self._folder / META, dict(meta))
        future: Any = dcp.async_save(dict(tensors), checkpoint_id=self._folder, process_group=self._group)
        self._future = future

    def name(self, path: Path, facts: dict[str, Any] | None = None) -> None:
        """Give the latest checkpoint another name, when it is complete; see :func:`set_name`."""
        self._names[path] = facts
        self.poll()

    def poll(self) -> None:
        """Set the names of a checkpoint that is complete by now; does not wait."""
        if self._future is None or (self._future.done() and self._future.exception() is None):
            self._publish()

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            UserError: it could not be, for example on a full disk; what was written before stays.
        """
        if self._future is not None:
            future, self._future = self._future, None
            with _explained(next(iter(self._names))):
                future.result()
            self._publish()

    def _publish(self) -> None:
        self._future = None
        if distributed.get_rank() == 0:
            for path, facts in self._names.items():
                set_name(path, self._folder, facts)
                remove_nameless(path.parent)
        self._names = {}


def set_name(path: Path, target: Path, facts: dict[str, Any] | None = None) -> None:
    """Let a name lead to a checkpoint, in place of what it led to before; never to nothing in between.

    Args:
        path: the name.
        target: a folder, which is linked to, or a file, which is shared (copied where the disk can't).
        facts: about it, for ``<name without .ckpt>.json``; None writes none.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    if target.is_dir():
        temporary.symlink_to(os.path.relpath(target.resolve(), path.parent.resolve()))
    else:
        try:
            os.link(target, temporary)
        except OSError:
            shutil.copyfile(target, temporary)
    os.replace(temporary, path)
    if facts is not None:
        temporary.write_text(json.dumps(facts, indent=2) + "\n")
        os.replace(temporary, path.with_suffix(".json"))


def remove_nameless(folder: Path) -> None:
    """Remove shards that no name in the folder leads to: replaced ones, and those of interrupted savings."""
    named = {link.resolve() for link in folder.iterdir() if link.is_symlink()}
    for shards in (folder / SHARDS).glob("*"):
        if shards.resolve() not in named:
            shutil.rmtree(shards, ignore_errors=True)


def write_file(path: Path, values: Any) -> None:
    """Write what ``torch.load(weights_only=True)`` reads, down to the disk itself."""
    with open(path, "wb") as file:
        torch.save(values, file)
        file.flush()
        os.fsync(file.fileno())


def read_meta(path: Path, **options: Any) -> dict[str, Any]:
    """Everything of a checkpoint but weights and moments; of a single file, everything.

    Args:
        path: folder or file.
        options: of ``torch.load``.

    Raises:
        UserError: the file is damaged.
    """
    try:
        file = path / META if path.is_dir() else path
        values: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, **options)
        _ = values["global_step"]
    except (RuntimeError, OSError, KeyError, ValueError, TypeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable checkpoint ({reason}); train under another name=...") from None
    return values


def read_shards(path: Path, part: str, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read weights or moments of a folder.

    Args:
        path: the folder.
        part: :data:`WEIGHTS` (by name) or :data:`MOMENTS` (by name, then by kind).
        own: this rank's shards, which are filled in place and together on all ranks; those that the folder lacks are
            left out. None reads whole tensors, in one process.

    Raises:
        UserError: files are missing or damaged.
    """
    with _explained(path, "not a readable checkpoint", "train under another name=..."):
        metadata = dcp.FileSystemReader(path).read_metadata()
        places: dict[str, tuple[str, ...]] = metadata.planner_data
        flat: dict[str, Tensor] = {}
        for key, stored in metadata.state_dict_metadata.items():
            if places[key][0] != part or not isinstance(stored, TensorStorageMetadata):
                continue
            if own is None:
                flat[key] = torch.empty(stored.size, dtype=stored.properties.dtype)
            elif (mine := _at(own, places[key][1:])) is not None:
                flat[key] = mine
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
            dcp.load(flat, checkpoint_id=path, no_dist=own is None)
    nested: dict[str, Any] = {}
    for key, tensor in flat.items():
        *parents, name = places[key][1:]
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = tensor
    return nested


def read_weights(path: Path) -> dict[str, Tensor]:
    """Whole weights of a checkpoint, folder or file, without a training; :class:`UserError` when it is damaged."""
    if path.is_dir():
        return read_shards(path, WEIGHTS)
    weights: dict[str, Tensor] = read_meta(path, mmap=True)[WEIGHTS]
    return weights


def by_name(numbered: Mapping[str, Any], names: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """State of an optimiser by the names of weights: (moments, groups).

    Args:
        numbered: from ``Optimizer.state_dict``.
        names: of the weights, in the optimiser's order.
    """
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in numbered["param_groups"]]
    return {names[i]: moments for i, moments in numbered["state"].items()}, groups


def numbered(moments: Mapping[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The inverse of :func:`by_name`, for ``Optimizer.load_state_dict``."""
    order = {name: i for i, name in enumerate(name for group in groups for name in group["params"])}
    return {
        "state": {order[name]: values for name, values in moments.items()},
        "param_groups": [{**group, "params": [order[name] for name in group["params"]]} for group in groups],
    }


def _at(values: Any, place: tuple[str, ...]) -> Any:
    for key in place:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


@contextmanager
def _explained(
    path: Path, what: str = "not saved", advice: str = "make room and continue with resume=true"
) -> Iterator[None]:
    """Name the checkpoint in errors of the disk and of torch."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        reason = _reason(error)
        raise UserError(f"{path}: {what} ({reason}); {advice}") from error
    except dcp.api.CheckpointException as error:  # which is no Exception
        reasons = "; ".join(f"rank {rank}: {_reason(failure[0])}" for rank, failure in error.failures.items())
        raise UserError(f"{path}: {what} ({reasons}); {advice}") from error


def _reason(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
