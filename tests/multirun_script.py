"""An entry point of the tests' own that every launcher can run, and what its jobs leave."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from dtvla import cli
from dtvla.jobs import Record, read_records

SCRIPT = """
import os, signal, time
from pathlib import Path
from dtvla import cli, jobs
from dtvla.errors import UserError

cli.config_dir = lambda: Path({conf!r})

@cli.entry({name!r})
def main(cfg):
{body}

main()
"""
JOB = """
    class Odd(Exception):
        def __init__(self, a, b):  # can't be unpickled
            super().__init__(f"{a} and {b}")
    print(f"this is job {cfg.x}, one of {jobs.jobs_at_a_time()} at a time", flush=True)
    print("command:", cli.command_line("demo"))
    if cfg.x == 2:
        raise UserError("x: found 2; choose another")
    if cfg.x == 3:
        raise Odd("a defect", "no more")
    if cfg.x == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if cfg.x == 6:
        raise SystemExit(143)
    if cfg.x == 7:
        return cfg.needed
    if cfg.x == 9:
        return float("nan")
    if cfg.x == 10:
        time.sleep(600)
    return (cfg.x - 0.3) ** 2
"""


def write_script(tmp_path: Path) -> Path:
    """A script whose jobs do what ``x`` says; it has the command-line settings of all entry points."""
    shipped, conf = cli.config_dir(), tmp_path / "conf"
    for group in ("cli", "paths"):
        shutil.copytree(shipped / group, conf / group)
    (conf / "sweep").mkdir()
    (conf / "kind").mkdir()
    for kind in ("a", "b"):
        (conf / "kind" / f"{kind}.yaml").write_text("{}\n")
    (conf / "demo.yaml").write_text(
        "defaults: [paths: default, cli: quiet, kind: a, _self_]\n"
        f"paths: {{root: {tmp_path}/out}}\nx: 1.0\ny: 0\nneeded: ???\n"
    )
    path = tmp_path / "demo.py"
    path.write_text(SCRIPT.format(conf=str(conf), name="demo", body=JOB))
    return path


def run(*command: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=280,
    )


def records(root: Path) -> list[Record]:
    """Of the latest multirun."""
    return read_records(max((root / "multirun").iterdir()))
