"""A CSV logger whose file survives interruptions: one row per logged step, continued on resume."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class MetricsCSV(Logger):
    """Writes ``metrics.csv``: column ``step`` (optimiser steps done), then one column per metric, empty where absent.

    Rows are appended as they come, so a killed process loses none. Metrics of one step share a row when they are
    logged one after the other. A resumed training drops the rows after its start step and continues.
    """

    def __init__(self, path: str, start_step: int = 0) -> None:
        """Take over the rows up to ``start_step`` of an existing file; with 0 the file starts anew.

        Args:
            path: of the CSV file.
            start_step: optimiser steps behind the checkpoint that the training starts from.
        """
        super().__init__()
        self._path = Path(path)
        self._columns = ["step"]
        self._rows: list[dict[str, Any]] = []
        self._start_step = start_step
        self._open = False

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self._path.parent.name

    @property
    def version(self) -> str:
        """No versions: a run has one file."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the file."""
        return str(self._path.parent)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Settings are in the run's config.yaml; nothing to do."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row, or rewrite the file (atomically) when a column is new or the last row grows."""
        if not self._open:
            self._take_over()
        row: dict[str, Any] = {"step": 0 if step is None else int(step)}
        row |= {name: float(value) for name, value in metrics.items() if name not in ("step", "epoch")}
        new = [name for name in row if name not in self._columns]
        self._columns += sorted(new)
        if self._rows and self._rows[-1]["step"] == row["step"]:
            self._rows[-1] |= row
            self._rewrite()
        else:
            self._rows.append(row)
            if new or len(self._rows) == 1:
                self._rewrite()
            else:
                with self._path.open("a", newline="") as file:
                    csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _take_over(self) -> None:
        self._open = True
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._start_step and self._path.is_file():
            text = self._path.read_text()
            reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())  # a kill may have torn the last row
            rows: list[dict[str, Any]] = [{**row, "step": int(row["step"])} for row in reader]
            self._columns = list(reader.fieldnames or self._columns)
            self._rows = [row for row in rows if row["step"] <= self._start_step]
        self._rewrite()

    def _rewrite(self) -> None:
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(self._rows)
        os.replace(temporary, self._path)
