"""The sections of an HTML report: words, figures and tables, ready for its template."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.analysis.ablation import compare_arms, success_rates
from dtvla.analysis.agreement import agreement
from dtvla.analysis.curves import PANELS, plot_curves, read_metrics
from dtvla.analysis.frames import KEY
from dtvla.analysis.plots import (
    figure_bytes,
    plot_differences,
    plot_latency,
    plot_over_time,
    plot_success,
    plot_tasks,
)
from dtvla.analysis.report import MODE_WORDS, collection_facts, dataset_folder, phase_seconds, read_facts, shared_states
from dtvla.analysis.sources import METRICS_FILE, Arm
from dtvla.analysis.tables import duration, known_facts, number_columns
from dtvla.analysis.tabulate import crossed_success_table, difference_table, number_table, p_value, success_table
from dtvla.analysis.thinking import latency_quantiles, over_time, thought_lengths
from dtvla.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SIGNIFICANT = 0.05
PIXELS_PER_INCH = 96  # CSS's definition
LEAST_SCALE = 0.8  # figures become no smaller than this on a phone, where they can be scrolled instead
QUANTILES = (0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Table:
    """Cells of text; `numbers` are the columns that stand to the right."""

    header: list[str]
    rows: list[list[str]]

    @property
    def numbers(self) -> list[bool]:
        """For each column whether it holds numbers."""
        return number_columns(self.header, self.rows)


@dataclass(frozen=True)
class Picture:
    """A figure as the address of an SVG that holds it, the words for those who do not see it, and pixels."""

    address: str
    words: str
    least_width: int


@dataclass(frozen=True)
class Section:
    """A section of the page: sentences, pictures and tables below a heading, and a note on how to read them.

    Attributes:
        name: its address in the page.
        title: its heading.
        sentences: what is found.
        pictures: figures.
        tables: shown below them.
        note: how to read them.
        command: what repeats it, or None.
        facts: names and values.
    """

    name: str
    title: str
    sentences: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    note: str = ""
    command: str | None = None
    facts: list[tuple[str, str]] = field(default_factory=list)


def picture(figure: "Figure", words: str) -> Picture:
    """The figure, ready for the page."""
    content = base64.b64encode(figure_bytes(figure, "svg")).decode()
    width = round(LEAST_SCALE * PIXELS_PER_INCH * figure.get_figwidth())
    return Picture(f"data:image/svg+xml;base64,{content}", words, width)


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
            pictures=[picture(plot_success(totals), "success of every arm")],
            tables=[Table(*success_table(totals))],
            note="Intervals are Wilson's.",
        )
    ]
    if frame["suite"].nunique() > 1:
        suites = success_rates(frame, ["suite", "arm"])
        drawn = picture(plot_success(suites, "suite"), "success of every arm in every suite")
        found.append(Section("suites", "By suite", [], [drawn], [Table(*crossed_success_table(suites, "arm"))]))
    drawn = picture(plot_tasks(tasks), "success of every arm in every task")
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
        compared = compare_arms(shared, arms[0])
    except UserError as error:
        return Section("differences", title, [*said, f"Not compared: {error}"])
    return Section(
        "differences",
        title,
        said + [_verdict(row) for row in compared.to_dict("records")],
        [picture(plot_differences(compared, arms), f"differences from {arms[0]} with their intervals")],
        [Table(*difference_table(compared))],
        "Differences in percentage points. Intervals come from the paired bootstrap, stratified by task, and have no "
        "width when all pairs agree. lost:won are the pairs that only the baseline, and only the arm, solved; p is "
        "McNemar's, exact, with the seeds of an init state taken together, and Holm's correction is for all rows.",
    )


def thoughts_section(decisions: "pd.DataFrame") -> Section | None:
    """Length of the thoughts that the policies wrote, and their agreement with the action; None when none was."""
    written = decisions[decisions["tokens"] > 0]
    if written.empty:
        return None
    course = over_time(written)
    pictures = [] if course.empty else [picture(plot_over_time(course), "length of thoughts over the episode")]
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
        pictures=[picture(plot_latency(timed), "milliseconds of a decision in every arm")],
        tables=[Table(*number_table(latency_quantiles(timed, quantiles=QUANTILES), 0))],
        note="A batched decision counts in full for each of its episodes.",
    )


def training_section(run: Path, dataset: str | None, arms: Sequence[Arm]) -> Section:
    """Curves and facts of a training run and its demonstrations.

    Raises:
        UserError: a file of the run is damaged, or the dataset is none.
    """
    series = read_metrics(run / METRICS_FILE)
    facts = read_facts(run / "result.json")
    collected = collection_facts(dataset_folder(run, dataset))
    request = collected.get("request", {})
    figures = {panel.title: plot_curves(series, [panel]) for panel in PANELS}
    last = [
        [name, str(steps[-1]), f"{values[-1]:.4g}"]
        for name, (steps, values) in series.items()
        if name.startswith(("val/", "rollout/", "sampled/success", "sampled/reward"))
    ]
    known = {
        "optimiser steps": facts.get("steps"),
        "parameters": facts.get("parameters"),
        "time": None if (seconds := phase_seconds(facts)) is None else duration(seconds),
        "demonstrations kept": collected.get("episodes"),
        "demonstrations tried": collected.get("attempts"),
        "their rendering": request.get("render"),
        "their init states": request.get("init_states"),
    }
    return Section(
        f"training-{run.name}",
        f"Training of {run.name}",
        shared_states(request.get("init_states") or [], [evaluated for arm in arms for evaluated in arm.runs]),
        [picture(figure, title) for title, figure in figures.items() if figure is not None],
        [Table(["measured", "step", "last value"], last)] if last else [],
        command=facts.get("command"),
        facts=known_facts(known),
    )


def facts_sections(arms: Sequence[Arm]) -> list[Section]:
    """What is behind every evaluation: command, policy, settings, machine and versions."""
    found = []
    for run in (run for arm in arms for run in arm.runs):
        provenance = run.results.provenance
        known = {
            **run.results.settings,
            **{k: provenance.get(k) for k in ("device", "dtype", "started", "resumed")},
            "seconds since last start": phase_seconds(provenance),
            **provenance.get("machine", {}),
            **provenance.get("versions", {}),
        }
        found.append(Section("", run.name, command=provenance.get("command"), facts=known_facts(known)))
    return found


def _verdict(row: Mapping[str, Any]) -> str:
    """What the pairs of an arm and the baseline say."""
    low, high = 100 * row["low"], 100 * row["high"]
    judged = "more than chance" if row["p_holm"] < SIGNIFICANT else "may be chance"
    return (
        f"{row['arm']} against {row['baseline']}: {100 * row['difference']:+.1f} points (95 % interval {low:+.1f} to "
        f"{high:+.1f}) over {row['pairs']} pairs: {judged} (p {p_value(row['p_holm'])}, corrected)."
    )


def _agreement(decisions: "pd.DataFrame") -> Table | None:
    """How often the gripper's command is what the thought speaks of, for arms that record it and speak of it."""
    import pandas as pd

    told = decisions[decisions["gripper"].notna()]
    if told.empty:
        return None
    kinds = {"next": "what comes next", "state": "the gripper now"}
    parts = [agreement(told, about=about).assign(about=words) for about, words in kinds.items()]
    table = pd.concat(parts, ignore_index=True).query("spoken > 0")
    table.insert(1, "the thought speaks of", table.pop("about"))
    return None if table.empty else Table(*number_table(table))
