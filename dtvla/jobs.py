"""One job of a multirun, in whichever process Hydra's launcher runs it: its name, its record and its log.

Each job leaves ``<hydra.sweep.dir>/<number>.json``, written when it begins and again when it ends, from which
:mod:`dtvla.multirun` tells at the end what became of all of them. A job that fails returns None instead of raising, so
that no launcher and no sweeper ends the other jobs with it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dtvla.errors import UserError
from dtvla.lifetime import end_with

if TYPE_CHECKING:
    from omegaconf import DictConfig

LONGEST_NAME = 80
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
State = Literal["running", "done", "failed", "stopped"]


@dataclass(frozen=True)
class Record:
    """What is known of a job.

    Attributes:
        number: of the job in its multirun, from 0 on.
        name: its settings that the multirun varies.
        state: running until it has ended; stopped when its process was told to end.
        value: what it returned, a success rate or a metric; None when that is no number.
        reason: why it failed.
        log: file with its output, beside the record; None where the launcher keeps or shows it.
    """

    number: int
    name: str
    state: State = "running"
    value: float | None = None
    reason: str | None = None
    log: str | None = None

    def write(self, folder: Path) -> None:
        """Write the record; of the processes that share a job, the first one does."""
        if any(os.environ.get(variable, "0") != "0" for variable in RANK_VARIABLES):
            return
        path = folder / f"{self.number}.json"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)


def read_records(folder: Path) -> list[Record]:
    """The records of a multirun in the order of its jobs."""
    found = [Record(**json.loads(path.read_text(encoding="utf-8"))) for path in _record_files(folder)]
    return sorted(found, key=lambda record: record.number)


def forget_records(folder: Path) -> None:
    """Remove what an earlier multirun left in a folder that the user named for both."""
    for path in _record_files(folder):
        path.unlink()


def _record_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("[0-9]*.json") if path.stem.isdecimal()]


def in_multirun() -> bool:
    """Whether this is a job of a multirun."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def by_joblib() -> bool:
    """Whether this is a job of a multirun in a process of joblib, beside others."""
    from hydra.core.hydra_config import HydraConfig

    return in_multirun() and "joblib" in str(HydraConfig.get().launcher._target_)


def varied() -> dict[str, str]:
    """The overrides that tell this job from the others of its multirun; none outside of a multirun."""
    from hydra.core.hydra_config import HydraConfig

    if not in_multirun():
        return {}
    cfg = HydraConfig.get()
    fixed = set(cfg.job.config.override_dirname.exclude_keys)
    pairs = (text.partition("=") for text in cfg.overrides.task)
    return {key: value for key, _, value in pairs if key not in fixed}


def name_of(overrides: Mapping[str, str]) -> str:
    """A name of overrides for folders, the same in every order, that needs no quotes on a command line.

    Long ones are cut and end in a digest of the overrides.
    """
    name = "+".join(sorted(f"{_plain(key.lstrip('+'))}_{_plain(value)}" for key, value in overrides.items()))
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(json.dumps(sorted(overrides.items())).encode()).hexdigest()
    return f"{name[:LONGEST_NAME]}-{digest[:8]}"


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text.replace("/", ".")).strip("_.")


def jobs_at_a_time() -> int:
    """How many jobs of this multirun share the machine, this one counted."""
    from hydra.core.hydra_config import HydraConfig

    return int(HydraConfig.get().launcher.n_jobs) if by_joblib() else 1


def run(function: Callable[[Any], Any], cfg: DictConfig) -> Any:
    """Run a job of a multirun and keep a record of it.

    Returns:
        What `function` returned; None when it failed, which a search counts as a failed trial.
    """
    from hydra.core.hydra_config import HydraConfig

    from dtvla.cli import explanation

    hydra = HydraConfig.get()
    folder, number = Path(hydra.sweep.dir), int(hydra.job.num)
    log = f"{number}.log" if by_joblib() else None  # several jobs on one screen could not be read
    record = Record(number, " ".join(f"{key}={value}" for key, value in varied().items()), log=log)
    record.write(folder)
    parent = parent_process()
    if log and parent is not None and parent.pid == os.getppid():  # else it outlives a command that was killed
        end_with(os.getppid())
    with _output_in(folder / log) if log else nullcontext():
        try:
            value = function(cfg)
            if isinstance(value, float) and not math.isfinite(value):  # of a training that has diverged
                raise UserError(f"the result is {value}")
        except Exception as error:
            reason = explanation(error)
            if reason is None:
                traceback.print_exc()
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            print(f"error: {reason}", file=sys.stderr)
            replace(record, state="failed", reason=reason).write(folder)
            return None
        except BaseException:
            replace(record, state="stopped").write(folder)
            raise
    replace(record, state="done", value=float(value) if isinstance(value, int | float) else None).write(folder)
    return value


@contextmanager
def _output_in(path: Path) -> Iterator[None]:
    """Send what this process and those that it starts print to a file."""
    kept = [os.dup(stream) for stream in (1, 2)]
    with path.open("ab") as file:
        _point(file.fileno(), file.fileno())
    try:
        yield
    finally:
        _point(*kept)
        for stream in kept:
            os.close(stream)


def _point(output: int, errors: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(output, 1)
    os.dup2(errors, 2)
