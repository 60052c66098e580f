"""A benchmark's result: the JSON file and the tables."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dtvla.analysis.tables import markdown_table
from dtvla.benchmarks import check_study, studies
from dtvla.benchmarks.settings import Settings
from dtvla.benchmarks.timing import TOTAL
from dtvla.rollout import results as records

FORMAT = "dtvla.benchmark"
FORMAT_VERSION = 1
MS = 1000.0


def run(study: str | None, settings: Settings, folder: Path, command: str | None = None) -> Path:
    """Make a study, print its tables and write it to a new file in ``folder``.

    Args:
        study: one of :data:`dtvla.benchmarks.STUDIES`.
        settings: of the study.
        folder: made when it is missing.
        command: repeats the study; recorded.

    Returns:
        The file: ``<study>-<model>-<device>-<type>.json``, numbered when there is one of that name.

    Raises:
        UserError: no such study, an unfit setting, or a folder that cannot be written.
    """
    measure = getattr(studies, check_study(study))
    started, clock = records.now(), time.monotonic()
    measured = measure(settings)
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "study": study,
        "settings": asdict(settings),
        "provenance": {
            "command": command,
            "versions": records.versions(),
            "machine": records.machine(),
            "started": started,
            "seconds": round(time.monotonic() - clock, 1),
        },
        **measured,
    }
    print(tables(document))
    model = Path(settings.checkpoint).name if settings.checkpoint else str(settings.model.get("name", "model"))
    name = f"{study}-{model}-{measured['device'].replace(':', '')}-{measured['dtype']}"
    path = write(document, folder, name)
    print(f"\nresults: {path}")
    return path


def write(document: Mapping[str, Any], folder: Path, name: str) -> Path:
    """Write strict JSON to ``<name>.json``, or ``<name>-2.json`` and so on: no file is overwritten."""
    path, number = folder / f"{name}.json", 2
    while path.exists():
        path, number = folder / f"{name}-{number}.json", number + 1
    records.write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path


def tables(document: Mapping[str, Any]) -> str:
    """The numbers in Markdown: times, ratios, targets, and whether both sides decided alike."""
    floor = document["floor"]
    rates = (
        f"{document['device']} {document['dtype']}, {document['threads']} threads; measured "
        f"{floor['bytes_per_s'] / 1e9:.4g} GB/s, {floor['flops_per_s'] / 1e12:.4g} TFLOP/s"
    )
    parts = [rates, _times(document), _ratios(document)]
    if document["targets"]:
        parts.append(_targets(document))
    return "\n\n".join([*parts, _agreement(document)])


def _times(document: Mapping[str, Any]) -> str:
    header = ["batch", "side", "ms", "quartiles", "read", "thought", "tokens/s", "act", "decisions/s"]
    header += ["tokens/forward", "floor ms", "x floor"]
    rows = []
    for record in document["measurements"]:
        phases, size = record["phases"], record["batch_size"]
        total = phases[TOTAL]
        floor = document["floor"]["seconds_by_batch_size"][str(size)].get(record["side"], {}).get(TOTAL)
        rows.append(
            [
                str(size),
                record["side"],
                _ms(total["median_s"]),
                f"{_ms(total['q1_s'])} - {_ms(total['q3_s'])}",
                *(_ms(phases[phase]["median_s"]) if phase in phases else "" for phase in ("read", "thought")),
                f"{record['thought_tokens'] / phases['thought']['median_s']:.4g}" if "thought" in phases else "",
                _ms(phases["act"]["median_s"]),
                f"{size / total['median_s']:.4g}",
                _per_forward(record),
                _ms(floor) if floor else "",
                f"{total['median_s'] / floor:.2f}" if floor else "",
            ]
        )
    return markdown_table(header, rows)


def _per_forward(record: Mapping[str, Any]) -> str:
    if "thought_forwards" not in record:
        return ""
    return f"{record['longest_thought'] / max(1, record['thought_forwards']):.2f}"


def _ratios(document: Mapping[str, Any]) -> str:
    return markdown_table(
        ["ratio of medians", "value"], [[name, f"{r['value']:.3g}"] for name, r in document["ratios"].items()]
    )


def _targets(document: Mapping[str, Any]) -> str:
    rows = []
    for target in document["targets"]:
        limit = f"at least {target['at_least']}" if "at_least" in target else f"at most {target['at_most']}"
        rows.append([target["ratio"], limit, f"{target['value']:.3g}", "met" if target["met"] else "missed"])
    return markdown_table(["target", "limit", "value", "verdict"], rows)


def _agreement(document: Mapping[str, Any]) -> str:
    found = document["agreement"]
    sizes = {str(document["settings"]["batch_size"]): found} if document["study"] == "latency" else found
    rows = [
        [rows, pair, f"{same['equal_thoughts']:.4g}" if "equal_thoughts" in same else ""]
        + [f"{same['equal_bins']:.4g}", f"{same['farthest_bins']:.0f}"]
        for rows, pairs in sizes.items()
        for pair, same in pairs.items()
    ]
    return markdown_table(["batch", "same decision?", "equal thoughts", "equal bins", "farthest bins"], rows)


def _ms(seconds: float) -> str:
    return f"{MS * seconds:.4g}"
