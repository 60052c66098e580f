"""Trajectories on disk: what a policy saw and sampled in one episode, for learning from it.

One safetensors file per episode, written under another name and renamed when the episode ends. The pictures of an
episode are most of the file (300 kB per decision of two cameras at 224 pixels) and are read one decision at a time.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dtvla.errors import UserError
from dtvla.rollout.results import EpisodeResult
from dtvla.rollout.runner import episode_name
from dtvla.sim.pool import EpisodeSpec

if TYPE_CHECKING:
    from dtvla.policy.policy import Decision

FORMAT = "dtvla.trajectory"
VERSION = 1
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class DecisionRecord:
    """What the policy sampled at one decision.

    Attributes:
        step: policy steps taken before it.
        executed: steps of its chunk that were executed; the episode may end within a chunk.
        thought_ids: up to and including ``<action>``.
        thought_log_probs: of each id, at the temperature of sampling; 0 for forced ones.
        forced: ids at the end that the length cap decided.
        truncated: whether the cap closed the thought.
        bins_A: int64 (S * D,) bins of the action tokens, step by step.
        action_log_probs_A: float32 (S * D,), of each bin, at the temperature of sampling.
    """

    step: int
    executed: int
    thought_ids: list[int]
    thought_log_probs: list[float]
    forced: int
    truncated: bool
    bins_A: np.ndarray
    action_log_probs_A: np.ndarray


@dataclass(frozen=True)
class Trajectory:
    """One finished episode; its pictures stay on disk until they are asked for.

    Attributes:
        path: its file.
        spec: what it was made of.
        instruction: the task in words.
        success: the goal held at the last step.
        steps: policy steps taken.
        records: the decisions, in order.
    """

    path: Path
    spec: EpisodeSpec
    instruction: str
    success: bool
    steps: int
    records: list[DecisionRecord]

    def pixels(self, decision: int) -> np.ndarray:
        """What the model saw at a decision: uint8 (N, 3, H, W).

        Raises:
            IndexError: there is no such decision.
            UserError: the file cannot be read any more.
        """
        if not 0 <= decision < len(self.records):
            raise IndexError(f"decision {decision} of {len(self.records)}")
        try:
            with safe_open(self.path, framework="numpy") as file:
                pictures: np.ndarray = file.get_slice("pixels")[decision : decision + 1]
        except (OSError, SafetensorError) as error:
            raise _damaged(self.path, error) from error
        return pictures[0]


def read_trajectory(path: Path) -> Trajectory:
    """Read an episode, all but its pictures.

    Raises:
        UserError: the file is missing, damaged, or of another format.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["episode"])
            if (facts["format"], facts["version"]) != (FORMAT, VERSION):
                raise ValueError(f"{facts['format']} {facts['version']} instead of {FORMAT} {VERSION}")
            arrays = {name: file.get_tensor(name) for name in file.keys() if name != "pixels"}  # noqa: SIM118
            pictures = file.get_slice("pixels").get_shape()
        records = _records(arrays, int(facts["steps"]))
        if len(records) != pictures[0]:
            raise ValueError(f"pictures of {pictures[0]} decisions for {len(records)}")
        spec = EpisodeSpec(**facts["spec"])
        return Trajectory(path, spec, str(facts["instruction"]), bool(facts["success"]), int(facts["steps"]), records)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, IndexError) as error:
        raise _damaged(path, error) from error


