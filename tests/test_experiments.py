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


def points(row: dict[str, Any], form: str = "+.1f") -> str:
    """A difference with its interval as READMEs write it."""
    difference, low, high = (f"{100 * row[name]:{form}}" for name in ("difference", "low", "high"))
    return f"{difference} ({low}, {high})"


def test_the_cot_ablations_numbers_are_those_of_its_episodes() -> None:
    study = ROOT / "experiments" / "cot_ablation"
    frame, readme = load_results(study), (study / "README.md").read_text().replace("*", "")
    lines = {line.split("`")[1]: line for line in readme.splitlines() if line.startswith("| `")}
    for row in success(frame).to_dict("records"):
        solved, low, high = row["successes"], f"{100 * row['low']:.1f}".removesuffix(".0"), f"{100 * row['high']:.1f}"
        assert f"| {solved} | {low}-{high} % |" in lines[row["arm"]]
    for row in compare_arms(frame, "think").to_dict("records"):
        changes = f"{row['only_arm']} : {row['only_baseline']}"
        assert f"| {changes} | {points(row, '.0f')} | {row['p_holm']:.0e} |" in lines[row["arm"]]


def test_the_decoder_ablations_numbers_are_those_of_its_episodes() -> None:
    study = ROOT / "experiments" / "decoder_ablation"
    trainings, readme = sorted(study.glob("training_*")), (study / "README.md").read_text().replace("*", "")
    runs = read_runs(trainings)
    frame = number_trainings(episode_frame(runs), runs, trainings)
    frame["arm"] = frame["decoder"] + ", " + frame["cot"].map({"think": "thinks", "none": "no thought"})
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in readme.splitlines() if " of 60 |" in line}
    for row in success(frame).to_dict("records"):
        rate, low, high = (f"{100 * row[name]:.1f}" for name in ("rate", "low", "high"))
        alone = frame[frame["arm"] == row["arm"]].groupby("training")["success"].sum()
        cells = " | ".join(f"{solved} of 60" for solved in alone)
        assert f"| {cells} | {row['successes']} of {row['episodes']}, {rate} % | {low}-{high} % |" in lines[row["arm"]]
    for row in compare_arms(frame, "hybrid, thinks").to_dict("records"):
        p = f"{row['p_holm']:.2g}"
        assert f"| {points(row)} | {p} |" in lines[row["arm"]]


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
