"""Which published differences are more than chance, in numbers and in words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtvla.analysis.intervals import wilson
from dtvla.analysis.published import ALL, labels
from dtvla.analysis.tabulate import p_value
from dtvla.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

PAIRS = (("sft", "rl"), ("sft", "mask"), ("sft", "random"), ("mask", "random"))
SYSTEM_PAIRS = (
    ("pi0-fast", "rl"),
    ("pi0", "rl"),
    ("oft-joint", "rl"),
    ("starvla-oft", "rl"),
    ("pi05-openpi", "rl"),
    ("simplevla-rl", "rl"),
    ("simplevla-sft", "simplevla-rl"),
)
LEVEL = 0.05
CAVEATS = """\
- DeepThinkVLA's published RL result takes its Object suite from the second of two runs, the rest from the first.
- Totals and tests of other systems take the counts nearest to the printed percentages. Protocols differ, such as the
  step limit of libero_10; the 60.2 % of pi0-FAST there may come of one of its settings (openpi issue 1047 reports about
  85 %).
- OpenVLA-OFT's 1500 episodes of a suite are 500 init states with three seeds, but count as independent.
- The tests do not pair episodes, and each run is one training run: they say whether other episodes could turn a
  difference around, not whether another training would.
- z and Fisher's test throw the tasks together; p is exact and keeps tasks apart, or suites where tasks are not known.
  "corrected" is Holm's correction for all rows of the table. Intervals are for single rows, with 95 % coverage."""


def differences(table: "pd.DataFrame", pairs: Sequence[tuple[str, str]] = PAIRS) -> "pd.DataFrame":
    """Success of B minus that of A by suite and over all common suites, with tests.

    Tasks are kept apart where both runs have them, else suites. The Holm correction takes all rows of the result as
    one family.

    Args:
        table: run, suite, task_id, successes, episodes, as :func:`counts` gives them.
        pairs: (A, B), names of runs in it.

    Returns:
        Columns a, b, suite, suites (how many), percent_a, percent_b, points, low, high (95 % interval in points), z and
        p_z (two proportions), p_fisher, p (exact, stratified), p_holm and significant (p_holm below 5 %).

    Raises:
        UserError: there are no pairs, a run is not in the table, two runs have no suite in common or other tasks in
            one, or A and B mix tasks or suites differently so that their totals can't be compared.
    """
    import pandas as pd

    from dtvla.analysis.resampling import holm

    if not pairs:
        raise UserError("pairs: none given; name (A, B), such as ('sft', 'rl')")
    rows = []
    for a, b in pairs:
        common = _common(table, a, b)
        suites = common["suite"].unique().tolist()
        rows += [{"a": a, "b": b, "suite": suite, **_test(common[common["suite"] == suite])} for suite in suites]
        if len(suites) > 1:
            rows.append({"a": a, "b": b, "suite": ALL, **_test(common)})
    frame = pd.DataFrame(rows)
    frame["p_holm"] = holm(frame["p"].tolist())
    frame["significant"] = frame["p_holm"] < LEVEL
    return frame


def _common(table: "pd.DataFrame", a: str, b: str) -> "pd.DataFrame":
    """The counts of A and B side by side: a row for each task if both have tasks, else for each suite."""
    frames = []
    for run in (a, b):
        rows = table[table["run"] == run]
        if rows.empty:
            raise UserError(f"pairs: no run {run!r}; there are {', '.join(sorted(table['run'].unique()))}")
        frames.append(rows)
    if any((rows["task_id"] < 0).any() for rows in frames):
        frames = [rows.assign(task_id=-1) for rows in frames]
    summed = [rows.groupby(["suite", "task_id"], sort=False)[["successes", "episodes"]].sum() for rows in frames]
    both = summed[0].join(summed[1], how="outer", lsuffix="_a", rsuffix="_b", sort=False).reset_index()
    both = both[both["suite"].isin(frames[0]["suite"]) & both["suite"].isin(frames[1]["suite"])]
    if both.empty:
        raise UserError(f"pairs: {a} and {b} have no suite in common; compare others")
    of_a, of_b = both["episodes_a"], both["episodes_b"]
    if both.isna().any(axis=None) or (of_a * of_b.sum() != of_b * of_a.sum()).any():
        raise UserError(f"pairs: {a} and {b} have other tasks, or other shares of episodes in them; compare others")
    return both.astype({f"{column}_{run}": int for column in ("successes", "episodes") for run in "ab"})


def _test(strata: "pd.DataFrame") -> dict[str, float | int]:
    """Difference and tests of one suite or of all."""
    from dtvla.analysis.unpaired import Stratum, difference_interval, exact_p, two_proportion_z

    columns = ["successes_a", "episodes_a", "successes_b", "episodes_b"]
    whole = Stratum(*strata[columns].sum().tolist())
    rate_a, rate_b = wilson(whole.successes_a, whole.episodes_a), wilson(whole.successes_b, whole.episodes_b)
    low, high = difference_interval(rate_a, rate_b)
    z, p_z = two_proportion_z(rate_a, rate_b)
    return {
        "suites": strata["suite"].nunique(),
        "percent_a": 100 * rate_a.share,
        "percent_b": 100 * rate_b.share,
        "points": 100 * (rate_b.share - rate_a.share),
        "low": 100 * low,
        "high": 100 * high,
        "z": z,
        "p_z": p_z,
        "p_fisher": exact_p([whole]),
        "p": exact_p([Stratum(*row) for row in strata[columns].values.tolist()]),
    }


def in_words(frame: "pd.DataFrame") -> list[str]:
    """One sentence for each row of :func:`differences`: how large, how sure, and the verdict."""
    names, sentences = labels(), []
    for row in frame.itertuples():
        a, b = names.get(row.a, row.a), names.get(row.b, row.b)
        where = f"{row.suites} suites" if row.suite == ALL else row.suite
        verdict = "significant" if row.significant else "not significant (n.s.)"
        sentences.append(
            f"{b} against {a}, {where}: {row.points:+.2f} points ({row.percent_b:.2f} % against {row.percent_a:.2f} %; "
            f"95 % interval {row.low:+.2f} to {row.high:+.2f}), p {p_value(row.p)}, corrected {p_value(row.p_holm)}: "
            f"{verdict}"
        )
    return sentences
