"""What thinking costs: how long decisions take, how long thoughts are, and how both change during an episode."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtvla.analysis.ablation import columns, need_columns
from dtvla.analysis.frames import NOT_RECORDED, say
from dtvla.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

QUANTILES = (0.5, 0.9, 0.99)
_HARDWARE = ("machine", "rule.device", "rule.dtype")


def latency_quantiles(
    decisions: "pd.DataFrame", by: str | Sequence[str] = ("arm",), quantiles: Sequence[float] = QUANTILES
) -> "pd.DataFrame":
    """How long decisions took; arms that were measured on different hardware are said.

    Decisions of a batch count in full for each of its episodes, as each robot waited that long.

    Args:
        decisions: of :func:`dtvla.analysis.frames.decision_frame`, all or part of it.
        by: columns whose values make the groups.
        quantiles: shares in [0, 1].

    Returns:
        The columns `by`, ``decisions``, ``mean_ms``, and ``p50_ms``, ``p90_ms``, ... for the quantiles.

    Raises:
        UserError: no rows, no such column, or a quantile outside [0, 1].
    """
    groups = columns(by)
    need_columns(decisions, [*groups, "latency_ms"])
    for sentence in check_hardware(decisions):
        say(sentence)
    return _quantiles(decisions, groups, "latency_ms", quantiles, "_ms")


def thought_lengths(
    decisions: "pd.DataFrame", by: str | Sequence[str] = ("arm",), quantiles: Sequence[float] = QUANTILES
) -> "pd.DataFrame":
    """How many tokens the model wrote for its thoughts; none for thoughts that it was given.

    Args:
        decisions: of :func:`dtvla.analysis.frames.decision_frame`, all or part of it.
        by: columns whose values make the groups.
        quantiles: shares in [0, 1].

    Returns:
        The columns `by`, ``decisions``, ``mean_tokens``, ``p50_tokens``, ..., ``longest``, ``words`` (mean of the
        text's words), ``truncated`` (share that the limit cut) and ``tokens_per_forward`` (NaN when none was written).

    Raises:
        UserError: no rows, no such column, or a quantile outside [0, 1].
    """
    groups = columns(by)
    need_columns(decisions, [*groups, "tokens", "forwards", "thought", "truncated"])
    table = _quantiles(decisions, groups, "tokens", quantiles, "_tokens")
    words = [len(thought.split()) for thought in decisions["thought"]]  # pandas' str.split takes six times as long
    grouped = decisions.assign(words=words).groupby(groups, sort=False, dropna=False)
    more = grouped.agg(
        longest=("tokens", "max"),
        words=("words", "mean"),
        truncated=("truncated", "mean"),
        tokens=("tokens", "sum"),
        forwards=("forwards", "sum"),
    )
    more["tokens_per_forward"] = more.pop("tokens") / more.pop("forwards").replace(0, float("nan"))
    return table.merge(more.reset_index(), on=groups)


def over_time(
    decisions: "pd.DataFrame", column: str = "tokens", by: str | Sequence[str] = ("arm",), *, least: int = 5
) -> "pd.DataFrame":
    """A number of the decisions by the step at which they were made: mean and quartiles over the episodes.

    Late steps are seen in episodes that were not solved before, which are the hard ones.

    Args:
        decisions: of :func:`dtvla.analysis.frames.decision_frame`, all or part of it.
        column: ``tokens`` or ``latency_ms``, or any other column of numbers.
        by: columns whose values make the groups.
        least: steps that fewer episodes reached are left out, as their mean is one of accidents.

    Returns:
        The columns `by`, ``step``, ``episodes``, ``mean``, ``low`` and ``high`` (first and third quartile), by step.

    Raises:
        UserError: no rows, or no such column.
    """
    groups = [*columns(by), "step"]
    need_columns(decisions, [*groups, column])
    grouped = decisions.groupby(groups, sort=False, dropna=False)[column]
    table = grouped.agg(episodes="count", mean="mean").join(grouped.quantile([0.25, 0.75]).unstack())
    table = table.rename(columns={0.25: "low", 0.75: "high"})
    table = table[table["episodes"] >= least].reset_index()
    return table.sort_values("step", kind="stable", ignore_index=True)


def _quantiles(
    decisions: "pd.DataFrame", by: list[str], column: str, quantiles: Sequence[float], unit: str
) -> "pd.DataFrame":
    wrong = [q for q in quantiles if not 0.0 <= q <= 1.0]
    if wrong:
        raise UserError(f"quantiles: found {wrong[0]}; use shares from 0 to 1, such as 0.99")
    grouped = decisions.groupby(by, sort=False, dropna=False)[column]
    table = grouped.agg(["count", "mean"])
    table.columns = ["decisions", f"mean{unit}"]
    for q in quantiles:
        table[f"p{100 * q:g}{unit}"] = grouped.quantile(q)
    return table.reset_index()


def check_hardware(decisions: "pd.DataFrame") -> list[str]:
    """What the arms of timed decisions do not have alike of machine, device and type of numbers, a sentence each."""
    found = []
    for column in _HARDWARE:
        arms = decisions.groupby("arm", sort=False)[column].unique()
        values = dict.fromkeys(value if isinstance(value, str) else NOT_RECORDED for own in arms for value in own)
        if len(values) > 1:
            found.append(f"latencies were measured on different {column.rpartition('.')[2]}: {', '.join(values)}")
    return found
