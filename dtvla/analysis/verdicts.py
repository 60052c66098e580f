"""Which published differences are more than chance: in numbers, in words and as a Markdown page."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtvla.analysis.intervals import wilson
from dtvla.analysis.published import ALL, SUITES, counts, labels, load, rates, recount_claims
from dtvla.analysis.tables import markdown_table
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


def to_markdown() -> str:
    """The published results on one page: rates, claims recounted, and which differences are significant."""
    table = counts()
    own, others = differences(table), differences(table, SYSTEM_PAIRS)
    parts = [
        "# Published results on LIBERO",
        CAVEATS,
        "## Success in %, with Wilson's 95 % interval of the total",
        _rates_table(rates(table)),
        "## Printed and recounted",
        _claims_table(),
        "## Differences within DeepThinkVLA",
        _differences_table(own),
        "\n".join(f"- {sentence}." for sentence in in_words(own[own["suite"] == ALL])),
        "## Differences between systems",
        _differences_table(others),
        "\n".join(f"- {sentence}." for sentence in in_words(others[others["suite"] == ALL])),
    ]
    return "\n\n".join(parts) + "\n"


def _rates_table(frame: "pd.DataFrame") -> str:
    """Percentages as they are printed, where they are; totals as counted."""
    names, rows, printed = labels(), [], load("systems").set_index(["run", "split"])["percent"].to_dict()
    for run, group in frame.groupby("run", sort=False):
        of = group.set_index("suite")
        counted = of["percent"].to_dict()
        percent = [f"{printed.get((run, s), counted[s]):.1f}" if s in counted else "" for s in SUITES]
        total = of.loc[ALL]
        successes = f"{total['successes']:.0f} / {total['episodes']:.0f}"
        interval = _span(total["low"], total["high"])
        rows.append([names.get(str(run), str(run)), *percent, f"{total['percent']:.2f}", interval, successes])
    return markdown_table(["run", *SUITES, ALL, "interval", "successes"], rows)


def _claims_table() -> str:
    names, rows = labels(), []
    verdict = {True: "yes", False: "no", None: "no counts published"}
    for claim in recount_claims().itertuples():
        what, sign = names[claim.run], ""
        if claim.baseline:
            what, sign = f"{what} over {names[claim.baseline]}", "+"
        recounted = "" if claim.agrees is None else f"{claim.recounted:{sign}.2f}"
        rows.append([what, claim.split, f"{claim.printed:{sign}.1f}", recounted, verdict[claim.agrees], claim.source])
    return markdown_table(["what", "where", "printed", "recounted", "agrees", "source"], rows)


def _differences_table(frame: "pd.DataFrame") -> str:
    names = labels()
    rows = [
        [
            names.get(row.b, row.b),
            names.get(row.a, row.a),
            row.suite,
            f"{row.points:+.2f}",
            _span(row.low, row.high, "+"),
            f"{row.z:+.2f}",
            p_value(row.p_fisher),
            p_value(row.p),
            p_value(row.p_holm),
            "yes" if row.significant else "n.s.",
        ]
        for row in frame.itertuples()
    ]
    header = ["run", "against", "suite", "points", "interval", "z", "Fisher's p", "p", "corrected", "significant"]
    return markdown_table(header, rows)


def _span(low: float, high: float, sign: str = "") -> str:
    return f"{low:{sign}.1f} to {high:{sign}.1f}"