class TrajectoryWriter:
    """Writes ``<folder>/<episode name>.safetensors`` when an episode ends; a recorder of the runner.

    Only the episodes under way are in memory.
    """

    def __init__(self, folder: Path) -> None:
        """Write into a folder, which is made with the first file."""
        self.folder = folder
        self._under_way: dict[EpisodeSpec, list[tuple[int, Decision]]] = {}

    def decided(self, spec: EpisodeSpec, step: int, decision: "Decision") -> None:
        """Keep a decision of an episode until that ends.

        Args:
            spec: of the episode.
            step: policy steps taken in it so far.
            decision: with pictures, and log-probabilities of all its tokens.

        Raises:
            ValueError: the decision lacks some of that; a thought that was not decoded has no log-probabilities.
        """
        if decision.pixels_NCHW is None or len(decision.thought_log_probs) != len(decision.thought_ids):
            raise ValueError(f"{spec}: only what a model saw, thought and chose itself is recorded")
        if len(decision.action_log_probs_A) != len(decision.action_bins_A):
            raise ValueError(f"{spec}: {decision.action_log_probs_A.shape} log-probabilities of action tokens")
        own = replace(decision, pixels_NCHW=decision.pixels_NCHW.copy())  # a view would keep those of the whole batch
        self._under_way.setdefault(spec, []).append((step, own))

    def finished(self, spec: EpisodeSpec, result: EpisodeResult) -> None:
        """Write the episode.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        decisions = self._under_way.pop(spec)
        facts = {
            **{"format": FORMAT, "version": VERSION, "spec": asdict(spec), "instruction": result.instruction},
            **{"success": result.success, "steps": result.steps},
        }
        metadata = {"episode": json.dumps(facts, allow_nan=False)}
        path = self.folder / f"{episode_name(spec)}{SUFFIX}"
        write_whole(path, lambda temporary: save_file(_arrays(decisions), temporary, metadata))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file, down to the disk, or leave what was there.

    Args:
        path: of the file; its folder is made when it is missing.
        write: writes the file that it is given.

    Raises:
        UserError: the disk is full, or the folder cannot be written; names the file.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: can't be written ({error}); make room and continue with resume=true") from error


def _arrays(noted: "Sequence[tuple[int, Decision]]") -> dict[str, np.ndarray]:
    """The tensors of a file with K decisions: thoughts one behind the other, everything else stacked."""
    decisions = [decision for _, decision in noted]
    return {
        "pixels": np.stack([d.pixels_NCHW for d in decisions if d.pixels_NCHW is not None]),  # uint8 (K, N, 3, H, W)
        "step": np.array([step for step, _ in noted], np.int32),
        "thought_length": np.array([len(d.thought_ids) for d in decisions], np.int32),
        "thought_ids": np.array([i for d in decisions for i in d.thought_ids], np.int32),
        "thought_log_probs": np.array([p for d in decisions for p in d.thought_log_probs], np.float64),
        "forced": np.array([d.thought_forced for d in decisions], np.int32),
        "truncated": np.array([d.truncated for d in decisions], np.bool_),
        "bins": np.stack([d.action_bins_A for d in decisions]).astype(np.int32),  # (K, S * D)
        "action_log_probs": np.stack([d.action_log_probs_A for d in decisions]).astype(np.float32),
    }


def _records(arrays: Mapping[str, np.ndarray], steps: int) -> list[DecisionRecord]:
    """The inverse of :func:`_arrays`; a decision's chunk ran until the next one, or to the episode's end."""
    ends = arrays["thought_length"].cumsum().tolist()
    ids, log_probs = arrays["thought_ids"].tolist(), arrays["thought_log_probs"].tolist()
    begun = [*arrays["step"].tolist(), steps]
    if not ends or not len(ids) == len(log_probs) == ends[-1] or any(np.diff(begun) < 1):
        raise ValueError(f"{len(ids)} ids of thoughts with {ends[-1:]} tokens, decisions at steps {begun}")
    columns = zip(arrays["forced"], arrays["truncated"], arrays["bins"], arrays["action_log_probs"], strict=True)
    records = []
    for k, (forced, truncated, bins_A, action_log_probs_A) in enumerate(columns):
        own = slice(ends[k - 1] if k else 0, ends[k])
        records.append(
            DecisionRecord(
                step=begun[k],
                executed=begun[k + 1] - begun[k],
                thought_ids=ids[own],
                thought_log_probs=log_probs[own],
                forced=int(forced),
                truncated=bool(truncated),
                bins_A=bins_A.astype(np.int64),
                action_log_probs_A=action_log_probs_A,
            )
        )
    return records


def _damaged(path: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{path}: not a readable trajectory ({reason}); remove its folder to collect its groups again")
