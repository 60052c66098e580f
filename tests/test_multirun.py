"""Multiruns through every launcher: what failed is named, what did not is kept, and what is missing is made up for."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from multirun_script import SCRIPT, records, run, write_script
from omegaconf import OmegaConf
from test_evaluate import FAST, save_policy
from training_data import TINY, write_demonstrations

from dtvla import cli, multirun
from dtvla.jobs import LONGEST_NAME, name_of, read_records

LAUNCHERS = ("basic", "joblib", "submitit_local")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return write_script(tmp_path)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_failed_jobs_leave_the_others_alone_and_are_named_at_the_end(
    script: Path, tmp_path: Path, launcher: str
) -> None:
    done = run(script, "-m", f"hydra/launcher={launcher}", "x=1,2,3,7,4", "y=5")
    assert done.returncode == 2, done.stderr
    found = records(tmp_path / "out")
    assert [(r.number, r.name, r.state) for r in found] == [
        (0, "x=1", "done"), (1, "x=2", "failed"), (2, "x=3", "failed"), (3, "x=7", "failed"), (4, "x=4", "done"),
    ]  # fmt: skip
    assert [r.value for r in found] == [pytest.approx(0.49), None, None, None, pytest.approx(13.69)]
    reasons = ["x: found 2; choose another", "Odd: a defect and no more", "needed: not given; set needed=..."]
    assert [r.reason for r in found if r.reason] == reasons
    summary = done.stdout[done.stdout.index("multirun: 2 of 5 jobs done") :]
    for words in (*reasons, "0 done    x=1  0.49", "4 done    x=4  13.69"):
        assert words in summary
    assert "The same command runs what is missing" in done.stderr
    folder = max((tmp_path / "out" / "multirun").iterdir())
    if launcher == "joblib":
        assert [r.log for r in found] == [f"{number}.log" for number in range(5)]
        assert (folder / "4.log").read_text() == "this is job 4\n"
        assert "Traceback" in (folder / "2.log").read_text()
        assert "this is job" not in done.stdout
    if launcher == "basic":
        assert done.stdout.count("this is job") == 5
        assert done.stderr.count("Traceback") == 1, "a defect shows where it is, a mistake of the user does not"


def test_a_multirun_without_failures_ends_with_0_and_a_single_job_says_nothing_more(script: Path) -> None:
    done = run(script, "-m", "x=1,4")
    assert (done.returncode, done.stderr) == (0, "")
    assert "multirun: 2 of 2 jobs done" in done.stdout
    alone = run(script, "x=1")
    assert (alone.returncode, alone.stdout, alone.stderr) == (0, "this is job 1\n", "")


def test_two_multiruns_keep_their_records_apart(script: Path, tmp_path: Path) -> None:
    for xs in ("1,4", "8,9"):
        run(script, "-m", f"x={xs}")
    folders = sorted((tmp_path / "out" / "multirun").iterdir())
    assert [[r.name for r in read_records(folder)] for folder in folders] == [["x=1", "x=4"], ["x=8", "x=9"]]


def test_a_killed_job_is_told_from_those_that_ended(script: Path, tmp_path: Path) -> None:
    done = run(script, "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "x=1,5")
    assert done.returncode == 2
    assert [(r.name, r.state) for r in records(tmp_path / "out")][-1] == ("x=5", "running")
    assert "1 no end  x=5" in done.stdout
    assert "killed, ran out of memory" in done.stdout


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_job_that_was_told_to_stop_ends_the_multirun_with_its_code(
    script: Path, tmp_path: Path, launcher: str
) -> None:
    done = run(script, "-m", f"hydra/launcher={launcher}", "x=1,6,4")
    assert done.returncode == 143
    assert ("x=6", "stopped") in [(r.name, r.state) for r in records(tmp_path / "out")]
    assert "stopped x=6" in done.stdout


def test_joblib_runs_as_many_jobs_as_there_are_at_most(tmp_path: Path, script: Path) -> None:
    script.write_text(script.read_text().replace('print("this', "from dtvla.jobs import neighbours; return neighbours()"
                                                 "\n    print(\"this"))  # fmt: skip
    for setting, expected in (("3", 2.0), ("1", 1.0), ("-1", float(min(2, len(os.sched_getaffinity(0)))))):
        run(script, "-m", "hydra/launcher=joblib", f"hydra.launcher.n_jobs={setting}", "x=1,4")
        assert [r.value for r in records(tmp_path / "out")] == [expected] * 2, setting


@pytest.mark.slow
def test_a_search_minimises_goes_on_after_failures_and_is_repeated_by_the_same_command(
    script: Path, tmp_path: Path
) -> None:
    shutil.copy(cli.config_dir() / "sweep" / "sft.yaml", tmp_path / "conf" / "sweep" / "demo.yaml")
    text = (tmp_path / "conf" / "sweep" / "demo.yaml").read_text()
    head, params = text.split("    params:\n")
    head = head[: head.index("optimized_metric")] + head[head.index("hydra:\n") :]
    assert "algorithm.optimizer" in params
    (tmp_path / "conf" / "sweep" / "demo.yaml").write_text(f"{head}    params:\n      x: choice(1, 2, 4, 0.5, 3)\n")
    found = []
    for _ in range(2):
        done = run(script, "+sweep=demo", "hydra.sweeper.n_trials=9")
        assert done.returncode == 2, done.stderr
        found.append(records(tmp_path / "out"))
        best = min(r.value for r in found[-1] if r.value is not None)
        assert f"best: {best:.6g} with x=" in done.stdout
    assert found[0] == found[1]
    assert len(found[0]) == 9
    assert {r.state for r in found[0]} == {"done", "failed"}


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


def outputs(tmp_path: Path, *overrides: str) -> list[str]:
    """Where the jobs of a multirun of evaluate would write."""
    for run_name in ("a", "b"):
        policy = tmp_path / "runs" / run_name / "policy"
        policy.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
            (policy / name).write_text("{}")
    body = "    from dtvla.rollout.plan import make_plan\n    print('OUTPUT', make_plan(cfg).output)"
    path = tmp_path / "plans.py"
    path.write_text(SCRIPT.format(conf=str(cli.config_dir()), name="evaluate", body=body))
    done = run(path, "-m", f"paths.root={tmp_path}", f"checkpoint={tmp_path}/runs/a/policy", *overrides)
    assert done.returncode == 0, done.stderr
    return [line.removeprefix(f"OUTPUT {tmp_path}/") for line in done.stdout.splitlines() if line.startswith("OUTPUT")]


def test_every_arm_of_an_evaluation_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = "evaluations/a/libero_object"
    assert outputs(tmp_path, "cot=think,mask", "init_states=[3,4]") == [f"{folder}-think", f"{folder}-mask"]
    assert outputs(tmp_path, "cot=mask", "seed=1,2", "env.render=draft") == [
        f"{folder}-mask-seed_1", f"{folder}-mask-seed_2",
    ]  # fmt: skip
    both = f"checkpoint={tmp_path}/runs/a/policy,{tmp_path}/runs/b/policy"
    assert outputs(tmp_path, both, "env=libero_object,libero_goal") == [
        f"evaluations/{run}/{suite}-think" for run in "ab" for suite in ("libero_object", "libero_goal")
    ]
    assert outputs(tmp_path, "cot=think,mask", f"output={tmp_path}/mine") == ["mine/cot_think", "mine/cot_mask"]
    assert outputs(tmp_path, "cot=think,mask", f"output='{tmp_path}/mine-${{cot.mode}}'") == ["mine-think", "mine-mask"]


@pytest.mark.slow
def test_a_rerun_of_a_decoder_ablation_trains_only_what_is_missing(tmp_path: Path) -> None:
    demonstrations = write_demonstrations(tmp_path / "squares")
    command = [
        "-m", "dtvla.train", "-m", *TINY, "algorithm.optimizer.warmup_steps=1", f"data.root={demonstrations}",
        "trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.limit_val_batches=1", "data.num_workers=0",
        "callbacks=none", "logger=none", f"paths.root={tmp_path}", "hydra/launcher=joblib",
        "model/decoder=hybrid,autoregressive", "+thoughts=with,without",
    ]  # fmt: skip
    runs = tmp_path / "runs"
    blocked = runs / "train-model.decoder_autoregressive+thoughts_with"
    (blocked / "policy").mkdir(parents=True)
    first = run(*command)
    assert first.returncode == 2, first.stderr
    assert "3 of 4 jobs done" in first.stdout
    assert f"{blocked}/config.yaml is missing" in first.stdout
    finished = {path: path.stat().st_mtime_ns for path in runs.glob("*/result.json")}
    assert len(finished) == 3
    (blocked / "policy").rmdir()
    second = run(*command)
    assert second.returncode == 0, second.stderr
    assert "4 of 4 jobs done" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    results = {path.parent.name: json.loads(path.read_text()) for path in runs.glob("*/result.json")}
    assert sorted(r.value for r in records(tmp_path) if r.value) == sorted(
        result["metrics"]["val/loss"] for result in results.values()
    )
    configs = {path.parent.name: _yaml(path) for path in runs.glob("*/config.yaml")}
    assert {name: (c["model"]["decoder"], c["data"]["thoughts"], c["cot"]["mode"]) for name, c in configs.items()} == {
        f"train-model.decoder_{decoder}+thoughts_{thoughts}": (decoder, thoughts == "with", mode)
        for decoder in ("hybrid", "autoregressive")
        for thoughts, mode in (("with", "think"), ("without", "none"))
    }


@pytest.mark.slow
def test_a_training_on_several_devices_is_refused_where_a_job_is_one_process(tmp_path: Path) -> None:
    demonstrations = write_demonstrations(tmp_path / "squares")
    done = run(
        "-m", "dtvla.train", "-m", *TINY, f"data.root={demonstrations}", f"paths.root={tmp_path}", "trainer=ddp",
        "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.devices=2", "data.num_workers=0",
        "hydra/launcher=joblib", "seed=1,2",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout.count("trainer.devices: 2 processes for one job, but hydra/launcher=joblib starts one") == 2


def _yaml(path: Path) -> Any:
    import yaml

    return yaml.safe_load(path.read_text())


@pytest.mark.sim
@pytest.mark.slow
def test_a_rerun_of_an_evaluation_of_several_arms_runs_only_what_is_missing(tmp_path: Path) -> None:
    first, second = (save_policy(tmp_path / "runs" / name / "policy") for name in ("a", "b"))
    command = [
        "-m", "dtvla.evaluate", "-m", *FAST, "init_states=[30]", "record=0", f"paths.root={tmp_path}",
        "hydra/launcher=joblib", f"checkpoint={first},{second}", "cot=think,mask",
    ]  # fmt: skip
    away = second.rename(tmp_path / "away")
    broken = run(*command)
    assert broken.returncode == 2, broken.stderr
    assert [r.state for r in records(tmp_path)] == ["done", "done", "failed", "failed"]
    assert broken.stdout.count(f"checkpoint: no folder {second}") == 2
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("evaluations/*/*/results.json")}
    assert sorted(str(path.relative_to(tmp_path / "evaluations").parent) for path in done) == [
        "a/libero_object-mask", "a/libero_object-think",
    ]  # fmt: skip
    away.rename(second)
    mended = run(*command)
    assert mended.returncode == 0, mended.stderr
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(list(tmp_path.glob("evaluations/b/*/results.json"))) == 2
    assert not _processes_of(tmp_path), "simulators were left behind"


def _processes_of(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(folder).encode() in (path.parent / "cmdline").read_bytes() + path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found
