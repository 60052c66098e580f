"""An evaluation under way: finished episodes are on disk at once, so that the same command continues a killed run.

What lies in the output folder::

    while episodes run   run.json (settings, provenance)  episodes.jsonl  episodes.rank1.jsonl ...
    when all are done    results.json                     episodes.jsonl

Each process of a run appends to a file of its own, in the order in which episodes finish. The first process joins them
in the order of the specifications. A step of this may be interrupted anywhere: episodes that lie in two files count
once, and ``results.json`` is written after everything that it stands for.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dtvla.errors import UserError
from dtvla.locks import try_lock
from dtvla.rollout.results import (
    EPISODES_FILE,
    EpisodeResult,
    Key,
    Results,
    episode_key,
    episode_line,
    read_episodes,
    write_results,
    write_text,
)
from dtvla.sim.pool import EpisodeSpec

RUN_FILE = "run.json"
RUN_FORMAT = "dtvla.run"


def refuse_other_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise a :class:`UserError` that names the settings in which the run at `path` is another one."""
    differences = [name for name in wanted if found.get(name) != wanted[name]]
    if differences:
        raise UserError(
            f"output: {path} holds another run (other {', '.join(differences)}) and is not overwritten; "
            "choose another output=FOLDER"
        )


def unfinished_run(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """Provenance of the run with these settings that was begun in the folder; None when none was.

    Raises:
        UserError: the folder is a file, belongs to a run with other settings, or holds episodes of unknown origin.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {folder} is a file; choose another output=FOLDER")
    path = folder / RUN_FILE
    if not path.is_file():
        strange = [part for part in _parts(folder) if part.stat().st_size]
        if strange:
            raise UserError(f"output: {strange[0]} belongs to no known run; choose another output=FOLDER")
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        found, provenance = dict(run["settings"]), dict(run["provenance"])
        known = run["format"] == RUN_FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"output: {path} is damaged ({error!r}); choose another output=FOLDER") from None
    if not known:
        raise UserError(f"output: {path} was not written by dtvla evaluate; choose another output=FOLDER")
    refuse_other_settings(path, found, settings)
    return provenance


def begin_run(folder: Path, settings: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Mark the folder as that of this run.

    Raises:
        UserError: it cannot be written.
    """
    document = {"format": RUN_FORMAT, "settings": settings, "provenance": provenance}
    write_text(folder / RUN_FILE, json.dumps(document, indent=1, allow_nan=False) + "\n")


def kept_episodes(folder: Path) -> dict[Key, EpisodeResult]:
    """All episodes that were finished in the folder so far.

    Raises:
        UserError: a file is damaged.
    """
    return {episode_key(episode): episode for part in _parts(folder) for episode in read_episodes(part)}


def finish_run(
    folder: Path, settings: dict[str, Any], provenance: dict[str, Any], specs: Sequence[EpisodeSpec]
) -> Results:
    """Join the episodes of all processes in the order of `specs`, write the results, and tidy up.

    Raises:
        RuntimeError: an episode is missing.
        UserError: a file is damaged, or the disk is full.
    """
    kept = kept_episodes(folder)
    missing = [str(spec) for spec in specs if episode_key(spec) not in kept]
    if missing:
        raise RuntimeError(f"{folder}: {len(missing)} episodes are not on disk, among them {missing[0]}")
    results = Results(settings, provenance, [kept[episode_key(spec)] for spec in specs])
    joined = [part for part in _parts(folder) if part.name != EPISODES_FILE]
    write_results(results, folder)
    for path in [folder / RUN_FILE, *joined]:
        path.unlink()
    return results


class Journal:
    """The file to which one process of a run appends its finished episodes; a context manager that locks it.

    Args:
        folder: of the run; made when missing.
        rank: number of the process.

    Raises:
        UserError: another process is at it, or the folder cannot be written.
    """

    def __init__(self, folder: Path, rank: int = 0):
        self.path = folder / (EPISODES_FILE if rank == 0 else f"{Path(EPISODES_FILE).stem}.rank{rank}.jsonl")

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("ab+", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            alone = try_lock(self.file)
        except OSError as error:  # a file system without locks
            self.file.close()
            raise self._unwritable(error) from error
        if not alone:
            self.file.close()
            raise UserError(
                f"output: another evaluation is writing {self.path} now; wait for it, or choose another output=FOLDER"
            )
        self.file.seek(0)
        content = self.file.read()
        self.file.truncate(content.rfind(b"\n") + 1)  # a line that a kill cut short
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if error is not None and self.path.stat().st_size:
            print(
                f"finished episodes are kept in {self.path}; the same command continues the evaluation", file=sys.stderr
            )

    def append(self, episode: EpisodeResult) -> None:
        """Put a finished episode on disk.

        Raises:
            UserError: the disk is full.
            ValueError: a number is NaN or infinite.
        """
        line = episode_line(episode).encode()
        try:
            while line:
                line = line[self.file.write(line) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"output: {self.path} cannot be written ({error.strerror}); free space or choose another output=FOLDER"
        )


def _parts(folder: Path) -> list[Path]:
    """Files with episodes, the first process's first."""
    stem, suffix = Path(EPISODES_FILE).stem, Path(EPISODES_FILE).suffix
    return [*folder.glob(EPISODES_FILE), *sorted(folder.glob(f"{stem}.rank*{suffix}"))]
