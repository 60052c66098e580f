"""Protects the speed of a training: what is counted, over which time, and as what share of the device's peak."""

from __future__ import annotations

import csv
import re
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from training_data import TINY, write_demonstrations

from dtvla.callbacks import throughput
from dtvla.callbacks.throughput import Throughput, clock_stopped
from dtvla.cli import config_dir
from dtvla.errors import UserError
from dtvla.learning.experiment import train
from dtvla.policy.layout import IGNORE, Batch, Segment

P, T, A, X = (int(segment) for segment in (Segment.PREFIX, Segment.THINK, Segment.ACT, Segment.PAD))


class Trainee:
    """A module that remembers what is logged; its model is only ever measured by a patched `training_flops`."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(autoregressive=False)
        self.logged: dict[str, float] = {}
        self.shown: set[str] = set()

    def log_dict(self, values: dict[str, float], prog_bar: bool = False) -> None:
        self.logged |= values
        self.shown |= set(values) if prog_bar else set()


class TwoRanks:
    """The collective operations of a strategy whose other rank has exactly the same."""

    root_device = torch.device("cpu")

    def reduce(self, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
        return {"sum": 2 * tensor, "max": tensor}[reduce_op]


def make_batch(rows: list[list[int]], sample: list[list[int]] | None = None, samples: int | None = None) -> Batch:
    """Tokens of the given segments; everything but the prefix is supervised."""
    segment_BT = torch.tensor(rows)
    count = len(rows) if samples is None else samples
    return Batch(
        pixels_BNCHW=torch.zeros(count, 2, 3, 4, 4, dtype=torch.uint8),
        input_ids_BT=torch.zeros_like(segment_BT),
        segment_BT=segment_BT,
        labels_BT=torch.where((segment_BT == T) | (segment_BT == A), 1, IGNORE),
        slot_BT=segment_BT == A,
        actions_BSD=torch.zeros(count, 1, 1),
        sample_BT=None if sample is None else torch.tensor(sample),
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now[0])
    return now


def test_figures_are_those_of_all_ranks_over_training_time_without_padding(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    cost: Any = lambda pictures, tokens, pairs, supervised: 1e9 * (pictures + tokens + pairs + supervised)  # noqa: E731
    monkeypatch.setattr(throughput, "training_flops", lambda model: cost)
    callback, module = Throughput(peak_tflops=0.5), Trainee()
    trainer: Any = SimpleNamespace(
        strategy=TwoRanks(),
        precision="32-true",
        is_global_zero=True,
        world_size=2,
        global_step=1,
        log_every_n_steps=2,
        callbacks=[callback],
    )
    padded = make_batch([[P, P, T, A], [P, T, A, X]])
    packed = make_batch([[P, P, T, A, P, T, A, X]], [[0, 0, 0, 0, 1, 1, 1, -1]], samples=2)
    step: Any = lambda *batches: callback.on_train_batch_end(trainer, module, None, list(batches), 0)  # type: ignore[arg-type] # noqa: E731
    callback.on_train_start(trainer, module)  # type: ignore[arg-type]
    step(padded)  # of unknown duration: only starts the clock
    assert not module.logged
    trainer.global_step = 2
    clock[0] += 3
    with clock_stopped(trainer):
        clock[0] += 1000  # a rollout
    callback.on_validation_start(trainer, module)  # type: ignore[arg-type]
    clock[0] += 1000
    callback.on_validation_end(trainer, module)  # type: ignore[arg-type]
    clock[0] += 1
    step(padded, packed)
    tokens, supervised, pairs = 14, 8, 2 * (4 + 3 + 4 + 1 + 2 + 3)  # of one rank
    found = {name.removeprefix("throughput/"): value for name, value in module.logged.items()}
    assert found["samples_per_s"] == 2 * 4 / 4
    assert found["tokens_per_s"] == 2 * tokens / 4
    assert found["supervised_tokens_per_s"] == 2 * supervised / 4
    assert found["mfu"] == pytest.approx(2e9 * (8 + tokens + pairs + supervised) / 4 / (2 * 0.5e12))
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert found["peak_memory_gb"] == pytest.approx(peak_gb, rel=0.2)
    for name in ("samples_per_s", "mfu", "peak_memory_gb"):
        assert f"throughput/{name}" in module.shown


def test_a_peak_that_is_no_rate_is_refused() -> None:
    with pytest.raises(UserError, match="peak_tflops"):
        Throughput(peak_tflops=0)


def test_a_device_of_unknown_speed_is_named_once_and_gets_no_mfu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(throughput, "training_flops", lambda model: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    strategy = SimpleNamespace(root_device=torch.device("cuda"))
    trainer: Any = SimpleNamespace(strategy=strategy, precision="bf16-mixed", is_global_zero=True)
    Throughput().on_train_start(trainer, Trainee())  # type: ignore[arg-type]
    assert re.fullmatch(r"no MFU: .*Some GPU.*callbacks\.throughput\.peak_tflops\n", capsys.readouterr().out)


def test_a_real_training_shows_and_logs_speed_share_and_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        *TINY,
        f"data.root={write_demonstrations(tmp_path / 'data')}",
        f"paths.root={tmp_path}",
        "data.num_workers=0",
        "algorithm.micro_batch_size=3",
        "algorithm.optimizer.warmup_steps=1",
        "trainer.max_steps=4",
        "trainer.limit_val_batches=0",
        "trainer.log_every_n_steps=2",
        "optimized_metric=null",
        "name=run",
        "callbacks.throughput.peak_tflops=0.1",
    ]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        train(compose("train", overrides=settings))
    with (tmp_path / "runs/run/metrics.csv").open(newline="") as file:
        rows = [
            {name: float(value) for name, value in row.items() if name.startswith("throughput/")}
            for row in csv.DictReader(file)
        ]
    assert len(rows) == 2
    for row in rows:
        assert 0 < row["throughput/mfu"] < 1
        assert 0.1 < row["throughput/peak_memory_gb"] < 20
        assert 0 < row["throughput/supervised_tokens_per_s"] < row["throughput/tokens_per_s"]
        samples = row["throughput/samples_per_s"]
        assert 70 * samples < row["throughput/supervised_tokens_per_s"]  # the actions' tokens alone
    shown = capsys.readouterr().out
    assert all(f"{name}=" in shown for name in ("samples_per_s", "mfu", "peak_memory_gb"))
