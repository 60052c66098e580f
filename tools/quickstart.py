"""The whole project on one LIBERO task: demonstrations, training, evaluation, report. ``make quickstart`` runs this.

Every phase is an ordinary ``dtvla`` command, printed before it runs. Each re-uses what it finished before, so the same
command continues after an interruption. The wall time of every phase is added to ``<out>/timings.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

EVALUATION_STATES = "[" + ",".join(str(state) for state in range(30, 50)) + "]"
"""Demonstrations use the init states 0 to 29 only."""


@dataclass(frozen=True)
class Phase:
    """One command: what it is for, and the words after ``python -m``."""

    name: str
    purpose: str
    words: list[str]


def phases(suite: str, task: int, episodes: int, out: Path) -> list[Phase]:
    """Return the commands in their order.

    Args:
        suite: LIBERO suite.
        task: number of the task in the suite.
        episodes: how many demonstrations to collect.
        out: folder of all results; ``DTVLA_ROOT`` of the commands.
    """
    data, run = out / "data" / f"{suite}_{task}", out / "runs" / "quickstart"
    states = f"init_states={EVALUATION_STATES}"
    scene = [f"env={suite}", f"env.task_ids=[{task}]", "env.render=draft"]
    return [
        Phase(
            "demonstrations",
            f"a scripted expert solves the task {episodes} times in the simulator",
            ["dtvla.collect", *scene, f"episodes={episodes}", f"root={data}"],
        ),
        Phase(
            "training",
            "a nano policy learns to think, then act",
            ["dtvla.train", "+experiment=quickstart", *scene, f"data.root={data}", "resume=true"],
        ),
        Phase(
            "evaluation",
            "20 init states that no demonstration used, with thoughts, without, and with random ones",
            ["dtvla.evaluate", "-m", "cot=think,mask,random", *scene, f"checkpoint={run / 'policy'}", states],
        ),
        Phase(
            "report",
            "one page with success rates, curves, thoughts and videos",
            ["dtvla.report", str(run), f"output={out / 'report.md'}"],
        ),
    ]


def save_times(path: Path, seconds: dict[str, float]) -> None:
    """Add this run's wall times in seconds to the list in ``path`` (a JSON file), replacing the file in one step."""
    runs = json.loads(path.read_text()) if path.is_file() else []
    rounded = {name: round(value, 1) for name, value in seconds.items()}
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - sum(seconds.values())))
    runs.append({"started": started, "seconds": rounded, "total_seconds": round(sum(seconds.values()), 1)})
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(runs, indent=2) + "\n")
    os.replace(temporary, path)


def main() -> int:
    """Run the phases; stop at the first that fails and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--began", type=float, default=time.time(), help="when set-up began (seconds since 1970)")
    # What is learnt by default stands in the Makefile alone.
    parser.add_argument("--suite", required=True)
    parser.add_argument("--task", type=int, required=True)
    parser.add_argument("--episodes", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    seconds = {"set-up": time.time() - options.began}
    environment = {**os.environ, "DTVLA_ROOT": str(options.out)}
    todo = phases(options.suite, options.task, options.episodes, options.out)
    code = 0
    for number, phase in enumerate(todo, start=1):
        print(f"\n[{number}/{len(todo)}] {phase.name}: {phase.purpose}", flush=True)
        print(f"$ DTVLA_ROOT={options.out} python -m {shlex.join(phase.words)}", flush=True)
        began = time.monotonic()
        try:
            code = subprocess.run([sys.executable, "-m", *phase.words], env=environment).returncode
        except KeyboardInterrupt:
            code = 130
        seconds[phase.name] = time.monotonic() - began
        if code != 0:
            print(f"\nquickstart stopped in '{phase.name}'; the same command continues there", file=sys.stderr)
            break
    save_times(options.out / "timings.json", seconds)
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"\n{times}; together {sum(seconds.values()) / 60:.1f} min")
    return code


if __name__ == "__main__":
    sys.exit(main())
