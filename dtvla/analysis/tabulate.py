"""Measured frames as tables for a page: header and rows of text for ``markdown_table`` and ``latex_table``.

markdown_table(*success_table(success(frame, ["arm", "suite"])))
"""

from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

Table = tuple[list[str], list[list[str]]]
_SUCCESS = ("successes", "episodes", "rate", "low", "high")


def success_table(rates: "pd.DataFrame") -> Table:
    """Success rates of :func:`dtvla.analysis.ablation.success` in percent, with their intervals."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "solved": lambda row: f"{row['successes']}/{row['episodes']}",
        "success %": lambda row: percent(row["rate"]),
        "95 % interval": lambda row: _interval(row, "low", "high"),
    }
    return _table(rates, [name for name in rates.columns if name not in _SUCCESS], columns)


def crossed_success_table(rates: "pd.DataFrame", across: str = "suite") -> Table:
    """Success rates in percent, the values of one column (suites, arms) side by side; - where nothing was run.

    Args:
        rates: of :func:`dtvla.analysis.ablation.success`, grouped by `across` and other columns.
        across: the column whose values become columns.
    """
    others = [name for name in rates.columns if name not in (*_SUCCESS, across)]
    sides = list(dict.fromkeys(rates[across]))
    rows: dict[tuple[Any, ...], dict[Any, str]] = {}
    for row in rates.to_dict("records"):
        cell = f"{percent(row['rate'])} ({_interval(row, 'low', 'high')})"
        rows.setdefault(tuple(row[name] for name in others), {})[row[across]] = cell
    header = [*map(_heading, others), *map(str, sides)]
    return header, [[*map(str, key), *(cells.get(side, "-") for side in sides)] for key, cells in rows.items()]


def difference_table(compared: "pd.DataFrame", *, name_baseline: bool = True) -> Table:
    """Differences of :func:`dtvla.analysis.ablation.compare_arms` in percentage points, with intervals and p-values.

    Args:
        compared: of that function.
        name_baseline: with a column that names it; not needed below a heading that does.
    """
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "against": lambda row: str(row["baseline"]),
        "pairs": lambda row: str(row["pairs"]),
        "success %": lambda row: f"{percent(row['baseline_rate'])} to {percent(row['rate'])}",
        "lost:won": lambda row: f"{row['only_baseline']}:{row['only_arm']}",
        "difference": lambda row: f"{100 * row['difference']:+.1f}",
        "95 % interval": lambda row: _interval(row, "low", "high", signed=True),
        "p": lambda row: p_value(row["p_value"]),
        "p (Holm)": lambda row: p_value(row["p_holm"]),
        "without partner": lambda row: f"{row['left_out']}, {row['baseline_left_out']}",
    }
    if not compared[["left_out", "baseline_left_out"]].any(axis=None):
        del columns["without partner"]
    if not name_baseline:
        del columns["against"]
    place = list(compared.columns).index("baseline")
    return _table(compared, list(compared.columns[:place]), columns)


def number_table(measured: "pd.DataFrame", decimals: int = 1) -> Table:
    """Any other measured frame: latencies, thought lengths, agreement (whose shares are given in percent)."""
    shares = {"share", "low", "high", "chance"} if "share" in measured.columns else {"truncated"}

    def cell(name: str, value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        if name in shares:
            return percent(value)
        return "-" if isnan(value) else f"{value:.{2 if name == 'kappa' else decimals}f}"

    header = [_heading(name) + (" %" if name in shares else "") for name in measured.columns]
    return header, [[cell(name, v) for name, v in row.items()] for row in measured.to_dict("records")]


def percent(share: float) -> str:
    """A share in percent with one digit behind the point; - when it is not a number."""
    return "-" if isnan(share) else f"{100 * share:.1f}"


def p_value(p: float) -> str:
    """A p-value: four digits behind the point where it is small, or that it is smaller still; else two."""
    return "<0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def _table(frame: "pd.DataFrame", names: Sequence[str], columns: Mapping[str, Callable[[Any], str]]) -> Table:
    header = [*map(_heading, names), *columns]
    rows = frame.to_dict("records")
    return header, [[*(str(row[n]) for n in names), *(make(row) for make in columns.values())] for row in rows]


def _interval(row: Mapping[str, Any], low: str, high: str, *, signed: bool = False) -> str:
    """Both ends in percent."""
    form = "+.1f" if signed else ".1f"
    return f"{100 * row[low]:{form}} to {100 * row[high]:{form}}"


def _heading(name: str) -> str:
    spoken = name.rpartition(".")[2].replace("_", " ")
    for unit in (" ms", " tokens"):
        if spoken.endswith(unit):
            return f"{spoken.removesuffix(unit)}, {unit.strip()}"
    return spoken
