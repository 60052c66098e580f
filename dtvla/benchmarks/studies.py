"""The studies: which sides are timed, and what is compared with what."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dtvla.benchmarks.floor import Rates, Workload, measure_rates
from dtvla.benchmarks.settings import Settings
from dtvla.benchmarks.subject import Inputs, Subject
from dtvla.benchmarks.target import Target
from dtvla.benchmarks.timing import TOTAL, Mark, Side, interleave
from dtvla.policy.placement import type_name

PUBLISHED = "published "  # begins the name of a side that goes the published way


@dataclass
class Answers:
    """What the sides decided when they last ran, to compare with one another."""

    thoughts: dict[str, list[list[int]]] = field(default_factory=dict)
    bins: dict[str, Tensor] = field(default_factory=dict)
    forwards: dict[str, int] = field(default_factory=dict)


TARGETS = {
    "cpu": [Target("think: published / ours", True, 2), Target("speculate: published think / ours", True, 5)],
    "cuda": [
        Target("think: published / ours", True, 12),
        Target("think: ours / floor", False, 1.5),
        Target("speculate / mask", False, 3),
        Target("mask / autoregressive 45", False, 0.10),
        Target("think: decisions/s of batch 32 / batch 1", True, 12),
    ],
}


def latency(settings: Settings) -> dict[str, Any]:
    """How long one decision takes and where the time goes, ours beside the published way.

    Returns:
        ``shapes``, ``measurements`` (one for each side), ``floor``, ``ratios``, ``agreement``, ``targets``; see
        ``docs/benchmark.md``.

    Raises:
        UserError: a setting does not suit the model or the machine.
    """
    subject = _subject(settings)
    with torch.inference_mode():
        before = measure_rates(subject.device, subject.dtype)
        answers, rows = Answers(), settings.batch_size
        sides = _sides(subject, subject.inputs(rows), answers)
        sides |= _autoregressive_sides(subject, subject.inputs(rows), answers)
        measurements = _measure(subject, sides, rows, answers)
        rates = before.best(measure_rates(subject.device, subject.dtype))
    floors = _workload(subject, rows, answers).floors(rates, settings.action_tokens)
    ratios = _latency_ratios(measurements, settings.action_tokens)
    for phase, floor_s in floors["think"].items():
        name = "think: ours / floor" if phase == TOTAL else f"think: ours / floor, {phase}"
        median = _find(measurements, "think", rows)["phases"][phase]["median_s"]
        ratios[name] = {"over": ["think", rows, phase], "floor_s": floor_s, "value": median / floor_s}
    return _document(subject, measurements, rates, {str(rows): floors}, ratios) | {"agreement": _agreement(answers)}


def throughput(settings: Settings) -> dict[str, Any]:
    """Decisions per second by batch size; returns and raises what :func:`latency` does."""
    subject = _subject(settings)
    measurements: list[dict[str, Any]] = []
    workloads: dict[str, Workload] = {}
    agreement: dict[str, Any] = {}
    with torch.inference_mode():
        before = measure_rates(subject.device, subject.dtype)
        for rows in settings.batch_sizes:
            answers = Answers()
            sides = _sides(subject, subject.inputs(rows), answers)
            if rows > settings.published_limit:
                sides = {name: side for name, side in sides.items() if not name.startswith(PUBLISHED)}
            measurements += _measure(subject, sides, rows, answers)
            workloads[str(rows)] = _workload(subject, rows, answers)
            agreement[str(rows)] = _agreement(answers)
            if subject.device.type == "cuda":
                torch.cuda.empty_cache()
        rates = before.best(measure_rates(subject.device, subject.dtype))
    floors = {rows: work.floors(rates, ()) for rows, work in workloads.items()}
    ratios: dict[str, Any] = {}
    for rows in settings.batch_sizes:
        for side in ("think", "speculate", "mask"):
            if any(m["side"] == PUBLISHED + _answer_of(side) and m["batch_size"] == rows for m in measurements):
                pair = (PUBLISHED + _answer_of(side), rows, TOTAL), (side, rows, TOTAL)
                ratios[f"{side}: published / ours, batch {rows}"] = _ratio(measurements, *pair)
            if rows > 1 and 1 in settings.batch_sizes:
                pair = (side, 1, TOTAL), (side, rows, TOTAL)
                ratios[f"{side}: decisions/s of batch {rows} / batch 1"] = _ratio(measurements, *pair)
    return _document(subject, measurements, rates, floors, ratios) | {"agreement": agreement}


def _subject(settings: Settings) -> Subject:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return Subject(settings)


def _sides(subject: Subject, inputs: Inputs, answers: Answers) -> dict[str, Side]:
    """Think, speculate and mask, ours and published. The drafts come from a decision that is not timed."""
    first, _ = subject.think(inputs, _no_mark)
    drafts = subject.drafts([thought.ids for thought in first])

    def think(name: str, drafts: Sequence[Sequence[int]] | None, mark: Mark) -> None:
        thoughts, answers.bins[name] = subject.think(inputs, mark, drafts)
        answers.thoughts[name] = [thought.ids for thought in thoughts]
        answers.forwards[name] = max(thought.forwards for thought in thoughts)

    def published_think(mark: Mark) -> None:
        name = PUBLISHED + "think"
        answers.thoughts[name], answers.bins[name] = subject.published_think(inputs, mark)

    return {
        "think": partial(think, "think", None),
        "speculate": partial(think, "speculate", drafts),
        "mask": partial(_store, answers, "mask", partial(subject.mask, inputs)),
        PUBLISHED + "think": published_think,
        PUBLISHED + "mask": partial(_store, answers, PUBLISHED + "mask", partial(subject.published_mask, inputs)),
    }


def _autoregressive_sides(subject: Subject, inputs: Inputs, answers: Answers) -> dict[str, Side]:
    sides: dict[str, Side] = {}
    for number in subject.settings.action_tokens:
        ours, published = subject.autoregressive, subject.published.autoregressive
        name = f"autoregressive {number}"
        sides[name] = partial(_store, answers, name, partial(ours, inputs, number))
        call = partial(published, inputs.pixels_BNCHW, inputs.prompts, number)
        sides[PUBLISHED + name] = partial(_store, answers, PUBLISHED + name, call)
    return sides


def _store(answers: Answers, name: str, run: Callable[[Mark], Tensor], mark: Mark) -> None:
    answers.bins[name] = run(mark)


def _no_mark(phase: str) -> None:
    """Of a decision that is not timed."""


def _measure(subject: Subject, sides: Mapping[str, Side], rows: int, answers: Answers) -> list[dict[str, Any]]:
    """Time the sides; one record for each."""
    settings, done = subject.settings, 0

    def on_round() -> None:
        nonlocal done
        done += 1
        print(f"\rbatch {rows}: round {done} of {settings.warmup + settings.repeats}", end="", file=sys.stderr)

    timings = interleave(
        sides, repeats=settings.repeats, warmup=settings.warmup, device=subject.device, on_round=on_round
    )
    print(file=sys.stderr)
    records = []
    for side, phases in timings.items():
        record: dict[str, Any] = {"side": side, "batch_size": rows}
        if side in answers.thoughts:
            tokens = [len(ids) for ids in answers.thoughts[side]]
            record |= {"thought_tokens": sum(tokens), "longest_thought": max(tokens)}
        if side in answers.forwards:
            record |= {"thought_forwards": answers.forwards[side]}
        records.append(record | {"phases": {phase: timing.to_dict() for phase, timing in phases.items()}})
    return records


def _workload(subject: Subject, rows: int, answers: Answers) -> Workload:
    thought = max(len(ids) for ids in answers.thoughts["think"])
    return Workload(subject.model, subject.layout, rows=rows, prompt=len(subject.prompt), thought=thought)


def _latency_ratios(measurements: list[dict[str, Any]], action_tokens: Sequence[int]) -> dict[str, Any]:
    rows = measurements[0]["batch_size"]

    def of(over: str, under: str, phase: str = TOTAL) -> dict[str, Any]:
        return _ratio(measurements, (over, rows, phase), (under, rows, phase))

    ratios = {"think: published / ours": of(PUBLISHED + "think", "think")}
    ratios |= {
        f"think: published / ours, {phase}": of(PUBLISHED + "think", "think", phase)
        for phase in ("read", "thought", "act")
    }
    ratios["speculate: published think / ours"] = of(PUBLISHED + "think", "speculate")
    ratios["mask: published / ours"] = of(PUBLISHED + "mask", "mask")
    ratios["speculate / mask"] = of("speculate", "mask")
    for number in action_tokens:
        name = f"autoregressive {number}"
        ratios[f"{name}: published / ours"] = of(PUBLISHED + name, name)
        ratios[f"mask / {name}"] = of("mask", name)
        ratios[f"mask / {PUBLISHED}{name}"] = of("mask", PUBLISHED + name)
    return ratios


def _ratio(
    measurements: list[dict[str, Any]], over: tuple[str, int, str], under: tuple[str, int, str]
) -> dict[str, Any]:
    """Median seconds per decision of one thing over those of another; a thing is (side, batch size, phase)."""
    values = []
    for side, rows, phase in (over, under):
        values.append(_find(measurements, side, rows)["phases"][phase]["median_s"] / rows)
    return {"over": list(over), "under": list(under), "value": values[0] / values[1]}


def _find(measurements: list[dict[str, Any]], side: str, rows: int) -> dict[str, Any]:
    return next(m for m in measurements if m["side"] == side and m["batch_size"] == rows)


def _answer_of(side: str) -> str:
    """The side whose answer ``side`` has to give: a thought that is guessed ahead is the same thought."""
    return "think" if side == "speculate" else side


def _agreement(answers: Answers) -> dict[str, dict[str, float]]:
    """Ours against published, and speculation against plain thinking.

    Returns:
        For each pair ``equal_bins`` and ``equal_thoughts``, shares, and ``farthest_bins``, the largest difference.
    """
    pairs = [("speculate", "think")] + [(s, PUBLISHED + s) for s in answers.bins if PUBLISHED + s in answers.bins]
    found: dict[str, dict[str, float]] = {}
    for one, other in pairs:
        # Bins 0 and 1 are the same action, and fresh weights give them the same row: either may win.
        apart = (answers.bins[one].clamp(min=1) - answers.bins[other].clamp(min=1)).abs()
        same = {"equal_bins": (apart == 0).double().mean().item(), "farthest_bins": float(apart.max())}
        if one in answers.thoughts:
            both = list(zip(answers.thoughts[one], answers.thoughts[other], strict=True))
            same["equal_thoughts"] = sum(a == b for a, b in both) / len(both)
        found[f"{one} = {other}"] = same
    return found


def _document(
    subject: Subject, measurements: list[dict[str, Any]], rates: Rates, floors: dict[str, Any], ratios: dict[str, Any]
) -> dict[str, Any]:
    targets = [t.verdict(ratios[t.ratio]["value"]) for t in TARGETS[subject.device.type] if t.ratio in ratios]
    return {
        "device": str(subject.device),
        "dtype": type_name(subject.dtype),
        "threads": torch.get_num_threads(),
        "shapes": subject.shapes(),
        "measurements": measurements,
        "floor": {
            "bytes_per_s": rates.bytes_per_s,
            "flops_per_s": rates.flops_per_s,
            "seconds_by_batch_size": floors,
        },
        "ratios": ratios,
        "targets": targets,
    }
