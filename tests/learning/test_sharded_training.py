"""Protects training on several ranks: it is that of one process, also when it is resumed on another number of them.

Two real processes, FSDP2 or DDP on gloo; two micro-batches in each.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from ranks import ON_CPU, interrupted, run, train_on
from safetensors.torch import load_file
from training_data import TINY, write_demonstrations

from dtvla.callbacks.checkpoint import read_step
from dtvla.learning.checkpoint_folder import read_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS, MIDDLE = 6, 3
FSDP, DDP = ["trainer=fsdp", *ON_CPU], ["trainer=ddp", *ON_CPU]
ROUNDING = 1e-4  # the rates are 3e-3: what is not rounding moves weights further in six steps


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def settings(root: Path) -> list[str]:
    """Augmentation and dropped thoughts are on, so that samples that are not the same would show."""
    return [
        *TINY,
        f"data.root={write_demonstrations(root / 'squares', frames=16)}",
        f"paths.root={root}",
        "data.num_workers=1",
        "data.reasoning_dropout=0.3",
        "algorithm.micro_batch_size=2",
        f"trainer.max_steps={STEPS}",
        f"trainer.val_check_interval={MIDDLE}",
        "trainer.limit_val_batches=1",
        "trainer.log_every_n_steps=1",
        f"callbacks.checkpoint.keep_every_n_steps={MIDDLE}",
        "callbacks=checkpoint",
        "logger=csv",
    ]


@pytest.fixture(scope="module")
def runs(settings: list[str], root: Path) -> Path:
    """Folder of the runs: ``single``, ``packed``, ``fsdp``, ``ddp``, and some that continue from the middle."""
    folder = root / "runs"
    run(*settings, "name=single")
    run(*settings, "algorithm.micro_batch_size=null", "algorithm.pack_tokens=300", "name=packed")
    train_on(2, [*settings, *FSDP, "name=fsdp"], [*settings, *DDP, "name=ddp"])
    for name in ("fsdp-2-ranks", "fsdp-1-rank", "fsdp-single"):
        interrupted(folder / "fsdp", MIDDLE, name)
    interrupted(folder / "single", MIDDLE, "single-fsdp")
    resumed = [*settings, "resume=true"]
    train_on(2, *([*resumed, *FSDP, f"name={name}"] for name in ("fsdp-2-ranks", "single-fsdp")))
    train_on(1, [*resumed, *FSDP, "trainer.devices=1", "name=fsdp-1-rank"])
    run(*resumed, "name=fsdp-single")
    return folder


def policy(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "policy" / "model.safetensors")


def distance(first: Path, second: Path) -> float:
    ours, theirs = policy(first), policy(second)
    assert ours.keys() == theirs.keys()
    return max(float((weight - theirs[name]).abs().max()) for name, weight in ours.items())


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["packed", "fsdp", "ddp", "fsdp-1-rank", "fsdp-single", "single-fsdp"])
def test_losses_gradients_and_weights_are_those_of_one_process(runs: Path, name: str) -> None:
    assert 0 < distance(runs / name, runs / "single") < ROUNDING
    found, expected = rows(runs / name), rows(runs / "single")
    assert [int(row["step"]) for row in found] == list(range(1, STEPS + 1))
    for metric in ("train/loss", "train/grad_norm", "val/loss"):
        values = [float(row[metric]) for row in found if row[metric]]
        assert values == pytest.approx([float(row[metric]) for row in expected if row[metric]], rel=1e-4), metric
    assert len([row for row in found if row["val/loss"]]) == 2


def test_a_resume_on_the_same_ranks_changes_no_bit(runs: Path) -> None:
    assert distance(runs / "fsdp-2-ranks", runs / "fsdp") == 0
    losses = [[row["train/loss"] for row in rows(runs / name)] for name in ("fsdp-2-ranks", "fsdp")]
    assert losses[0] == losses[1]


def test_checkpoints_are_shards_under_names_and_nothing_else(runs: Path) -> None:
    folder = runs / "fsdp" / "checkpoints"
    names = {"best.ckpt", "last.ckpt", f"step-{MIDDLE:07d}.ckpt", f"step-{STEPS:07d}.ckpt"}
    assert {path.name for path in folder.iterdir()} == names | {"best.json", "shards"}
    assert {path.resolve() for path in folder.glob("*.ckpt")} == set((folder / "shards").iterdir())
    assert [read_step(folder / name) for name in ("last.ckpt", f"step-{MIDDLE:07d}.ckpt")] == [STEPS, MIDDLE]
    last = folder / "last.ckpt"
    assert len(list(last.glob("*.distcp"))) == 2
    exported, saved = policy(runs / "fsdp"), read_weights(last)
    assert torch.equal(saved["model.lm_head.weight"], exported["model.language_model.model.embed_tokens.weight"])


def test_adapters_are_trained_on_shards_and_saved_alone(settings: list[str], runs: Path) -> None:
    base = f"model.checkpoint={runs / 'single' / 'policy'}"
    lora = [*settings, base, "model/lora=published", "model.lora.r=2", "model.lora.dropout=0"]
    run(*lora, "name=lora")
    train_on(2, [*lora, *FSDP, "name=lora-fsdp"])
    interrupted(runs / "lora-fsdp", MIDDLE, "lora-resumed")
    train_on(2, [*lora, *FSDP, "name=lora-resumed", "resume=true"])
    names = ("lora", "lora-fsdp", "lora-resumed")
    one, two, resumed = (load_file(runs / name / "policy" / "adapter_model.safetensors") for name in names)
    assert one.keys() == two.keys()
    assert max(float((two[name] - one[name]).abs().max()) for name in one) < ROUNDING
    assert all(torch.equal(two[name], resumed[name]) for name in two)
    saved = read_weights(runs / "lora-fsdp" / "checkpoints" / "last.ckpt")
    assert len(saved) == len(one)
    assert all(".lora_" in name or ".modules_to_save." in name for name in saved)


def test_bf16_mixed_keeps_and_saves_float32(settings: list[str], runs: Path) -> None:
    train_on(2, [*settings, *FSDP, "trainer.precision=bf16-mixed", "trainer.max_steps=5", "name=bf16"])
    assert {weight.dtype for weight in policy(runs / "bf16").values()} == {torch.float32}
    losses = [[float(row["train/loss"]) for row in rows(runs / name)][:5] for name in ("bf16", "single")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_torchrun_is_killed_and_ends_in_the_same_weights(settings: list[str], runs: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dtvla.train"]
    own = [*settings, *FSDP, "name=killed", "callbacks.checkpoint.every_n_steps=1"]
    folder, environment = runs / "killed", {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *own], env=environment)
    try:
        deadline = time.monotonic() + 300
        while not (folder / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        ranks = psutil.Process(process.pid).children(recursive=True)  # in sessions of their own
        for running in (psutil.Process(process.pid), *ranks):
            running.kill()
        psutil.wait_procs(ranks)
        process.wait()
    assert not (folder / "policy").exists()
    assert 0 < read_step(folder / "checkpoints" / "last.ckpt") < STEPS
    train_on(2, [*own, "resume=true"])
    assert distance(folder, runs / "fsdp") == 0
