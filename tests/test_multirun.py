"""Multiruns through every launcher: what failed is named, what did not is kept, and what is missing is made up for."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from forked import Command
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from multirun_script import records, run, write_script
from omegaconf import OmegaConf
from test_evaluate import FAST, save_policy
from training_data import TINY, write_demonstrations

from dtvla import cli, multirun
from dtvla.jobs import LONGEST_NAME, in_multirun, name_of, read_records


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return write_script(tmp_path)


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_failed_jobs_leave_the_others_alone_and_are_named_at_the_end(
    script: Path, tmp_path: Path, launcher: str
) -> None:
    done = run(script, "-m", f"hydra/launcher={launcher}", "x=1,2,3,7,9,4", "y=5")
    assert done.returncode == 2, done.stderr
    found = records(tmp_path / "out")
    assert [(r.number, r.name, r.state) for r in found] == [
        (0, "x=1", "done"), (1, "x=2", "failed"), (2, "x=3", "failed"), (3, "x=7", "failed"), (4, "x=9", "failed"),
        (5, "x=4", "done"),
    ]  # fmt: skip
    assert [r.value for r in found if r.state == "done"] == [pytest.approx(0.49), pytest.approx(13.69)]
    reasons = [
        "x: found 2; choose another", "Odd: a defect and no more", "needed: not given; set needed=...",
        "the result is nan",
    ]  # fmt: skip
    assert [r.reason for r in found if r.reason] == reasons
    summary = done.stdout[done.stdout.index("multirun: 2 of 6 jobs done") :]
    for words in (*reasons, "0 done    x=1  0.49", "5 done    x=4  13.69"):
        assert words in summary
    assert "not begun" not in summary
    assert "the same command runs what is missing" in done.stderr
    folder = max((tmp_path / "out" / "multirun").iterdir())
    if launcher == "joblib":
        assert [r.log for r in found] == [f"{number}.log" for number in range(6)]
        at_a_time = min(6, len(os.sched_getaffinity(0)))
        assert (folder / "5.log").read_text().startswith(f"this is job 4, one of {at_a_time} at a time\n")
        assert "Traceback" in (folder / "2.log").read_text()
        assert "this is job" not in done.stdout
    if launcher == "basic":
        assert done.stdout.count("this is job") == 6
        assert done.stderr.count("Traceback") == 1, "a defect shows where it is, a mistake of the user does not"


def test_multiruns_without_failures_keep_records_apart_and_a_single_job_says_nothing_more(
    script: Path, tmp_path: Path
) -> None:
    for xs in (["x=1,4"], ["kind=glob(*)", "x=8"]):
        done = run(script, "-m", *xs)
        assert (done.returncode, done.stderr) == (0, "")
        assert "multirun: 2 of 2 jobs done" in done.stdout
    folders = sorted((tmp_path / "out" / "multirun").iterdir())
    assert [[r.name for r in read_records(folder)] for folder in folders] == [["x=1", "x=4"], ["kind=a", "kind=b"]]
    alone = run(script, "x=1")
    assert (alone.returncode, alone.stderr) == (0, "")
    said, command = alone.stdout.splitlines()
    assert said == "this is job 1, one of 1 at a time"
    assert command.endswith("python -m dtvla.demo x=1")


def test_a_killed_job_is_told_from_those_that_ended(script: Path, tmp_path: Path) -> None:
    done = run(script, "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=3", "x=1,5")
    assert done.returncode == 2
    assert [(r.name, r.state) for r in records(tmp_path / "out")][-1] == ("x=5", "running")
    assert "1 no end  x=5" in done.stdout
    assert "killed, or out of memory" in done.stdout
    log = max((tmp_path / "out" / "multirun").iterdir()) / "1.log"
    assert "one of 2 at a time" in log.read_text(), "there are no more jobs"


def test_jobs_end_with_the_command_that_was_killed(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(script), "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "x=1,10", "y=1,2"]
    with subprocess.Popen(command, env={**os.environ, "DTVLA_ROOT": str(tmp_path)}) as started:
        eventually(lambda: len(list(tmp_path.glob("out/multirun/*/[0-9].json"))) == 4)
        assert _processes_of(tmp_path)
        started.kill()
    eventually(lambda: not _processes_of(tmp_path))
    assert [r.state for r in records(tmp_path / "out")] == ["done", "done", "running", "running"]


def test_a_folder_named_for_two_multiruns_tells_of_the_second(script: Path, tmp_path: Path) -> None:
    folder = f"hydra.sweep.dir={tmp_path}/mine"
    assert run(script, "-m", "x=1,4,2", folder).returncode == 2
    (tmp_path / "mine" / "2026-01.json").write_text("[]")
    done = run(script, "-m", "x=4,1", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert [r.name for r in read_records(tmp_path / "mine")] == ["x=4", "x=1"]
    assert "multirun: 2 of 2 jobs done" in done.stdout
    assert (tmp_path / "mine" / "2026-01.json").exists(), "not a record"


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_job_that_was_told_to_stop_ends_the_multirun_with_its_code(
    script: Path, tmp_path: Path, launcher: str
) -> None:
    done = run(script, "-m", f"hydra/launcher={launcher}", "x=1,6,4")
    assert done.returncode == 143
    assert ("x=6", "stopped") in [(r.name, r.state) for r in records(tmp_path / "out")]
    assert "stopped x=6" in done.stdout
    if launcher == "basic":
        assert "multirun: 1 of 3 jobs done" in done.stdout
        assert "not begun: 1" in done.stdout


def test_no_job_begins_when_the_multirun_cannot_be_prepared(script: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "1.json").mkdir(parents=True)  # where a record belongs
    done = run(script, "-m", "x=1,4", f"hydra.sweep.dir={tmp_path}/mine")
    assert done.returncode == 1
    assert "IsADirectoryError" in done.stderr
    assert "this is job" not in done.stdout


@pytest.mark.slow
def test_a_search_goes_on_after_failures_and_is_repeated_by_the_same_command(script: Path, tmp_path: Path) -> None:
    shipped = (cli.config_dir() / "sweep" / "sft.yaml").read_text().split("optimized_metric")[0]
    sweeper = (cli.config_dir() / "sweep" / "sft.yaml").read_text().split("\nhydra:\n")[1].split("    params:\n")[0]
    space = "    params:\n      x: choice(1, 2, 4, 9)\n"
    (tmp_path / "conf" / "sweep" / "demo.yaml").write_text(f"{shipped}\nhydra:\n{sweeper}{space}")
    found = []
    for _ in range(2):
        done = run(script, "+sweep=demo", "hydra.sweeper.n_trials=6")
        assert done.returncode == 2, done.stderr
        found.append(records(tmp_path / "out"))
        value, best = min((r.value, r.name) for r in found[-1] if r.value is not None)
        assert f"best: {value:.6g} with {best}" in done.stdout
    assert found[0] == found[1]
    assert len(found[0]) == 6
    assert {"x=9": "failed", best: "done"}.items() <= {r.name: r.state for r in found[0]}.items()
    (command,) = {line for line in done.stdout.splitlines() if line.startswith("command:") and f" {best} " in line}
    again = run(script, *shlex.split(command.partition("dtvla.demo")[2]))
    assert (again.returncode, again.stdout.splitlines()[1:]) == (0, [command]), "a trial is repeated alone"


@pytest.mark.parametrize(
    ("argument", "package"),
    [
        ("hydra/launcher=joblib", "hydra-joblib-launcher"),
        ("hydra/launcher=submitit_slurm", "hydra-submitit-launcher"),
        ("hydra/sweeper=optuna", "hydra-optuna-sweeper"),
        ("+sweep=sft", "hydra-optuna-sweeper"),
    ],
)
def test_a_launcher_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str, package: str
) -> None:
    from dtvla import evaluate

    monkeypatch.setattr(sys, "argv", ["evaluate", "-m", argument, "--cfg", "job"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: {argument}: the package {package} is not installed; "
        "install dtvla's extra for sweeps, pip install -e '.[sweep]'"
    )


def test_an_installed_launcher_is_not_refused() -> None:
    multirun.check_plugins(["-m", "hydra/launcher=joblib", "hydra/launcher=submitit_slurm", "+sweep=grpo", "cot=mask"])


def test_names_are_the_same_in_every_order_differ_and_need_no_quotes() -> None:
    rng = np.random.default_rng(0)
    seen: dict[str, dict[str, str]] = {}
    for _ in range(300):
        keys = rng.choice(["seed", "model/decoder", "+thoughts", "data.root", "cot.temperature", "long" * 15], 3, False)
        overrides = {str(key): str(rng.choice(["1", "0.5", "/a/b", "[1,2]", "hybrid", "1e-05"])) for key in keys}
        name = name_of(overrides)
        assert name == name_of(dict(reversed(list(overrides.items()))))
        assert len(name) <= LONGEST_NAME + 9
        assert seen.setdefault(name, overrides) == overrides
        override = OverridesParser.create().parse_override(f"checkpoint=runs/train-{name}/policy,other")
        assert list(override.sweep_string_iterator()) == [f"runs/train-{name}/policy", "other"]
    assert name_of({"model/decoder": "hybrid", "+thoughts": "with"}) == "model.decoder_hybrid+thoughts_with"


@pytest.mark.parametrize(
    ("sweep", "experiment", "direction"), [("sft", "quickstart", "minimize"), ("grpo", "grpo_quickstart", "maximize")]
)
def test_a_search_varies_settings_that_exist_and_one_learning_rate_for_all_parts(
    sweep: str, experiment: str, direction: str
) -> None:
    overrides = [f"+experiment={experiment}", f"+sweep={sweep}", "algorithm.optimizer.lr.language_model=0.125"]
    with initialize_config_dir(str(cli.config_dir()), version_base="1.3"):
        cfg = compose("train", overrides=overrides, return_hydra_config=True)
    sweeper = cfg.hydra.sweeper
    assert (str(cfg.hydra.mode.name), sweeper.direction, sweeper.n_jobs, sweeper.sampler.seed) == (
        "MULTIRUN", direction, 1, 0,
    )  # fmt: skip
    assert set(cfg.algorithm.optimizer.lr.values()) == {0.125}
    assert len(sweeper.params) == 4
    for key in sweeper.params:
        assert OmegaConf.select(cfg, key) is not None, key
    assert cfg.optimized_metric == {"sft": "val/loss", "grpo": "rollout/success"}[sweep]
    assert sweep == "sft" or cfg.callbacks.libero_rollouts.at_end


Outputs = Callable[..., list[str]]


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Outputs:
    """Where the jobs of a multirun of evaluate would write."""
    from dtvla.rollout.plan import make_plan

    for run_name in ("a", "b"):
        policy = tmp_path / "runs" / run_name / "policy"
        policy.mkdir(parents=True)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
            (policy / name).write_text("{}")
    own = tmp_path / "own" / "cot" / "warm.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("defaults: [think, _self_]\ntemperature: 1\n")

    @cli.entry("evaluate")
    def plan(cfg: Any) -> None:
        print("OUTPUT", make_plan(cfg).output)

    def planned(*overrides: str) -> list[str]:
        root = [f"paths.root={tmp_path}", f"checkpoint={tmp_path}/runs/a/policy"]
        monkeypatch.setattr(sys, "argv", ["evaluate", "-m", "--config-dir", str(tmp_path / "own"), *root, *overrides])
        plan()
        lines = capsys.readouterr().out.splitlines()
        return [line.removeprefix(f"OUTPUT {tmp_path}/") for line in lines if line.startswith("OUTPUT")]

    return planned


def test_every_arm_of_an_evaluation_has_a_folder_of_its_own(outputs: Outputs, tmp_path: Path) -> None:
    folder = "evaluations/a/libero_object"
    assert outputs("cot=think,mask", "init_states=[3,4]") == [f"{folder}-think", f"{folder}-mask"]
    assert outputs("cot=think,warm") == [f"{folder}-think", f"{folder}-think-cot_warm"]
    assert outputs("cot=mask", "seed=1,2", "env.render=draft") == [f"{folder}-mask-seed_1", f"{folder}-mask-seed_2"]
    both = f"checkpoint={tmp_path}/runs/a/policy,{tmp_path}/runs/b/policy"
    assert outputs(both, "env=libero_object,libero_goal") == [
        f"evaluations/{run}/{suite}-think" for run in "ab" for suite in ("libero_object", "libero_goal")
    ]
    assert outputs("cot=think,mask", f"output={tmp_path}/mine") == ["mine/cot_think", "mine/cot_mask"]
    assert outputs("cot=think,mask", f"output='{tmp_path}/mine-${{cot.mode}}'") == ["mine-think", "mine-mask"]
    assert outputs("cot=think,mask", "device='cuda:${hydra:job.num}'") == [f"{folder}-think", f"{folder}-mask"]
    assert not in_multirun(), "tests that follow are no jobs of a multirun"


def test_a_training_of_a_multirun_is_named_by_what_it_varies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dtvla.learning.experiment import _run_folder

    @cli.entry("train")
    def folder(cfg: Any) -> None:
        print("FOLDER", _run_folder(cfg).path.name)

    def names(*overrides: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["train", "-m", f"paths.root={tmp_path}", *overrides])
        folder()
        lines = capsys.readouterr().out.splitlines()
        return [line.removeprefix("FOLDER ") for line in lines if line.startswith("FOLDER")]

    assert names("seed=1,2", "trainer.max_steps=3") == ["train-seed_1", "train-seed_2"]
    assert names("name=a,b") == ["a", "b"]
    assert names("name=nano", "model=nano,small") == ["nano-model_nano", "nano-model_small"]
    assert names("+experiment=quickstart,grpo_quickstart") == ["quickstart", "grpo_quickstart"]


@pytest.fixture
def training(tmp_path: Path) -> list[str]:
    demonstrations = write_demonstrations(tmp_path / "squares")
    return [
        "-m", *TINY, "algorithm.optimizer.warmup_steps=1", f"data.root={demonstrations}", f"paths.root={tmp_path}",
        "trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.limit_val_batches=1", "data.num_workers=0",
        "callbacks=none", "logger=none",
    ]  # fmt: skip


def finish(name: str, *options: str) -> tuple[int | None, str, str]:
    command = Command(name, *options)
    output, errors = command.wait(280)
    return command.returncode, output, errors


@pytest.mark.slow
def test_a_rerun_of_a_decoder_ablation_trains_only_what_is_missing(training: list[str], tmp_path: Path) -> None:
    command = [*training, "model/decoder=hybrid,autoregressive", "+thoughts=with,without"]
    runs = tmp_path / "runs"
    blocked = runs / "train-model.decoder_autoregressive+thoughts_with"
    (blocked / "policy").mkdir(parents=True)
    code, output, errors = finish("train", *command)
    assert code == 2, errors
    assert "3 of 4 jobs done" in output
    assert f"{blocked}/config.yaml is missing" in output
    finished = {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}
    assert len(finished) == 3
    (blocked / "policy").rmdir()
    code, output, errors = finish("train", *command)
    assert code == 0, errors
    assert "4 of 4 jobs done" in output
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    results = {path.parent.name: json.loads(path.read_text()) for path in runs.glob("*/result.json")}
    assert sorted(r.value for r in records(tmp_path) if r.value) == sorted(
        result["metrics"]["val/loss"] for result in results.values()
    )
    configs = {path.parent.name: yaml.safe_load(path.read_text()) for path in runs.glob("*/config.yaml")}
    assert {name: (c["model"]["decoder"], c["data"]["thoughts"], c["cot"]["mode"]) for name, c in configs.items()} == {
        f"train-model.decoder_{decoder}+thoughts_{thoughts}": (decoder, thoughts == "with", mode)
        for decoder in ("hybrid", "autoregressive")
        for thoughts, mode in (("with", "think"), ("without", "none"))
    }


@pytest.mark.slow
def test_joblib_trains_on_one_device_a_job_and_refuses_several(training: list[str], tmp_path: Path) -> None:
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=1"]  # in this process, which has its libraries
    code, output, errors = finish("train", *training, *joblib, "trainer.devices=1,2")
    assert code == 2, errors
    assert [r.state for r in records(tmp_path)] == ["done", "failed"], output
    assert "trainer.devices: 2 processes for one job, but hydra/launcher=joblib starts one" in output
    assert (tmp_path / "runs" / "train-trainer.devices_1" / "policy").is_dir()


@pytest.mark.sim
@pytest.mark.slow
def test_a_rerun_of_an_evaluation_of_several_arms_runs_only_what_is_missing(tmp_path: Path) -> None:
    first, second = (save_policy(tmp_path / "runs" / name / "policy") for name in ("a", "b"))
    command = [
        "-m", *FAST, "init_states=[30]", "record=0", f"paths.root={tmp_path}", f"checkpoint={first},{second}",
    ]  # fmt: skip
    away = second.rename(tmp_path / "away")
    broken = run("-m", "dtvla.evaluate", *command, "cot=think", "hydra/launcher=joblib")
    assert broken.returncode == 2, broken.stderr
    assert [r.state for r in records(tmp_path)] == ["done", "failed"], broken.stdout
    assert f"checkpoint: no folder {second}" in broken.stdout
    assert not _processes_of(tmp_path), "simulators were left behind"
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("evaluations/*/*/results.json")}
    assert [str(path.parent.relative_to(tmp_path)) for path in done] == ["evaluations/a/libero_object-think"]
    away.rename(second)
    code, _, errors = finish("evaluate", *command, "cot=think")
    assert code == 0, errors
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(list(tmp_path.glob("evaluations/*/*/results.json"))) == 2
    assert not _processes_of(tmp_path), "simulators were left behind"


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _processes_of(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(folder).encode() in (path.parent / "cmdline").read_bytes() + path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found
