"""What a reviewer decided about thoughts, one JSON line a decision, on disk before the reviewer goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dtvla.errors import UserError
from dtvla.locks import try_lock

Key = tuple[int, int]
"""Episode, by its place in the dataset, and frame within it."""

ACCEPT, EDIT, REJECT, UNDO = "accept", "edit", "reject", "undo"


@dataclass(frozen=True)
class Decision:
    """A decision about the thought of one frame.

    Attributes:
        episode: place among the dataset's episodes, from 0.
        frame: of the episode, from 0.
        decision: ``accept``, ``edit``, ``reject``, or ``undo``, which takes back what was decided before.
        thought: the text to use; "" where there is none to use.
        before: the text that was looked at.
        reviewer: a name.
        time: when, ISO 8601 with its offset from UTC.
    """

    episode: int
    frame: int
    decision: str
    thought: str
    before: str
    reviewer: str
    time: str

    def __post_init__(self) -> None:
        if not all(type(number) is int and number >= 0 for number in self.key):
            raise ValueError("episode and frame are not numbers from 0")
        texts = (self.decision, self.thought, self.before, self.reviewer, self.time)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a text is missing")
        if self.decision not in (ACCEPT, EDIT, REJECT, UNDO):
            raise ValueError(f"decision {self.decision!r} is unknown")
        if bool(self.thought) != (self.decision in (ACCEPT, EDIT)):
            raise ValueError(f"decision {self.decision!r} with the thought {self.thought!r}")
        if self.when.tzinfo is None:
            raise ValueError(f"time {self.time!r} has no offset from UTC")

    @property
    def key(self) -> Key:
        """The frame that it is about."""
        return self.episode, self.frame

    @property
    def when(self) -> datetime:
        """When it was made."""
        return datetime.fromisoformat(self.time)

    def concerns(self, thought: str) -> bool:
        """Whether it is about a frame that has this thought now: the one looked at, or the one it put there."""
        return thought in (self.before, self.thought)


def now() -> str:
    """The time of a decision that is made now."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def read_decisions(path: Path | str) -> dict[Key, Decision]:
    """Decisions that stand: the last of each frame, unless that took the others back.

    Raises:
        UserError: the file is missing, or a line of it is no decision. A last line that was cut short is left out.
    """
    return standing(read_last(Path(path)))


def read_last(path: Path) -> dict[Key, Decision]:
    """The last decision on each frame, undos included; errors as of :func:`read_decisions`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"decisions: {path} cannot be read ({error.strerror}); name a file that dtvla review wrote"
        ) from (None)
    return _last(path, content)


def standing(last: Mapping[Key, Decision]) -> dict[Key, Decision]:
    """The decisions among these that were not taken back."""
    return {key: decision for key, decision in last.items() if decision.decision != UNDO}


class DecisionLog:
    """The file that decisions are appended to; a context manager that keeps it for one process.

    Attributes:
        path: the file.
        last: the last decision on each frame, undos included.
    """

    def __init__(self, path: Path) -> None:
        """Open a file, or begin one; a last line that was cut short is taken off.

        Raises:
            UserError: another process is at it, it cannot be written, or a line is no decision.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab+", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            if not try_lock(self._file):
                raise UserError(
                    f"decisions: {path} is open in another review; end that, or choose another decisions=FILE"
                )
            self._file.seek(0)
            content = self._file.read()
            self.last = _last(path, content)
            self._file.truncate(content.rfind(b"\n") + 1)
            _sync_folder(path.parent)
        except OSError as error:
            self._file.close()
            raise self._unwritable(error) from error
        except UserError:
            self._file.close()
            raise

    def append(self, decisions: Iterable[Decision]) -> None:
        """Put decisions on disk: all of them, or none when this raises.

        Raises:
            UserError: the disk is full, or fails.
        """
        decisions = list(decisions)
        lines = memoryview("".join(f"{json.dumps(asdict(decision))}\n" for decision in decisions).encode())
        size = os.fstat(self._file.fileno()).st_size
        try:
            while lines:
                lines = lines[self._file.write(lines) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(size)  # or the next decision would be appended to half a line
            raise self._unwritable(error) from error
        self.last.update((decision.key, decision) for decision in decisions)

    def close(self) -> None:
        """Give up the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"decisions: {self.path} cannot be written ({error.strerror}); free space or choose another decisions=FILE"
        )


def _last(path: Path, content: bytes) -> dict[Key, Decision]:
    last = {}
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            record: dict[str, Any] = json.loads(line)
            decision = Decision(**record)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"decisions: line {number} of {path} is no decision ({error}); name a file that dtvla review wrote"
            ) from None
        last[decision.key] = decision
    return last


def _sync_folder(folder: Path) -> None:
    """Let a new file's name survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
