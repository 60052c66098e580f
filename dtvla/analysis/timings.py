"""Results of ``dtvla benchmark latency`` and ``throughput`` as a tidy frame."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

STUDIES = ("latency", "throughput")
TOTAL = "total"
_MS = 1000.0


def load_timings(paths: Iterable[str | os.PathLike[str]]) -> "pd.DataFrame":
    """A row for each measured phase.

    Args:
        paths: files of ``dtvla benchmark``, or folders with such; files of other studies are left out.

    Returns:
        Columns ``study``, ``model``, ``device``, ``dtype``, ``side`` (think, speculate, mask, autoregressive 45, each
        also as ``published ...``), ``batch_size``, ``phase`` (read, thought, act, total), ``median_ms``, ``q1_ms``,
        ``q3_ms`` (of a whole batch), ``floor_ms`` (what the measured device allows at least; NaN for published sides)
        and ``decisions_per_s``.

    Raises:
        UserError: a file is missing or damaged, or none is of these studies.
    """
    import pandas as pd

    given = [Path(path).expanduser() for path in paths]
    files = [file for path in given for file in (sorted(path.rglob("*.json")) if path.is_dir() else [path])]
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
            if document["study"] in STUDIES:
                rows += _rows(document)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"timings: {file} is no result of dtvla benchmark ({error!r}); give others") from None
    if not rows:
        shown = ", ".join(map(str, given))
        raise UserError(f"timings: no result of {' or '.join(STUDIES)} in {shown}; run dtvla benchmark first")
    return pd.DataFrame(rows)


def _rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    floors = document["floor"]["seconds_by_batch_size"]
    same = {"study": document["study"], "model": document["settings"]["model"]["name"]}
    same |= {name: document[name] for name in ("device", "dtype")}
    rows = []
    for record in document["measurements"]:
        size = record["batch_size"]
        for phase, times in record["phases"].items():
            floor = floors.get(str(size), {}).get(record["side"], {}).get(phase, float("nan"))
            row = {**same, "side": record["side"], "batch_size": size, "phase": phase}
            row |= {f"{name}_ms": _MS * times[f"{name}_s"] for name in ("median", "q1", "q3")}
            rows.append(row | {"floor_ms": _MS * floor, "decisions_per_s": size / times["median_s"]})
    return rows
