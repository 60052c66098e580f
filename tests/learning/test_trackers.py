"""Protects the loggers of Weights & Biases and SwanLab: what is logged offline is in their files, resumed or not."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from training_data import TINY, write_demonstrations

from dtvla.cli import config_dir
from dtvla.errors import UserError
from dtvla.learning.experiment import train
from dtvla.learning.sft import SFTModule

STEPS, CRASH, SAVED = 4, 3, 2
OFFLINE = {"wandb": "logger.wandb.offline=true", "swanlab": "logger.swanlab.mode=offline"}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("WANDB_MODE", "offline")  # Lightning sets it; this restores it
    monkeypatch.setenv("WANDB_SILENT", "true")
    return [
        *TINY,
        f"data.root={write_demonstrations(tmp_path / 'data')}",
        f"paths.root={tmp_path}",
        "name=run",
        "data.num_workers=0",
        "algorithm.optimizer.warmup_steps=1",
        f"trainer.max_steps={STEPS}",
        "trainer.val_check_interval=2",
        "trainer.limit_val_batches=1",
        "trainer.log_every_n_steps=1",
        "callbacks.checkpoint.every_n_steps=1000",  # saves at SAVED, before the validation
        "callbacks.samples.frames=1",
    ]


def run(*overrides: str) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        train(compose("train", overrides=list(overrides)))


def crash_and_resume(settings: list[str], logger: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that fails in its third step and is continued from the second, in one process."""
    step = SFTModule.training_step

    def failing(self: SFTModule, *arguments: Any) -> None:
        if self.global_step + 1 == CRASH:
            raise RuntimeError("a fault")
        step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SFTModule, "training_step", failing)
        with pytest.raises(RuntimeError, match="a fault"):
            run(*settings, f"logger={logger}", OFFLINE[logger])
    run(*settings, f"logger={logger}", OFFLINE[logger], "resume=true")


def records(path: Path) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, which both packages write, behind a header of theirs."""
    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield whole
            whole = b""


def of_wandb(folder: Path) -> tuple[set[str], dict[str, dict[int, Any]]]:
    """Ids of all runs, and metrics by name and step."""
    from wandb.proto import wandb_internal_pb2

    ids, values = set(), dict[str, dict[int, Any]]()
    for path in sorted(folder.rglob("*.wandb")):
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                config = {item.key: item.value_json for item in record.run.config.update}
                if "seed" in config:
                    values["config/seed"] = {0: json.loads(config["seed"])}
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            for name, value in row.items():
                values.setdefault(name, {})[row.get("trainer/global_step", -1)] = value
    return ids, values


def of_swanlab(folder: Path) -> tuple[set[str], dict[str, dict[int, Any]]]:
    from swanlab.proto.swanlab.record.v1 import record_pb2

    ids, values = set(), dict[str, dict[int, Any]]()
    for path in sorted(folder.rglob("*.swanlab")):
        for data in records(path):
            record = record_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("start"):
                ids.add(record.start.id)
            if record.HasField("scalar"):
                values.setdefault(record.scalar.key, {})[record.scalar.step] = record.scalar.value.number
            if record.HasField("media"):
                values.setdefault(record.media.key, {})[record.media.step] = record.media.value.items[0].filename
    return ids, values


@pytest.mark.slow
@pytest.mark.parametrize(("logger", "read"), [("wandb", of_wandb), ("swanlab", of_swanlab)])
def test_an_offline_run_holds_metrics_and_pictures_and_is_continued(
    logger: str, read: Any, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    crash_and_resume(settings, logger, monkeypatch)
    package: Any = sys.modules[logger]
    package.finish()
    if logger == "wandb":
        package.teardown()  # its service writes the rest of the file after finish has returned
    folder = tmp_path / "runs" / "run" / logger
    ids, values = read(folder)
    assert ids == {(folder / "run_id").read_text()}
    assert sorted(values["train/loss"]) == [1, 2, 3, 4]
    assert sorted(values["val/loss"]) == [2, 4]
    assert all(0 < value < 20 for value in values["train/loss"].values())
    assert sorted(values["throughput/samples_per_s"]) == [2, 4]  # the first step of each start is not measured
    shown = values["samples/1" if logger == "swanlab" else "samples/1/filenames"]
    assert sorted(shown) == [2, 4]
    assert len(list(folder.rglob("*.png"))) == 2
    if logger == "wandb":
        assert values["config/seed"] == {0: 429}
    else:
        assert any("seed" in path.read_text() for path in folder.rglob("config.yaml"))
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("data", "runs", "cache")] == []


def test_several_loggers_can_be_chosen_at_once() -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", overrides=["logger=[default,wandb,swanlab]"])
    assert sorted(cfg.logger) == ["csv", "swanlab", "tensorboard", "wandb"]


@pytest.mark.parametrize("logger", ["wandb", "swanlab"])
def test_a_missing_package_is_named_with_what_installs_it(
    logger: str, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, logger, None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"^logger: {logger} .*\[loggers\]"):
        run(*settings, f"logger={logger}")
    assert not (tmp_path / "runs").exists()
