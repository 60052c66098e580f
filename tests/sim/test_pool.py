"""Worker processes: equal answers, clear errors, no orphans."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dtvla.errors import UserError
from dtvla.sim.pool import EnvPool, EpisodeSpec, Reply

pytestmark = pytest.mark.sim


def gather(pool: EnvPool, count: int) -> dict[int, Reply]:
    replies: dict[int, Reply] = {}
    while len(replies) < count:
        replies.update(pool.ready(timeout=200))
    return replies


def alive(process: int) -> bool:
    """Whether a process runs (a zombie that nobody has reaped doesn't)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(processes: list[int], timeout: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if not any(alive(process) for process in processes):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_workers_agree_report_errors_and_death_and_leave_no_orphans() -> None:
    """One pool for all of it: every environment costs seconds to make."""
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 7))
    spec = EpisodeSpec("libero_object", 0, init_state=4, seed=0, max_steps=10)
    with EnvPool(2, image_size=32, render="draft") as pool:
        assert pool.ready(timeout=0) == []
        pool.start(0, spec)
        pool.start(1, EpisodeSpec("libero_object", 0, init_state=9, seed=0, max_steps=10))  # so that 1 is a used one
        assert not gather(pool, 2)[0].over
        pool.start(1, spec)
        with pytest.raises(RuntimeError, match="request under way"):
            pool.act(1, actions)
        gather(pool, 1)
        pool.act(0, actions)
        pool.act(1, actions[:3])
        gather(pool, 2)
        pool.act(1, actions[3:])
        gather(pool, 1)
        for worker in (0, 1):
            pool.act(worker, actions)
        first, second = gather(pool, 2).values()
        assert first.truncated
        assert first.over
        assert (first.info["step"], second.info["step"]) == (10, 10)
        for key, value in first.observation.items():
            np.testing.assert_array_equal(value, second.observation[key])

        pool.start(0, EpisodeSpec("libero_object", 0, init_state=77, seed=0, max_steps=10))
        with pytest.raises(UserError, match=r"init_states: 77 .*\(episode: libero_object task 0, init state 77"):
            gather(pool, 1)
        pool.start(0, EpisodeSpec("libero_object", 0, init_state=1, seed=0, max_steps=10, record=True))
        assert [frame.shape for frame in gather(pool, 1)[0].frames] == [(32, 64, 3)]
        pool.act(0, np.full((1, 7), np.nan))
        with pytest.raises(RuntimeError, match=r"7 finite numbers(.|\n)*init state 1"):
            gather(pool, 1)

        processes = [process.pid for process in pool._processes]
        pool.start(1, spec)
        os.kill(processes[1], signal.SIGKILL)  # long before the reset is done
        with pytest.raises(RuntimeError, match=r"worker 1 ended by signal SIGKILL during libero_object task 0"):
            gather(pool, 1)
    assert gone(processes)


def test_workers_die_with_a_killed_parent() -> None:
    code = """
import os, signal
from dtvla.sim.pool import EnvPool
pool = EnvPool(1, image_size=32, render="none").__enter__()
print(pool._processes[0].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL
    assert gone([int(done.stdout)], timeout=60)


def test_no_workers_is_an_error() -> None:
    with pytest.raises(UserError, match=r"^workers: 0 "):
        EnvPool(0)
