"""What a collection of demonstrations is made of: the request, its episodes, and the folders it lives in."""

from __future__ import annotations

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.data.staging import EpisodeSource, dropped_path, episode_path, read_source
from dtvla.errors import UserError
from dtvla.locks import try_lock

if TYPE_CHECKING:
    from dtvla.data.takes import Clock, Take
    from dtvla.sim.env import LiberoEnv

COLLECTION_FILE = "meta/collection.json"


@dataclass(frozen=True, kw_only=True)
class CollectionRequest(ABC):
    """Everything that determines the content of a dataset; a subclass for each source of episodes.

    Attributes:
        suite, task_ids: LIBERO tasks.
        render, image_size, settle_steps: of the environment.
    """

    suite: str
    task_ids: tuple[int, ...]
    render: str
    image_size: int
    settle_steps: int

    def __post_init__(self) -> None:
        """Refuse tasks named twice and an environment without pictures."""
        if self.image_size < 1:
            raise UserError(f"image_size: found {self.image_size}; use 1 or more")
        if not self.task_ids or len(set(self.task_ids)) != len(self.task_ids):
            raise UserError(f"env.task_ids: found {list(self.task_ids)}; name at least one task, each once")
        if self.render == "none":
            raise UserError("env.render: found none; demonstrations need pictures, use full or draft")

    @abstractmethod
    def plans(self) -> list[EpisodePlan]:
        """All episodes, task by task, in the order of the dataset."""

    @abstractmethod
    def perform(self, env: LiberoEnv, plan: EpisodePlan, clock: Clock) -> Take:
        """Perform one episode in an environment of its task."""

    def environment(self) -> dict[str, Any]:
        """Settings of the environment, besides suite and task."""
        return {"render": self.render, "image_size": self.image_size, "settle_steps": self.settle_steps}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; collections with equal ones make the same dataset."""
        return json.loads(json.dumps(asdict(self), default=str))


@dataclass(frozen=True)
class EpisodePlan:
    """One episode to be recorded.

    Attributes:
        episode_index: its place among all plans, and in the dataset when no earlier one is dropped.
        task_id, number: the task, and which of the task's episodes this is.
        init_state: where the expert begins.
        demo: name of the recording that is replayed.
    """

    episode_index: int
    task_id: int
    number: int
    init_state: int | None = None
    demo: str | None = None


class Workspace:
    """The folder ``<root>.partial``, in which finished episodes wait for the rest, and the way from there to root."""

    def __init__(self, root: Path, request: CollectionRequest) -> None:
        """Name the folders; nothing is touched yet."""
        self.root, self.request = root, request
        self.folder = Path(f"{root}.partial")
        self.assembly = self.folder / "dataset"

    def finished(self) -> dict[str, Any] | None:
        """The stored record of a dataset at ``root`` that answers the request; None when there is none.

        Raises:
            UserError: something else is there. It is never overwritten.
        """
        if not self.root.exists() or (self.root.is_dir() and not any(self.root.iterdir())):
            return None
        try:
            record = json.loads((self.root / COLLECTION_FILE).read_text())
            found = record["request"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"root: {self.root} exists and was not made by collect; set root=... to a new folder"
            ) from None
        self._require_equal(found, f"root: {self.root} holds a finished collection")
        return dict(record)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hold the folder for this process: create it or continue it, and clear what an interrupted run left half done.

        Raises:
            UserError: another process collects here, or the folder belongs to another request.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            if not try_lock(lock):
                raise UserError(f"root: another process is collecting into {self.folder}; wait for it to end")
            path = self.folder / "request.json"
            if path.exists():
                self._require_equal(json.loads(path.read_text()), f"root: {self.folder} was begun")
            else:
                temporary = path.with_suffix(".tmp")
                temporary.write_text(json.dumps(self.request.to_dict(), indent=2) + "\n")
                os.replace(temporary, path)
            for leftover in self.folder.glob("*.tmp"):
                leftover.unlink(missing_ok=True)
            shutil.rmtree(self.assembly, ignore_errors=True)
            yield

    def staged(self) -> dict[int, EpisodeSource]:
        """Finished and dropped episodes by index, in order; a damaged file is removed, so that it is recorded again."""
        found = {}
        for plan in self.request.plans():
            for path in (episode_path(self.folder, plan.episode_index), dropped_path(self.folder, plan.episode_index)):
                if path.exists():
                    try:
                        found[plan.episode_index] = read_source(path)
                    except ValueError:
                        path.unlink()
        return found

    def publish(self) -> None:
        """Move the assembled dataset to ``root`` and remove the staged episodes."""
        os.replace(self.assembly, self.root)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _require_equal(self, found: dict[str, Any], what: str) -> None:
        wanted = self.request.to_dict()
        names = [name for name in wanted if found.get(name) != wanted[name]]
        if names:
            differences = ", ".join(f"{name}={found.get(name)} (asked: {wanted[name]})" for name in names)
            raise UserError(f"{what} with {differences}; ask for the same, set root=... or delete the folder")
