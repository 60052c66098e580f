"""The sections of an HTML report as plain values, ready for its template."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from dtvla.analysis.ablation import compare_arms
from dtvla.analysis.agreement import agreement
from dtvla.analysis.charts import Series, Value, curves_plot, dot_plot, line_plot, thin
from dtvla.analysis.curves import PANELS, read_metrics
from dtvla.analysis.frames import decision_frame
from dtvla.analysis.intervals import Rate
from dtvla.analysis.report import MODE_WORDS, collection_facts, dataset_folder, phase_seconds, ranges, read_facts
from dtvla.analysis.sources import METRICS_FILE, Arm, Sources
from dtvla.analysis.tables import duration
from dtvla.analysis.thinking import over_time
from dtvla.errors import UserError
from dtvla.rollout.results import rate_of

if TYPE_CHECKING:
    import pandas as pd

Section = dict[str, Any]
SIGNIFICANT = 0.05


def arm_rows(arms: Sequence[Arm]) -> list[Section]:
    """Name, size and meaning of every arm; a mode of thought is explained."""
    rows = []
    for arm in arms:
        modes = {str(run.results.settings.get("cot", {}).get("mode")) for run in arm.runs}
        words = MODE_WORDS.get(modes.pop(), "") if len(modes) == 1 else ""
        rows.append({"name": arm.name, "words": words, "episodes": len(arm.episodes)})
    return rows


def success_section(arms: Sequence[Arm]) -> Section | None:
    """Success of the arms: in all, by suite where there are several, and by task; None without episodes."""
    if not arms:
        return None
    totals = [rate_of(episode for _, episode in arm.episodes) for arm in arms]
    suites = dict.fromkeys(e.suite for arm in arms for _, e in arm.episodes)
    tasks = dict.fromkeys((e.suite, e.task_id) for arm in arms for _, e in arm.episodes)
    words = {(e.suite, e.task_id): e.instruction for arm in reversed(arms) for _, e in arm.episodes}
    by_suite = [(suite, _rates(arms, lambda e, suite=suite: e.suite == suite)) for suite in suites]
    by_task = [
        (
            (f"{suite} {number}" if len(suites) > 1 else str(number)) + f": {words[suite, number]}",
            _rates(arms, lambda e, task=(suite, number): (e.suite, e.task_id) == task),
        )
        for suite, number in tasks
    ]
    solved = [[e.steps for _, e in arm.episodes if e.success] for arm in arms]
    return {
        "plot": dot_plot(
            [(arm.name, [_share(i, rate)]) for i, (arm, rate) in enumerate(zip(arms, totals, strict=True))],
            (0, 100),
            unit="%",
        ),
        "totals": totals,
        "steps": [f"{fmean(steps):.0f}" if steps else "–" for steps in solved],
        "suites": by_suite if len(suites) > 1 else [],
        "suite_plot": _share_plot(by_suite) if len(suites) > 1 else None,
        "tasks": by_task,
        "task_plot": _share_plot(by_task) if len(tasks) > 1 else None,
    }


def differences_section(sources: Sources) -> Section | None:
    """Every arm against the first one, pair by pair; None when there is but one arm.

    Arms that share no episode with the first one, and episodes that stand twice, are named instead of compared.
    """
    arms = sources.arms
    if len(arms) < 2 or sources.frame is None:
        return None
    first = arms[0].outcomes().keys()
    strangers = [arm.name for arm in arms[1:] if not first & arm.outcomes().keys()]
    notes = [f"{name} has no episode in common with {arms[0].name} and is not compared with it." for name in strangers]
    rows: list[Section] = []
    frame = sources.frame[~sources.frame["arm"].isin(strangers)]
    if frame["arm"].nunique() > 1:
        try:
            rows = compare_arms(frame, arms[0].name).to_dict("records")
        except UserError as error:
            notes.append(f"Not compared: {error}")
    number = {arm.name: place for place, arm in enumerate(arms)}
    marks = [
        (row["arm"], [_percent_value(number[row["arm"]], row["difference"], row["newcombe_low"], row["newcombe_high"])])
        for row in rows
    ]
    return {
        "baseline": arms[0].name,
        "rows": rows,
        "notes": notes,
        "verdicts": [_verdict(row, several=len(rows) > 1) for row in rows],
        "plot": dot_plot(marks, least=(-10, 10), unit="points") if rows else None,
    }


def thoughts_section(arms: Sequence[Arm]) -> Section | None:
    """Length of the thoughts that the policies wrote, over the steps of an episode; None when they wrote none."""
    rows = []
    for arm in arms:
        thoughts = [t for _, e in arm.episodes for t in e.thoughts if t.tokens]
        if not thoughts:
            continue
        tokens = [t.tokens for t in thoughts]
        after = [(a.text, b.text) for _, e in arm.episodes for a, b in pairwise(e.thoughts)]
        forwards = sum(t.forwards for t in thoughts)
        rows.append(
            {
                "name": arm.name,
                "thoughts": len(thoughts),
                "mean": fmean(tokens),
                "quantiles": [round(q) for q in np.quantile(tokens, (0.1, 0.5, 0.9))],
                "changed": fmean(a != b for a, b in after) if after else None,
                "truncated": fmean(t.truncated for t in thoughts),
                "per_pass": sum(tokens) / forwards if forwards else None,
            }
        )
    if not rows:
        return None
    decisions = decision_frame([run for arm in arms for run in arm.runs])
    lines = _length_over_time(decisions, {arm.name: number for number, arm in enumerate(arms)}, rows)
    plot = line_plot("thought length", "tokens: mean, and the middle half", lines) if lines else None
    return {"rows": rows, "plot": plot, "agreement": _agreement(decisions)}


def decisions_section(arms: Sequence[Arm]) -> Section | None:
    """Seconds that a decision took; None when none was timed."""
    rows, marks = [], []
    for number, arm in enumerate(arms):
        times = [1000 * s for _, e in arm.episodes for s in e.latency]
        if not times:
            continue
        low, middle, high, highest = np.quantile(times, (0.1, 0.5, 0.9, 0.99)).tolist()
        machines = dict.fromkeys(_machine(run.results.provenance) for run in arm.runs)
        rows.append(
            {
                "arm": number, "name": arm.name, "count": len(times), "low": low, "median": middle, "high": high,
                "highest": highest, "machine": "; ".join(m for m in machines if m) or "–",
            }
        )  # fmt: skip
        marks.append((arm.name, [Value(number, middle, low, high, f"{middle:.0f} ms")]))
    return {"rows": rows, "plot": dot_plot(marks, unit="ms")} if rows else None


def training_section(run: Path, dataset: str | None, arms: Sequence[Arm]) -> Section:
    """Curves and facts of a training run and its demonstrations.

    Raises:
        UserError: a file of the run is damaged, or the dataset is none.
    """
    series = read_metrics(run / METRICS_FILE)
    folder = dataset_folder(run, dataset)
    facts = read_facts(run / "result.json")
    collected = collection_facts(folder)
    request = collected.get("request", {})
    used = request.get("init_states") or []
    tested = {i for arm in arms for r in arm.runs for i in r.results.settings.get("init_states") or []}
    seconds = phase_seconds(facts)
    return {
        "name": run.name,
        "plots": [plot for panel in PANELS if (plot := curves_plot(panel, series)) is not None],
        "last": [
            (name, steps[-1], values[-1])
            for name, (steps, values) in series.items()
            if name.startswith(("val/", "rollout/", "sampled/success", "sampled/reward"))
        ],
        "command": facts.get("command"),
        "facts": _given(
            {
                "optimiser steps": facts.get("steps"),
                "parameters": facts.get("parameters"),
                "time": None if seconds is None else duration(seconds),
                "demonstrations kept": collected.get("episodes"),
                "demonstrations tried": collected.get("attempts"),
                "their rendering": request.get("render"),
                "their init states": ranges(used),
            }
        ),
        "shared": ranges(sorted(tested & set(used))) if used and tested else None,
    }


def facts_section(sources: Sources) -> list[Section]:
    """What is behind every evaluation: command, policy, settings, machine and versions."""
    return [
        {
            "name": run.name,
            "command": run.results.provenance.get("command"),
            "facts": _given(
                {
                    **_flat(run.results.settings),
                    **{k: run.results.provenance.get(k) for k in ("device", "dtype", "started", "resumed")},
                    "seconds since last start": phase_seconds(run.results.provenance),
                    **_flat(run.results.provenance.get("machine", {})),
                    **run.results.provenance.get("versions", {}),
                }
            ),
        }
        for arm in sources.arms
        for run in arm.runs
    ]


def _rates(arms: Sequence[Arm], belongs: Any) -> list[Rate | None]:
    parts = [[e for _, e in arm.episodes if belongs(e)] for arm in arms]
    return [rate_of(part) if part else None for part in parts]


def _share_plot(rows: Sequence[tuple[str, Sequence[Rate | None]]]) -> Any:
    marks = [(label, [_share(i, rate) for i, rate in enumerate(rates) if rate is not None]) for label, rates in rows]
    return dot_plot(marks, (0, 100), unit="%")


def _share(arm: int, rate: Rate) -> Value:
    words = f"{100 * rate.share:.1f} %" if rate.episodes >= 100 else f"{rate.successes}/{rate.episodes}"
    return Value(arm, 100 * rate.share, 100 * rate.low, 100 * rate.high, words)


def _percent_value(arm: int, value: float, low: float, high: float) -> Value:
    return Value(arm, 100 * value, 100 * low, 100 * high, f"{100 * value:+.1f}")


def _verdict(row: Mapping[str, Any], *, several: bool) -> dict[str, str]:
    """What the pairs of an arm and the baseline say, in words; the judgement stands apart."""
    p = row["p_holm"]
    low, high = 100 * row["newcombe_low"], 100 * row["newcombe_high"]
    correction = ", corrected for the number of comparisons" if several else ""
    return {
        "found": f"{row['arm']} against {row['baseline']}: {100 * row['difference']:+.1f} points "
        f"(95 % interval {low:+.1f} to {high:+.1f}) over {row['pairs']} pairs:",
        "judged": "more than chance" if p < SIGNIFICANT else "may be chance",
        "why": f"(p {p_words(p)}{correction}).",
    }


def p_words(p: float) -> str:
    """A p-value as it is read: ``< 0.0001`` or ``0.0312``."""
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _length_over_time(decisions: "pd.DataFrame", numbers: Mapping[str, int], rows: Sequence[Section]) -> list[Series]:
    lines = []
    for row in rows:
        course = over_time(decisions[decisions["arm"] == row["name"]], "tokens")
        if not course.empty:
            steps = course["step"].tolist()
            x, mean = thin(steps, course["mean"].tolist())
            low, high = (thin(steps, course[name].tolist())[1] for name in ("low", "high"))
            lines.append(Series(row["name"], numbers[row["name"]], x, mean, (low, high)))
    return lines


def _agreement(decisions: "pd.DataFrame") -> list[Section]:
    """How often the gripper's command is what the thought speaks of, for arms that record it and speak of it."""
    told = decisions[decisions["gripper"].notna() & (decisions["thought"] != "")]
    if told.empty:
        return []
    kinds = (("next", "what comes next"), ("state", "the gripper now"))
    return [
        {**row, "about": words}
        for about, words in kinds
        for row in agreement(told, about=about).to_dict("records")
        if row["spoken"]
    ]


def _machine(provenance: Mapping[str, Any]) -> str:
    machine = provenance.get("machine", {})
    device = ", ".join(dict.fromkeys(machine.get("gpus") or [])) if provenance.get("device") != "cpu" else ""
    return " ".join(str(part) for part in (device or machine.get("processor"), provenance.get("dtype")) if part)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _given(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value in words) of what is known."""
    return [(name.replace("_", " "), _words(value)) for name, value in facts.items() if value not in (None, [], "")]


def _words(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        return ranges(value)
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(_words(item) for item in value)
    return f"{value:,.6g}" if isinstance(value, float) else str(value)
