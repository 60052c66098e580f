"""Per-feature statistics in the form of LeRobot's ``stats.json``, exact over all frames."""

from __future__ import annotations

from typing import Any

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def describe(values: np.ndarray, published: bool = False) -> dict[str, Any]:
    """Statistics over the first axis.

    Args:
        values: (F,) or (F, D).
        published: only the fields of a ``norm_stats.json`` (mean, std, min, max, q01, q99).

    Returns:
        Lists of length D (1 for a vector), plus ``count``.
    """
    frames_FD = np.asarray(values, dtype=np.float64).reshape(len(values), -1)
    rows = {"min": frames_FD.min(0), "max": frames_FD.max(0), "mean": frames_FD.mean(0), "std": frames_FD.std(0)}
    rows |= dict(zip(QUANTILES, np.quantile(frames_FD, list(QUANTILES.values()), axis=0), strict=True))
    names = ("mean", "std", "min", "max", "q01", "q99") if published else tuple(rows)
    result: dict[str, Any] = {name: rows[name].tolist() for name in names}
    return result if published else result | {"count": [len(frames_FD)]}


def describe_histogram(counts_C256: np.ndarray) -> dict[str, Any]:
    """Statistics of colour values in [0, 1] from their histogram.

    Args:
        counts_C256: int64, how often each of the 256 values occurs in each of the C channels.

    Returns:
        Nested lists of shape (C, 1, 1), plus ``count`` (number of pixels).
    """
    rows: dict[str, list[Any]] = {name: [] for name in ("min", "max", "mean", "std", *QUANTILES)}
    values = np.arange(256) / 255
    for counts in counts_C256.astype(np.float64):
        total = counts.sum()
        mean = float((counts * values).sum() / total)
        present = values[counts > 0]
        cumulative = np.cumsum(counts)
        channel = {"min": present[0], "max": present[-1], "mean": mean}
        channel["std"] = float(np.sqrt((counts * (values - mean) ** 2).sum() / total))
        channel |= {name: values[np.searchsorted(cumulative, share * total)] for name, share in QUANTILES.items()}
        for name, value in channel.items():
            rows[name].append([[float(value)]])
    return {**rows, "count": [int(counts_C256[0].sum())]}
