"""A multirun (``-m``) from the process that was started: what it varies, and what became of its jobs.

Where and how the jobs run is the business of Hydra's launchers, which settings they get that of its sweepers. Each job
keeps a record (:mod:`dtvla.jobs`). Hydra itself stops at the first failed job and names no other.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from dtvla.cli import INTERRUPT_EXIT_CODE, USER_ERROR_EXIT_CODE
from dtvla.cores import usable_cores
from dtvla.errors import UserError
from dtvla.jobs import Record, forget_records, read_records

BEST_FILE = "optimization_results.yaml"  # written by hydra-optuna-sweeper
PLUGINS = {
    r"hydra/launcher=joblib": "hydra_joblib_launcher",
    r"hydra/launcher=submitit_.*": "hydra_submitit_launcher",
    r"hydra/sweeper=optuna|\+sweep=.*": "hydra_optuna_sweeper",
}
MEANINGS = {"running": "no end", "done": "done", "failed": "failed", "stopped": "stopped"}
LOST = "killed, or out of memory or time"
NO_END = f"{LOST}, or it still runs elsewhere"

_begun: list[tuple[Path, int]] = []  # folder of records; how many jobs there will be, 0: a search, which may end early


class Multirun(Callback):
    """Prepares a multirun; Hydra calls it in the process that was started, before any job."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Tell the jobs which settings vary and how many of them run at a time."""
        try:
            self._prepare(config)
        except Exception:  # Hydra would only warn, and the jobs would write into other folders than they should
            traceback.print_exc()
            raise SystemExit(1) from None

    @staticmethod
    def _prepare(config: DictConfig) -> None:
        sweeper, launcher = config.hydra.sweeper, config.hydra.launcher
        search = "n_trials" in sweeper
        folder = Path(str(config.hydra.sweep.dir))
        _begun.append((folder, 0))
        forget_records(folder)
        (folder / BEST_FILE).unlink(missing_ok=True)
        given = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        task: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)  # job.num is not known
        settings = {o.get_key_element(): o for o in parser.parse_overrides([*given, *task])}
        varied = [setting for setting in settings.values() if setting.is_sweep_override()]
        jobs = int(sweeper.n_trials) if search else math.prod(len(list(v.sweep_string_iterator())) for v in varied)
        fixed = [key for key, setting in settings.items() if not setting.is_sweep_override()]
        told = [f"hydra.job.config.override_dirname.exclude_keys={fixed}"]
        with read_write(config), open_dict(config):
            if "n_jobs" in launcher:  # of joblib; below 0 it counts down from all cores
                most = launcher.n_jobs if launcher.n_jobs > 0 else max(1, usable_cores() + 1 + launcher.n_jobs)
                launcher.n_jobs = min(most, jobs)
                told.append(f"hydra.launcher.n_jobs={launcher.n_jobs}")
            config.hydra.overrides.hydra.extend(told)
        if "submitit" in str(launcher._target_):
            _go_on_without_lost_jobs(folder, fixed)
        if not search:
            _begun[-1] = (folder, jobs)
        logging.getLogger("hydra_plugins").setLevel(logging.ERROR)  # a failed trial is told below, with its reason


def _go_on_without_lost_jobs(folder: Path, fixed: Sequence[str]) -> None:
    """Let submitit's launcher wait for all jobs although one is lost, of which it stops at the first.

    Args:
        folder: of the records.
        fixed: settings that are the same in all jobs.
    """
    from hydra.core.utils import JobReturn, JobStatus
    from submitit import Job
    from submitit.core.utils import UncompletedJobError

    results = Job.results

    def results_or_none(job: Job[Any]) -> list[Any]:
        try:
            return results(job)
        except UncompletedJobError:
            overrides, _, number, *_ = job.submission().args  # of hydra-submitit-launcher's __call__
            name = " ".join(text for text in overrides if text.partition("=")[0] not in fixed)
            reason = f"it was lost: {LOST} (state {job.state})"
            log = os.path.relpath(job.paths.stderr, folder)
            Record(number, name, state="failed", reason=reason, log=log).write(folder)
            return [JobReturn(status=JobStatus.COMPLETED)]  # that returns nothing, as jobs do that have failed

    Job.results = results_or_none  # type: ignore[method-assign, assignment]


@contextmanager
def told() -> Iterator[None]:
    """Tell at the end what became of the jobs, when the body was a multirun.

    Raises:
        SystemExit: a job did not succeed; code 2.
    """
    _begun.clear()
    try:
        yield
    except KeyboardInterrupt:
        _succeeded()
        raise SystemExit(INTERRUPT_EXIT_CODE) from None
    except SystemExit as end:
        if not _succeeded() and end.code in (None, 0, 1):  # 1: Hydra's own, after its message
            raise SystemExit(USER_ERROR_EXIT_CODE) from None
        raise
    else:
        if not _succeeded():
            raise SystemExit(USER_ERROR_EXIT_CODE)


def _succeeded() -> bool:
    """Print what became of the jobs, and return whether all have succeeded; True when none has begun."""
    if not _begun:
        return True
    folder, planned = _begun[-1]
    records = read_records(folder)
    if not records:
        return True
    jobs = max(len(records), planned)
    done = sum(record.state == "done" for record in records)
    if jobs > 1 or done < jobs:
        print(f"\nmultirun: {done} of {jobs} jobs done; records in {folder}")
        for line in _lines(records):
            print(line)
    if len(records) < jobs:
        print(f"      not begun: {jobs - len(records)}")
    if (folder / BEST_FILE).is_file():
        print(_best(folder / BEST_FILE))
    if done < jobs:
        print("Once that is mended, the same command runs what is missing; finished results stay.", file=sys.stderr)
    return done == jobs


def _lines(records: Sequence[Record]) -> Iterator[str]:
    for record in records:
        state = MEANINGS[record.state]
        outcome = "" if record.value is None else f"  {record.value:.6g}"
        yield f"  {record.number:3d} {state:8s}{record.name or 'the only job'}{outcome}"
        reason = NO_END if record.state == "running" else record.reason
        if reason:
            yield f"      {' ' * 8}{reason}" + (f" (log: {record.log})" if record.log else "")


def _best(path: Path) -> str:
    import yaml

    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings = " ".join(f"{key}={value}" for key, value in found["best_params"].items())
    return f"best: {found['best_value']:.6g} with {settings}"


def check_plugins(arguments: Sequence[str]) -> None:
    """Refuse a launcher or sweeper on the command line whose package is not installed, before Hydra can't find it.

    Raises:
        UserError: names the package.
    """
    for argument in arguments:
        for pattern, package in PLUGINS.items():
            if re.fullmatch(pattern, argument) and not _installed(f"hydra_plugins.{package}"):
                raise UserError(
                    f"{argument}: the package {package.replace('_', '-')} is not installed; "
                    "install dtvla's extra for sweeps, pip install -e '.[sweep]'"
                )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # no plugin at all
        return False
