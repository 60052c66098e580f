"""Tasks, init states and limits against LIBERO's own tables, and messages for what doesn't exist."""

import importlib
import subprocess
import sys

import numpy as np
import pytest

from dtvla.errors import UserError
from dtvla.sim.suites import get_task, get_tasks, load_init_states, step_limit, suite_names


def test_tasks_equal_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = importlib.import_module("libero.libero.benchmark")
    for suite in suite_names():
        theirs = benchmark.get_benchmark(suite)()
        ours = get_tasks(suite, None)
        assert [task.instruction for task in ours] == [theirs.get_task(i).language for i in range(theirs.n_tasks)]
        assert [str(task.bddl_file) for task in ours] == [
            theirs.get_task_bddl_file_path(i).replace("/./", "/") for i in range(theirs.n_tasks)
        ]
    capsys.readouterr()  # constructing LIBERO's benchmark prints


@pytest.mark.parametrize("suite", ["libero_object", "libero_spatial", "libero_goal", "libero_10"])
def test_every_task_has_fifty_distinct_init_states(suite: str) -> None:
    tasks = get_tasks(suite, None)
    assert len(tasks) == 10
    for task in tasks:
        states = load_init_states(task)
        assert states.dtype == np.float64
        assert task.init_state_count == len(states) == len(np.unique(states, axis=0)) == 50


def test_step_limits_of_both_protocols() -> None:
    suites = ["libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"]
    assert [step_limit(suite) for suite in suites] == [220, 280, 300, 620, 400]
    assert [step_limit(suite, "common") for suite in suites] == [220, 280, 300, 520, 400]


@pytest.mark.parametrize(
    ("suite", "task_id", "message"),
    [
        ("libero_objekt", 0, r"^suite: 'libero_objekt' .*closest: libero_object"),
        ("libero_object", 10, r"^task_ids: 10 is not a task of libero_object; use 0 to 9$"),
        ("libero_object", -1, r"^task_ids: -1 "),
        ("libero_object", "0", r"^task_ids: '0' "),
    ],
)
def test_what_does_not_exist_is_named(suite: str, task_id: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_task(suite, task_id)


def test_unknown_suite_without_task_ids_is_named() -> None:
    with pytest.raises(UserError, match="closest"):
        get_tasks("libero_gaol", None)


def test_reading_tasks_prints_nothing_and_imports_no_simulator() -> None:
    code = (
        "import sys; from dtvla.sim.suites import *; get_tasks('libero_goal', None)\n"
        "sys.exit(str({'mujoco', 'robosuite', 'torch', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr.strip()) == ("", "set()")
