"""The journal of an annotation under way: every answer is on disk at once, so that the same command continues it.

Answers lie in ``<output>.partial/answers.jsonl`` in the order in which they came. Each is kept with the whole job that
it answers; it counts again only where exactly that is asked again, so checks and policies may change between two runs.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import fsum
from pathlib import Path
from typing import IO, Any

from dtvla.cot.annotator import Answer, Job
from dtvla.errors import UserError
from dtvla.locks import try_lock

FILE, REQUEST = "answers.jsonl", "request.json"


class Answers:
    """All answers of one annotator about one dataset."""

    def __init__(self, folder: Path, file: IO[bytes]) -> None:
        """Read what is there; made by :meth:`open`."""
        self.folder, self._file = folder, file
        self._by_episode: defaultdict[int, dict[Job, str]] = defaultdict(dict)
        self._numbers: defaultdict[str, list[float]] = defaultdict(list)  # of the facts
        self._texts: dict[str, str] = {}  # many frames share a text; it is held once
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)  # a line that a kill cut short
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                job = Job(int(row["frame"]), int(row["attempt"]), tuple(row["complaints"]))
                self._keep(int(row["episode"]), job, Answer(str(row["text"]), dict(row["facts"])))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"output: {folder / FILE} is damaged in line {number} ({error!r}); remove that line, or the folder"
                ) from None

    @classmethod
    @contextmanager
    def open(cls, folder: Path, request: Mapping[str, Any]) -> Iterator[Answers]:
        """Hold the folder for this process; it is made, or continued.

        Args:
            folder: of the annotation under way.
            request: what answers depend on, plain JSON values: the dataset and the annotator.

        Raises:
            UserError: another process is at it, it belongs to another dataset or annotator, or it is damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / FILE).open("ab+", buffering=0) as file:
            if not try_lock(file):
                raise UserError(f"output: another process is annotating into {folder}; wait for it to end")
            path = folder / REQUEST
            if path.exists():
                refuse_others(f"output: {folder} was begun", _read(path), request)
            else:
                temporary = path.with_suffix(".tmp")
                temporary.write_text(json.dumps(request, indent=2) + "\n")
                os.replace(temporary, path)
            answers = cls(folder, file)
            try:
                yield answers
            except BaseException:
                if any(answers._by_episode.values()):
                    print(f"answers are kept in {folder}; the same command goes on from there", file=sys.stderr)
                raise

    def of(self, episode: int) -> Mapping[Job, str]:
        """Texts of an episode by job; it grows with :meth:`append`."""
        return self._by_episode[episode]

    def append(self, episode: int, jobs: Sequence[Job], answers: Sequence[Answer]) -> None:
        """Put answers on disk."""
        lines = []
        for job, answer in zip(jobs, answers, strict=True):
            row = {"episode": episode, "frame": job.frame, "attempt": job.attempt, "complaints": job.complaints}
            lines.append(json.dumps({**row, "text": answer.text, "facts": dict(answer.facts)}) + "\n")
        content = "".join(lines).encode()
        before = os.fstat(self._file.fileno()).st_size
        try:
            while content:
                content = content[self._file.write(content) :]
            os.fsync(self._file.fileno())
        except OSError:  # a full disk: half a line would spoil what is appended to it
            self._file.truncate(before)
            raise
        for job, answer in zip(jobs, answers, strict=True):
            self._keep(episode, job, answer)

    def totals(self) -> dict[str, float]:
        """Sums of the facts that are numbers, such as tokens and cost, and the number of answers."""
        sums = {name: fsum(self._numbers[name]) for name in sorted(self._numbers)}  # exact: in any order the same
        return {"answers": sum(map(len, self._by_episode.values())), **sums}

    def discard(self) -> None:
        """Remove the folder, when the dataset stands."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _keep(self, episode: int, job: Job, answer: Answer) -> None:
        if job not in self._by_episode[episode]:  # the first answer counts
            self._by_episode[episode][job] = self._texts.setdefault(answer.text, answer.text)
            for name, value in answer.facts.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._numbers[name].append(value)


def refuse_others(what: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise a :class:`UserError` that names the settings in which something begun or finished is another one."""
    old, new = _flat(found), _flat(json.loads(json.dumps(wanted)))
    names = [name for name in dict.fromkeys([*new, *old]) if old.get(name) != new.get(name)]
    if names:
        differences = ", ".join(f"{name}={old.get(name)} (asked: {new.get(name)})" for name in names)
        raise UserError(f"{what} with {differences}; ask for the same, set output=... or delete the folder")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"output: {path} is damaged; delete {path.parent}") from None
