"""Protects finished and interrupted runs from being overwritten or continued with other settings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from dtvla.errors import UserError
from dtvla.learning import run_folder
from dtvla.learning.run_folder import RunFolder

CONFIG: dict[str, Any] = {
    "seed": 1,
    "name": "a",
    "model": {"text": {"hidden_size": 8}},
    "data": {"batch_size": 4, "num_workers": 0},
    "algorithm": {"optimizer": {"lr": 1e-3}, "micro_batch_size": None},
    "trainer": {"max_steps": 10, "precision": "32-true", "log_every_n_steps": 1},
}


def interrupted(path: Path) -> RunFolder:
    folder = RunFolder(path)
    assert folder.begin(CONFIG, resume=False) is None
    folder.record(CONFIG)
    folder.checkpoint.parent.mkdir()
    folder.checkpoint.write_bytes(b"weights")
    return folder


def changed(key: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    *groups, last = key.split(".")
    node = config
    for group in groups:
        node = node[group]
    node[last] = value
    return config


def test_an_interrupted_run_is_not_overwritten(tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "run")
    with pytest.raises(UserError, match=rf"{folder.path}.*resume=true.*name="):
        folder.begin(CONFIG, resume=False)
    assert folder.checkpoint.read_bytes() == b"weights"


def test_the_best_policy_of_an_interrupted_run_is_not_left_to_another(tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "run")
    folder.checkpoint.unlink()
    folder.best.mkdir()
    with pytest.raises(UserError, match=r"resume=true.*name="):
        folder.begin(changed("seed", 2), resume=False)
    with pytest.raises(UserError, match="seed"):
        folder.begin(changed("seed", 2), resume=True)
    assert folder.begin(CONFIG, resume=True) is None


def test_resume_returns_the_checkpoint(tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "run")
    assert folder.begin(CONFIG, resume=True) == folder.checkpoint


def test_resume_without_work_begins(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "run").begin(CONFIG, resume=True) is None


def test_a_run_that_saved_nothing_may_begin_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.record(CONFIG)
    assert folder.begin(changed("seed", 2), resume=False) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2),
        ("model.text.hidden_size", 16),
        ("data.batch_size", 8),
        ("algorithm.optimizer.lr", 2e-3),
        ("trainer.max_steps", 20),
        ("trainer.precision", "bf16-mixed"),
    ],
)
def test_resume_with_another_decisive_setting_is_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    folder = interrupted(tmp_path / "run")
    with pytest.raises(UserError, match=key):
        folder.begin(changed(key, value), resume=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.num_workers", 2), ("trainer.log_every_n_steps", 5), ("algorithm.micro_batch_size", 2), ("name", "b")],
)
def test_resume_with_another_harmless_setting_is_fine(tmp_path: Path, key: str, value: object) -> None:
    folder = interrupted(tmp_path / "run")
    assert folder.begin(changed(key, value), resume=True) == folder.checkpoint


def test_a_finished_run_has_a_result(tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "run")
    assert folder.result() is None
    folder.finish({"steps": 10, "metrics": {"val/loss": 0.5}})
    assert folder.result() == {"steps": 10, "metrics": {"val/loss": 0.5}}


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "PATIENCE_S", 0.3)
    folder = RunFolder(tmp_path / "run")
    with folder.held(), pytest.raises(UserError, match="another process is training in"), folder.held():
        pass
    with folder.held():
        pass
