"""Success of several arms, and their differences from one of them over the same episodes."""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from dtvla.analysis.frames import KEY, check_poolable, say
from dtvla.analysis.intervals import clustered_wilson
from dtvla.analysis.pairing import tally
from dtvla.analysis.resampling import bootstrap_ratio, holm
from dtvla.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

LEAST_RARER = 10
"""Fewest init states that end otherwise than most of their task for a bootstrap; with fewer it is too sure: its 95 %
intervals then cover as little as 80 % (ten or twenty pairs)."""
_PARTS = ("suite", "task_id")
_STATE = ["suite", "task_id", "init_state"]


def success(frame: "pd.DataFrame", by: str | Sequence[str] = ("arm",)) -> "pd.DataFrame":
    """Success rates with Wilson's 95 % intervals; what stands against pooling the rows is said.

    Several episodes of an init state (seeds, or runs that are pooled) are not taken for independent, see
    :func:`dtvla.analysis.intervals.clustered_wilson`.

    Args:
        frame: of :func:`dtvla.analysis.frames.load_results`, all or part of it.
        by: columns whose values make the groups, e.g. ``["arm", "suite"]`` or ``["arm", "suite", "task_id", "task"]``.

    Returns:
        The columns `by`, ``successes``, ``episodes``, ``rate``, ``low``, ``high`` (shares), in order of appearance.

    Raises:
        UserError: there are no rows, or no such column.
    """
    need_columns(frame, ["run", "arm", *KEY])
    for sentence in check_poolable(frame):
        say(sentence)
    return success_rates(frame, by)


def success_rates(frame: "pd.DataFrame", by: str | Sequence[str]) -> "pd.DataFrame":
    """As :func:`success`, for callers that have said what stands against pooling."""
    import pandas as pd

    groups = columns(by)
    need_columns(frame, [*groups, *_STATE, "success"])
    rows = []
    for names, part in frame.groupby(groups, sort=False, dropna=False):
        states = part.groupby(_STATE, sort=False)["success"].agg(["sum", "count"])
        rows.append([*names, *clustered_wilson(states.to_numpy(int).tolist()).to_dict().values()])
    return pd.DataFrame(rows, columns=[*groups, "successes", "episodes", "rate", "low", "high"])


def compare_arms(
    frame: "pd.DataFrame",
    baseline: str,
    *,
    by: str | Sequence[str] = (),
    n_boot: int = 10_000,
    seed: int = 0,
) -> "pd.DataFrame":
    """Every arm against a baseline over the episodes that both have run; what limits the comparison is said.

    Episodes are paired by suite, task, init state and seed. ``low`` and ``high`` are the 95 % interval of the paired
    bootstrap, stratified by task, which draws init states with all their seeds; where fewer than :data:`LEAST_RARER`
    init states end otherwise than most of their task, they are those of :attr:`dtvla.analysis.pairing.Paired.interval`.
    ``p_value`` is that of McNemar's exact test; where an init state has several seeds, of its generalisation
    :func:`dtvla.analysis.pairing.flip_test`. ``p_holm`` is corrected for all rows of the table.

    Args:
        frame: of :func:`dtvla.analysis.frames.load_results`, all or part of it.
        baseline: the arm that the others are compared with.
        by: ``["suite"]`` or ``["suite", "task_id"]`` for a comparison of each; none for one over everything.
        n_boot: draws of the bootstrap.
        seed: of the bootstrap.

    Returns:
        A row for each arm but the baseline (and each part): `by`, ``arm``, ``baseline``, ``pairs``, ``both``,
        ``only_arm``, ``only_baseline``, ``neither``, ``rate``, ``baseline_rate`` (of the pairs; with ``_low`` and
        ``_high`` Wilson's intervals), ``difference``, ``low``, ``high``, the p-values, and ``left_out`` and
        ``baseline_left_out``, episodes of either without a partner.

    Raises:
        UserError: unknown baseline or part, a single arm, episodes that stand twice, or none in common.
    """
    need_columns(frame, ["run", "arm", *KEY])
    for sentence in check_poolable(frame):
        say(sentence)
    return arm_differences(frame, baseline, by=by, n_boot=n_boot, seed=seed)


