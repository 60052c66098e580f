"""Protects metrics.csv: no row lost by a kill, none doubled by a resume."""

from __future__ import annotations

import csv
from pathlib import Path

from dtvla.learning.csv_log import MetricsCSV


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [dict(row) for row in csv.DictReader(file)]


def test_every_row_is_on_disk_at_once_and_new_columns_widen_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.csv"
    log = MetricsCSV(str(path))
    log.log_metrics({"train/loss": 2.0, "epoch": 0}, step=10)
    assert rows(path) == [{"step": "10", "train/loss": "2.0"}]
    log.log_metrics({"train/loss": 1.5}, step=20)
    log.log_metrics({"val/loss": 1.75}, step=20)
    log.log_metrics({"train/loss": 1.0}, step=30)
    assert rows(path) == [
        {"step": "10", "train/loss": "2.0", "val/loss": ""},
        {"step": "20", "train/loss": "1.5", "val/loss": "1.75"},
        {"step": "30", "train/loss": "1.0", "val/loss": ""},
    ]


def test_resume_keeps_rows_up_to_its_start_and_replaces_later_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(str(path))
    for step in range(10, 60, 10):
        first.log_metrics({"a": float(step), "b": 0.0}, step=step)
    second = MetricsCSV(str(path), start_step=30)
    second.log_metrics({"a": -40.0}, step=40)
    assert [(row["step"], row["a"]) for row in rows(path)] == [
        ("10", "10.0"),
        ("20", "20.0"),
        ("30", "30.0"),
        ("40", "-40.0"),
    ]


def test_a_row_torn_by_a_kill_is_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,a\n10,1.0\n2")
    MetricsCSV(str(path), start_step=10).log_metrics({"a": 2.0}, step=20)
    assert [row["step"] for row in rows(path)] == ["10", "20"]


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,old\n10,1.0\n")
    MetricsCSV(str(path)).log_metrics({"a": 2.0}, step=5)
    assert rows(path) == [{"step": "5", "a": "2.0"}]
