"""The sections of a report about runs: a training, its demonstrations, and what is behind an evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtvla.analysis.contents import Picture, Section, Table
from dtvla.analysis.curves import PANELS, plot_curves, read_metrics
from dtvla.analysis.facts import phase_seconds, read_facts, shared_states
from dtvla.analysis.frames import Run
from dtvla.analysis.sources import METRICS_FILE
from dtvla.analysis.tables import duration, known_facts


def training_section(name: str, run: Path) -> Section:
    """Curves and facts of a training run.

    Raises:
        UserError: a file of the run is damaged.
    """
    series = read_metrics(run / METRICS_FILE)
    facts = read_facts(run / "result.json")
    figures = {panel.title: plot_curves(series, [panel]) for panel in PANELS}
    last = [
        [metric, str(steps[-1]), f"{values[-1]:.4g}"]
        for metric, (steps, values) in series.items()
        if metric.startswith(("val/", "rollout/", "sampled/success", "sampled/reward"))
    ]
    known = {"optimiser steps": facts.get("steps"), "parameters": facts.get("parameters"), "time": _time(facts)}
    return Section(
        f"training-{name}",
        f"Training of {name}",
        pictures=[Picture(figure, title) for title, figure in figures.items() if figure is not None],
        tables=[Table(["measured", "step", "last value"], last)] if last else [],
        command=facts.get("command"),
        facts=known_facts(known),
    )


def demonstrations_section(name: str, collected: dict[str, Any], evaluations: Sequence[Run]) -> Section:
    """What a training run learnt from, and whether the evaluations start where a demonstration did."""
    request = collected.get("request", {})
    known = {
        "episodes kept": collected.get("episodes"),
        "episodes tried": collected.get("attempts"),
        "success rate of the tries": collected.get("success_rate"),
        "steps": collected.get("steps"),
        **{key: request.get(key) for key in ("suite", "task_ids", "init_states", "render")},
        "time": _time(collected),
    }
    return Section(
        f"demonstrations-{name}",
        f"Demonstrations of {name}",
        shared_states(collected, evaluations),
        command=collected.get("command"),
        facts=known_facts(known),
    )


def facts_section(run: Run) -> Section:
    """What is behind an evaluation: command, policy, settings, machine and versions."""
    provenance = run.results.provenance
    known = {
        **run.results.settings,
        **{k: provenance.get(k) for k in ("device", "dtype", "started", "resumed")},
        "time since it was resumed" if provenance.get("resumed") else "time": _time(provenance),
        **provenance.get("machine", {}),
        **provenance.get("versions", {}),
    }
    return Section("", run.name, command=provenance.get("command"), facts=known_facts(known))


def _time(facts: dict[str, Any]) -> str | None:
    """How long a phase took, in words."""
    return None if (seconds := phase_seconds(facts)) is None else duration(seconds)
