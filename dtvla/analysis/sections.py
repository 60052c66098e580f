"""The sections of a report about evaluations, and all that it holds."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dtvla.analysis.ablation import LEAST_RARER, arm_differences, success_rates
from dtvla.analysis.agreement import agreement
from dtvla.analysis.contents import Contents, Picture, Section, Table
from dtvla.analysis.facts import MODE_WORDS, demonstration_facts
from dtvla.analysis.frames import KEY, check_poolable, decision_frame, say
from dtvla.analysis.plots import plot_differences, plot_latency, plot_over_time, plot_success, plot_tasks
from dtvla.analysis.run_sections import demonstrations_section, facts_section, training_section
from dtvla.analysis.sources import Arm, Sources
from dtvla.analysis.tabulate import crossed_success_table, difference_table, number_table, p_value, success_table
from dtvla.analysis.thinking import check_hardware, latency_quantiles, over_time, thought_lengths
from dtvla.errors import UserError
from dtvla.rollout.results import now

if TYPE_CHECKING:
    import pandas as pd

SIGNIFICANT = 0.05
QUANTILES = (0.1, 0.5, 0.9, 0.99)


def make_contents(sources: Sources, title: str, dataset: str | None = None) -> Contents:
    """Gather what a report says.

    Args:
        sources: what it is about.
        title: of the page.
        dataset: folder of the demonstrations; None: the one that a training run's configuration names.

    Raises:
        UserError: a file of a training run is damaged, or the dataset is none.
    """
    warnings, results, measured = _evaluated(sources)
    runs = [run for arm in sources.arms for run in arm.runs]
    for name, folder in sources.trainings.items():
        measured.append(training_section(name, folder))
        if collected := demonstration_facts(folder, dataset):
            measured.append(demonstrations_section(name, collected, runs))
    made = now().replace("T", " ").replace("+00:00", " UTC")
    behind = [facts_section(run) for run in runs]
    return Contents(title, made, arm_rows(sources.arms), warnings, results, measured, behind)


def _evaluated(sources: Sources) -> tuple[list[str], list[Section], list[Section]]:
    """What stands against comparing the arms, the sections of their success, and those of thoughts and latency."""
    if sources.frame is None:
        return [], [], []
    decisions = decision_frame([run for arm in sources.arms for run in arm.runs])
    warnings = check_poolable(sources.frame)
    for sentence in warnings:
        say(sentence)
    success, *parts = success_sections(sources.frame)
    results = [success, differences_section(sources.frame), *parts]
    measured = [thoughts_section(decisions), latency_section(decisions)]
    warnings += check_hardware(decisions[decisions["latency_ms"].notna()])
    return warnings, [s for s in results if s], [s for s in measured if s]


def arm_rows(arms: Sequence[Arm]) -> list[tuple[str, int, str]]:
    """Name, number of episodes and meaning of every arm; a mode of thought is explained."""
    rows = []
    for arm in arms:
        modes = {run.mode for run in arm.runs}
        words = MODE_WORDS.get(modes.pop(), "") if len(modes) == 1 else ""
        rows.append((arm.name, len(arm.episodes), words))
    return rows


def success_sections(frame: "pd.DataFrame") -> list[Section]:
    """Success of the arms: in all, by suite where there are several, and by task."""
    totals = success_rates(frame, ["arm"])
    tasks = success_rates(frame, ["suite", "task_id", "task", "arm"])
    found = [
        Section(
            "success",
            "Success in LIBERO",
            pictures=[Picture(plot_success(totals), "success of every arm")],
            tables=[Table(*success_table(totals))],
            note="Intervals are Wilson's, with the seeds of an init state taken together.",
        )
    ]
    if frame["suite"].nunique() > 1:
        suites = success_rates(frame, ["suite", "arm"])
        drawn = Picture(plot_success(suites, "suite"), "success of every arm in every suite")
        found.append(Section("suites", "By suite", [], [drawn], [Table(*crossed_success_table(suites, "arm"))]))
    drawn = Picture(plot_tasks(tasks), "success of every arm in every task")
    found.append(Section("tasks", "By task", [], [drawn], [Table(*crossed_success_table(tasks, "arm"))]))
    return found


def differences_section(frame: "pd.DataFrame") -> Section | None:
    """Every arm against the first one, pair by pair; None when there is but one arm.

    Arms that share no episode with the first one, and episodes that stand twice, are named instead of compared.
    """
    arms = list(dict.fromkeys(frame["arm"]))
    if len(arms) < 2:
        return None
    title = f"Differences from {arms[0]}, pair by pair"
    keys = {arm: set(rows[KEY].itertuples(index=False, name=None)) for arm, rows in frame.groupby("arm", sort=False)}
    strangers = [arm for arm in arms if not keys[arms[0]] & keys[arm]]
    said = [f"{arm} has no episode in common with {arms[0]} and is not compared with it." for arm in strangers]
    shared = frame[~frame["arm"].isin(strangers)]
    if shared["arm"].nunique() < 2:
        return Section("differences", title, said)
    try:
        compared = arm_differences(shared, arms[0])
    except UserError as error:
        return Section("differences", title, [*said, f"Not compared: {error}"])
    return Section(
        "differences",
        title,
        said + [_verdict(row) for row in compared.to_dict("records")],
        [Picture(plot_differences(compared, arms), f"differences from {arms[0]} with their intervals")],
        [Table(*difference_table(compared, name_baseline=False))],
        "Differences in percentage points. Intervals come from the paired bootstrap, stratified by task, or from "
        f"Newcombe's method where fewer than {LEAST_RARER} init states end otherwise than most of their task. lost:won "
        "are the pairs that only the baseline, and only the arm, solved; p is McNemar's, exact, with the seeds of an "
        "init state taken together, and Holm's correction is for all rows.",
    )


def thoughts_section(decisions: "pd.DataFrame") -> Section | None:
    """Length of the thoughts that the policies wrote, and their agreement with the action; None when none was."""
    written = decisions[decisions["tokens"] > 0]
    if written.empty:
        return None
    course = over_time(written)
    pictures = [] if course.empty else [Picture(plot_over_time(course), "length of thoughts over the episode")]
    note = "Only episodes that are not yet solved reach the late steps; those that fewer than 5 reached are not drawn."
    tables = [Table(*number_table(thought_lengths(written, quantiles=QUANTILES[:3]), 1))]
    agreed = _agreement(decisions)
    if agreed:
        tables.append(agreed)
        note += (
            " Agreement: of the decisions whose thought speaks of the gripper, those whose command is what it says. "
            "The fingers lag behind the command, so that agreement about the gripper now is a lower bound."
        )
    return Section("thoughts", "Thoughts over time", [], pictures, tables, note)


def latency_section(decisions: "pd.DataFrame") -> Section | None:
    """How long a decision took; None when none was timed."""
    timed = decisions[decisions["latency_ms"].notna()]
    if timed.empty:
        return None
    return Section(
        "latency",
        "Time of a decision",
        pictures=[Picture(plot_latency(timed), "milliseconds of a decision in every arm")],
        tables=[Table(*number_table(latency_quantiles(timed, quantiles=QUANTILES), 0))],
        note="A batched decision counts in full for each of its episodes.",
    )


def _verdict(row: Mapping[str, Any]) -> str:
    """What the pairs of an arm and the baseline say."""
    low, high = 100 * row["low"], 100 * row["high"]
    judged = "more than chance" if row["p_holm"] < SIGNIFICANT else "may be chance"
    return (
        f"{row['arm']}: {100 * row['difference']:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}) over "
        f"{row['pairs']} pairs: {judged} (p {p_value(row['p_holm'])}, corrected)."
    )


def _agreement(decisions: "pd.DataFrame") -> Table | None:
    """How often the gripper's command is what the thought speaks of, for arms that record it and speak of it."""
    import pandas as pd

    told = decisions[decisions["gripper"].notna()]
    if told.empty:
        return None
    kinds = {"next": "what comes next", "state": "the gripper now"}
    parts = [agreement(told, about=about).assign(about=words) for about, words in kinds.items()]
    order = list(dict.fromkeys(told["arm"]))
    table = pd.concat(parts, ignore_index=True).query("spoken > 0")
    table = table.sort_values("arm", key=lambda arms: arms.map(order.index), kind="stable")
    table.insert(1, "the thought speaks of", table.pop("about"))
    return None if table.empty else Table(*number_table(table))
