"""Protects rollouts of a policy whose weights are sharded over processes: killed in the middle, resumed, and exact.

Two real processes (FSDP2 on gloo) train and simulate in real LIBERO.
"""

from __future__ import annotations

import csv
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from forked import Command
from ranks import ON_CPU, free_port, rank_of
from training_data import TINY, write_demonstrations

from dtvla.analysis.intervals import wilson
from dtvla.learning.checkpoint_folder import read_weights
from dtvla.policy.policy import Policy

EPISODES = 3  # the first process runs two of them
GRACE_S = 60  # under the load of other tests; preempted jobs have 30 s and more


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    return [
        *TINY,
        "trainer=fsdp",
        *ON_CPU,
        f"data.root={write_demonstrations(tmp_path / 'data')}",
        f"paths.root={tmp_path}",
        "name=run",
        "data.num_workers=0",
        "algorithm.optimizer.warmup_steps=1",
        "trainer.max_steps=3",
        "trainer.limit_val_batches=0",
        "trainer.log_every_n_steps=1",
        "optimized_metric=null",
        "env.task_ids=[0]",
        "env.render=draft",
        "env.max_steps=10",
        "cot=mask",
        "callbacks.libero_rollouts.every_n_steps=2",
        f"callbacks.libero_rollouts.init_states={[*range(30, 30 + EPISODES)]}".replace(" ", ""),
        f"callbacks.libero_rollouts.record={EPISODES}",
    ]


@pytest.mark.sim
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sharded_rollouts_survive_sigterm_and_are_shared_out(tmp_path: Path, settings: list[str]) -> None:
    with training(settings) as first:  # Lightning starts the second process
        wait_for_simulators(first, 2)
        os.killpg(first.pid, signal.SIGTERM)  # all processes of the group, as schedulers do
        output, errors = first.wait(GRACE_S)
        assert first.returncode == 128 + signal.SIGTERM, output + errors
        assert "after step 2, which is saved" in output
        assert not simulators(first.pid)
    folder = tmp_path / "runs" / "run"
    assert not (folder / "best").exists()

    resumed = [*settings, "resume=true"]
    port = free_port()
    with training(resumed, **rank_of(0, 2, port)) as one, training(resumed, **rank_of(1, 2, port)) as two:
        written = ["".join(rank.wait(300)) for rank in (one, two)]
        assert (one.returncode, two.returncode) == (0, 0), written
    assert "".join(written).count("step 2: LIBERO success") == 1
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3]
    measured = {int(row["step"]): float(row["rollout/success_high"]) for row in rows if row["rollout/success"]}
    assert measured == {2: pytest.approx(wilson(0, EPISODES).high)}  # the interval is that of all ranks' episodes
    films = sorted(film.parent.name for film in (folder / "rollouts").rglob("*.mp4"))
    assert films == ["step-0000002"] * EPISODES
    assert_whole(folder)


@contextmanager
def training(settings: list[str], **environment: str) -> Iterator[Command]:
    command = Command("train", *settings, OMP_NUM_THREADS="1", **environment)
    try:
        yield command
    finally:
        command.end()


def simulators(session: int) -> list[int]:
    """Simulator processes of a session; each has a process group of its own."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == session and b"dtvla.sim.worker" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue  # it ended meanwhile
    return found


def wait_for_simulators(command: Command, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(simulators(command.pid)) < count:
        assert command.returncode is None, command.written()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def assert_whole(folder: Path) -> None:
    """The exported policy has all of the trained weights, and the best one those of another step."""
    trained = read_weights(folder / "checkpoints" / "last.ckpt")
    exported, best = (dict(Policy.load(folder / name).model.named_parameters()) for name in ("policy", "best"))
    assert all(torch.equal(weight, trained[f"model.{name}"]) for name, weight in exported.items())
    assert exported.keys() == best.keys()
    assert not all(torch.equal(weight, best[name]) for name, weight in exported.items())
