"""The recorded studies: what `make reproduce-STUDY` runs is what its README says, and every command of it exists."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from dtvla.analysis.ablation import compare_arms, success
from dtvla.analysis.frames import episode_frame, load_results, number_trainings, read_runs
from dtvla.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
STUDIES = sorted(path.parent.name for path in ROOT.glob("experiments/*/README.md"))
RECORDER = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
"""


def calls(study: str, folder: Path) -> list[list[str]]:
    """What a study's script runs, its loops and variables written out: programs and their words."""
    for program in ("dtvla", "python"):
        (folder / program).write_text(RECORDER)
        (folder / program).chmod(0o755)
    script = ["bash", "-euo", "pipefail", str(ROOT / "experiments" / study / "commands.sh")]
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls")}
    subprocess.run(script, env=environment, cwd=folder, check=True, timeout=60)
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def jobs(words: list[str]) -> list[list[str]]:
    """The command lines of a multirun's jobs; that of any other command is the only one."""
    if "-m" not in words:
        return [words]
    overrides = OverridesParser.create().parse_overrides([word for word in words if word != "-m"])
    return [job for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]


@pytest.mark.parametrize("study", STUDIES)
def test_every_command_of_a_study_composes(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = calls(study, tmp_path)
    assert found
    for program, command, *words in found:
        if program == "python":
            assert (ROOT / command).is_file(), command
            continue
        assert command in COMMANDS
        assert command != "train" or "resume=true" in words or "-m" in words, "make it go on where it was"
        for job in jobs(words):
            monkeypatch.setattr(sys, "argv", ["dtvla", *job, "--cfg", "job"])
            importlib.import_module(f"dtvla.{command}").main()
            assert "paths:\n  root:" in capsys.readouterr().out, job


@pytest.mark.parametrize("study", STUDIES)
def test_a_studys_script_is_its_readmes_command(study: str) -> None:
    readme = (ROOT / "experiments" / study / "README.md").read_text()
    assert f"```sh\n{(ROOT / 'experiments' / study / 'commands.sh').read_text()}```\n" in readme
    assert f"]({study}/README.md)" in (ROOT / "experiments" / "README.md").read_text()


def points(row: dict[str, Any]) -> str:
    """A difference with its interval as READMEs write it."""
    difference, low, high = (f"{100 * row[name]:+.1f}" for name in ("difference", "low", "high"))
    return f"{difference} ({low}, {high})"


def pooled(study: Path) -> pd.DataFrame:
    """All trainings of an ablation, with arms as its README names them."""
    trainings = sorted(study.glob("training_*"))
    runs = read_runs(trainings)
    frame = number_trainings(episode_frame(runs), runs, trainings)
    if frame["decoder"].nunique() > 1:
        frame["arm"] = frame["decoder"] + ", " + frame["cot"].map({"think": "thinks", "none": "no thought"})
    else:
        lengths = ", " + frame["cot.length"].astype(str) + " tokens"
        frame["arm"] = frame["cot"] + lengths.where(frame["cot"] == "random", "")
    return frame


@pytest.mark.parametrize(("name", "baseline"), [("cot_ablation", "think"), ("decoder_ablation", "hybrid, thinks")])
def test_an_ablations_numbers_are_those_of_its_episodes(name: str, baseline: str) -> None:
    study = ROOT / "experiments" / name
    frame, readme = pooled(study), (study / "README.md").read_text().replace("*", "").replace("`", "")
    lines = {
        line.split(" | ")[0].removeprefix("| "): line for line in readme.splitlines() if re.search(r" of \d+ \|", line)
    }
    for row in success(frame).to_dict("records"):
        rate, low, high = (f"{100 * row[end]:.1f}" for end in ("rate", "low", "high"))
        own = frame[frame["arm"] == row["arm"]].groupby("training")["success"]
        alone = {training: f"{won} of {size}" for training, won, size in own.agg(["sum", "size"]).itertuples()}
        cells = " | ".join(alone.get(training, "-") for training in sorted(frame["training"].unique()))
        solved = f"{row['successes']} of {row['episodes']}, {rate} %"
        assert f"| {cells} | {solved} | {low}-{high} % |" in lines[row["arm"]]
    for row in compare_arms(frame, baseline).to_dict("records"):
        assert f"| {points(row)} | {row['p_holm']:.2g} |" in lines[row["arm"]]


def test_grpos_numbers_are_those_of_its_episodes() -> None:
    study = ROOT / "experiments" / "grpo_gain"
    frame = load_results(study).assign(arm=lambda rows: rows["policy"])
    readme = (study / "README.md").read_text().replace("*", "")
    for _, part in frame.groupby("cot.temperature"):
        (row,) = compare_arms(part, "start420").to_dict("records")
        p = f"{row['p_value']:.2f}" if row["p_value"] > 0.01 else f"{row['p_value']:.0e}".replace("e-0", "e-")
        assert f"| {row['only_baseline']} : {row['only_arm']} | {points(row)} | {p} |" in readme


def test_make_names_the_studies_that_there_are() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "-o", "setup", "reproduce-nothing"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    (listed,) = re.findall(r"no such study; choose one of (.*)", done.stderr)
    assert set(listed.split()) == set(STUDIES)