def arm_differences(
    frame: "pd.DataFrame", baseline: str, *, by: str | Sequence[str] = (), n_boot: int = 10_000, seed: int = 0
) -> "pd.DataFrame":
    """As :func:`compare_arms`, for callers that have said what stands against comparing."""
    import pandas as pd

    groups = columns(by)
    need_columns(frame, ["arm", *KEY, "success"])
    if not set(groups) <= set(_PARTS):
        raise UserError(f"by: found {groups}; use none, or some of {', '.join(_PARTS)}")
    arms = list(dict.fromkeys(frame["arm"]))
    if baseline not in arms or len(arms) < 2:
        known = "; ".join(map(str, arms))
        raise UserError(f"baseline: found {baseline!r}; give one of at least two arms; there are {known}")
    outcomes = {arm: _outcomes(frame, arm) for arm in arms}
    rows: list[dict[str, Any]] = []
    for arm in (a for a in arms if a != baseline):
        pairs = pd.concat({"baseline": outcomes[baseline], "arm": outcomes[arm]}, axis=1, join="inner")
        if pairs.empty:
            raise UserError(f"arm {arm}: no episode in common with {baseline}; evaluate both on the same episodes")
        parts = pairs.groupby(groups, sort=False) if groups else [((), pairs)]
        for names, part in parts:
            mine, other = (_part(outcomes[a], groups, names) for a in (arm, baseline))
            facts = _difference(part, n_boot=n_boot, seed=seed)
            left_out = {"left_out": len(mine) - len(part), "baseline_left_out": len(other) - len(part)}
            named = dict(zip(groups, names, strict=True))
            rows.append({**named, "arm": arm, "baseline": baseline, **facts, **left_out})
    table = pd.DataFrame(rows)
    table.insert(table.columns.get_loc("p_value") + 1, "p_holm", holm(table["p_value"].tolist()))
    return table


def columns(by: str | Sequence[str]) -> list[str]:
    """Names of columns, of which a single one may be given alone."""
    return [by] if isinstance(by, str) else list(by)


def need_columns(frame: "pd.DataFrame", names: Sequence[str]) -> None:
    """Raise a :class:`UserError` when the frame has no rows or lacks a column."""
    missing = [name for name in names if name not in frame.columns]
    if missing or frame.empty:
        found = f"no column {', '.join(missing)}" if missing else "no rows"
        raise UserError(f"frame: it has {found}; use episode_frame or decision_frame of runs that recorded such")


def _outcomes(frame: "pd.DataFrame", arm: str) -> "pd.Series":
    """Success of an arm's episodes, by key."""
    rows = frame[frame["arm"] == arm].set_index(KEY)["success"]
    if rows.index.has_duplicates:
        suite, task_id, state, seed = rows.index[rows.index.duplicated()][0]
        raise UserError(
            f"arm {arm}: {suite} task {task_id}, init state {state}, seed {seed} stands twice in it, so that it cannot "
            "be paired; load one results folder of each, or set frame['arm'] = frame['run']"
        )
    return rows


def _part(outcomes: "pd.Series", groups: Sequence[str], names: Sequence[Hashable]) -> "pd.Series":
    for group, name in zip(groups, names, strict=True):
        outcomes = outcomes[outcomes.index.get_level_values(group) == name]
    return outcomes


def _difference(pairs: "pd.DataFrame", *, n_boot: int, seed: int) -> dict[str, Any]:
    """Counts, rates, difference, intervals and p-value of outcomes ``arm`` and ``baseline``, indexed by the key."""
    counts = tally(dict(zip(pairs.index, pairs[["baseline", "arm"]].itertuples(index=False, name=None), strict=True)))
    changes = pairs["arm"].astype(int) - pairs["baseline"].astype(int)
    states = changes.groupby(level=_STATE, sort=False).agg(["sum", "count"])
    tasks = [part for _, part in states.groupby(level=["suite", "task_id"], sort=False)]
    rarer = sum(len(part) - part["sum"].value_counts().max() for part in tasks)
    low, high = counts.interval
    if rarer >= LEAST_RARER:
        low, high = bootstrap_ratio([part.to_numpy() for part in tasks], n_boot=n_boot, seed=seed)
    return {
        "pairs": counts.pairs,
        "both": counts.both,
        "only_arm": counts.only_b,
        "only_baseline": counts.only_a,
        "neither": counts.neither,
        **{"rate": counts.rate_b.share, "rate_low": counts.rate_b.low, "rate_high": counts.rate_b.high},
        "baseline_rate": counts.rate_a.share,
        "baseline_rate_low": counts.rate_a.low,
        "baseline_rate_high": counts.rate_a.high,
        "difference": counts.difference,
        "low": low,
        "high": high,
        "p_value": counts.p_value,
    }
