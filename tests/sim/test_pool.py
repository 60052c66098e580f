"""Worker processes: equal answers, clear errors, nothing lost with a worker, no orphans."""

import inspect
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from dtvla.errors import UserError
from dtvla.sim.env import LiberoEnv
from dtvla.sim.film import HOLD_FRAMES
from dtvla.sim.pool import EnvPool, EpisodeSpec, Failure, Reply, pool_settings

pytestmark = pytest.mark.sim


def gather(pool: EnvPool, count: int) -> dict[int, Reply]:
    replies: dict[int, Reply] = {}
    while len(replies) < count:
        replies.update(pool.ready(timeout=200))
    return replies


def alive(process: int) -> bool:
    """Whether a process runs (a zombie that nobody has reaped doesn't), or a thread of it, which keeps pipes open."""
    try:
        threads = [stat.read_text() for stat in Path(f"/proc/{process}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):
        return alive(process)  # one ended while it was looked at
    return any(thread.rsplit(")", 1)[1].split()[0] not in "ZX" for thread in threads)


def gone(processes: list[int], timeout: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if not any(alive(process) for process in processes):
            return True
        time.sleep(0.1)
    return False


def play(pool: EnvPool, worker: int, actions_ND: np.ndarray, chunk: int) -> Reply:
    """Run actions in chunks; the last reply."""
    for begin in range(0, len(actions_ND), chunk):
        pool.act(worker, actions_ND[begin : begin + chunk])
        reply = gather(pool, 1)[worker]
    return reply


def assert_equal(one: Reply, other: Reply) -> None:
    """Every bit that a caller sees."""
    assert (one.reward, one.terminated, one.truncated, one.info) == (
        other.reward, other.terminated, other.truncated, other.info,
    )  # fmt: skip
    assert one.observation.keys() == other.observation.keys()
    for key, value in one.observation.items():
        np.testing.assert_array_equal(value, other.observation[key])


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvPool]:
    with EnvPool(2, image_size=32, render="draft") as pool:
        yield pool
        processes = pool.process_ids
    assert gone(processes)


SPEC = EpisodeSpec("libero_object", 0, init_state=4, seed=0, max_steps=10)
ACTIONS = np.random.default_rng(0).uniform(-1, 1, (10, 7))


def test_workers_agree_and_report_errors(pool: EnvPool) -> None:
    assert pool.ready(timeout=0) == []
    pool.start(0, SPEC)
    pool.start(1, replace(SPEC, init_state=9))  # so that 1 is a used one
    assert not gather(pool, 2)[0].over
    pool.start(1, SPEC)
    with pytest.raises(RuntimeError, match="request under way"):
        pool.act(1, ACTIONS)
    gather(pool, 1)
    first, second = play(pool, 0, ACTIONS, 5), play(pool, 1, ACTIONS, 5)
    assert first.truncated
    assert first.over
    assert (first.info["step"], first.info["steps"]) == (10, 5)
    assert_equal(first, second)
    kept = first.observation["agentview"].copy()

    pool.start(0, replace(SPEC, init_state=77))
    with pytest.raises(UserError, match=r"init_states: 77 .*\(episode: libero_object task 0, init state 77"):
        gather(pool, 1)
    pool.start(0, replace(SPEC, init_state=1, max_steps=1))
    assert (gather(pool, 1)[0].observation["agentview"] != kept).any()
    np.testing.assert_array_equal(first.observation["agentview"], kept, "an observation outlives the next one")
    assert play(pool, 0, ACTIONS[:2], 2).info["steps"] == 1, "the limit is that of the episode"
    pool.start(0, replace(SPEC, init_state=1))
    gather(pool, 1)
    pool.act(0, np.full((1, 7), np.nan))
    with pytest.raises(RuntimeError, match=r"7 finite numbers(.|\n)*init state 1"):
        gather(pool, 1)


def test_lost_workers_are_replaced_and_their_episodes_end_as_if_nothing_had_happened(
    pool: EnvPool, tmp_path: Path
) -> None:
    """Stopped, diverged, killed at work, killed while idle: each time another process lives the episode again."""
    pool.start(0, SPEC)
    gather(pool, 1)
    undisturbed = play(pool, 0, ACTIONS, 5)
    pool.losses.clear()
    pool.attempts = 5
    film = tmp_path / "films" / "episode.mp4"
    doomed = [pool.process_ids[0]]
    os.kill(doomed[-1], signal.SIGSTOP)
    pool.patience_s, usual = 0.2, pool.patience_s
    pool.start(0, SPEC, film)
    pool.patience_s = usual
    assert pool.ready(timeout=0.3) == []

    doomed.append(pool.process_ids[0])
    ours, theirs = multiprocessing.Pipe()  # what a worker says whose physics has left the finite numbers
    theirs.send(Failure("reported a diverged simulation", "diverged"))
    pool._workers[0].pipe = ours
    assert pool.ready(timeout=0.1) == []

    doomed.append(pool.process_ids[0])
    os.kill(doomed[-1], signal.SIGKILL)  # long before the reset is done
    gather(pool, 1)
    play(pool, 0, ACTIONS[:5], 1)

    doomed.append(pool.process_ids[0])
    os.kill(doomed[-1], signal.SIGKILL)  # idle, in the middle of the episode
    assert gone(doomed)
    last = play(pool, 0, ACTIONS[5:], 5)

    assert_equal(replace(last, film=None), undisturbed)
    how = ["gave no answer", "reported a diverged", "ended by signal SIGKILL", "ended by signal SIGKILL"]
    for reason, expected in zip(pool.losses, how, strict=True):
        assert reason.startswith(f"{SPEC}: the simulation worker {expected}")
    assert last.film == film
    assert [path.name for path in film.parent.iterdir()] == [film.name]
    with av.open(str(film)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 1 + len(ACTIONS) + HOLD_FRAMES


def test_an_episode_that_costs_too_many_workers_is_an_error_and_the_pool_lives_on(pool: EnvPool) -> None:
    pool.attempts = 2
    pool.start(1, SPEC)
    first = pool.process_ids[1]
    os.kill(first, signal.SIGKILL)
    assert gone([first])
    assert pool.ready(timeout=0.1) == [], "the next one has not even loaded the simulator"
    assert pool.process_ids[1] != first
    os.kill(pool.process_ids[1], signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"^2 simulation workers .* task 0, init state 4.*SIGKILL; .*SIGKILL"):
        gather(pool, 1)
    with pytest.raises(RuntimeError, match="no episode"):
        pool.act(1, ACTIONS)
    assert alive(pool.process_ids[1])


def test_workers_and_memory_are_gone_with_a_killed_parent() -> None:
    code = """
import os, signal
from dtvla.sim.pool import EnvPool
pool = EnvPool(1, image_size=32, render="none").__enter__()
print(pool.process_ids[0], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    before = set(Path("/dev/shm").iterdir())
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL
    assert gone([int(done.stdout)], timeout=60)
    assert set(Path("/dev/shm").iterdir()) <= before


def test_ctrl_c_in_a_terminal_ends_everything_at_once(tmp_path: Path) -> None:
    """The terminal sends SIGINT to the whole process group, workers included."""
    code = """
import signal
from pathlib import Path
from dtvla.sim.pool import EnvPool, EpisodeSpec
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
with EnvPool(1, image_size=32, render="none") as pool:
    pool.start(0, EpisodeSpec("libero_object", 0, 0, 0))
    print(pool.process_ids[0], flush=True)
    pool.ready()
    while True:
        pass
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    arguments = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, **arguments) as parent:  # type: ignore[call-overload]
        worker = int(parent.stdout.readline())
        time.sleep(1.0)
        os.killpg(parent.pid, signal.SIGINT)
        try:
            _, errors = parent.communicate(timeout=20)
        finally:
            parent.kill()
    assert "KeyboardInterrupt" in errors
    assert "worker" not in errors
    assert not alive(worker)


def test_no_workers_is_an_error() -> None:
    with pytest.raises(UserError, match=r"^workers: 0 "):
        EnvPool(0)


def test_pool_settings_are_what_a_pool_and_an_environment_take(repository: Path) -> None:
    with initialize_config_dir(str(repository / "conf"), version_base="1.3"):
        settings = pool_settings(compose("evaluate", ["env=libero_goal"]).env)
    EnvPool(1, **settings)
    assert settings.keys() <= inspect.signature(LiberoEnv).parameters.keys()
