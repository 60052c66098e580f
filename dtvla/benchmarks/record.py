"""A benchmark's result: made, printed and written to a new JSON file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from dtvla.benchmarks import STUDIES, check_study
from dtvla.benchmarks.tables import tables
from dtvla.rollout import results as records

FORMAT = "dtvla.benchmark"
FORMAT_VERSION = 1


def settings_of(study: str | None, values: Mapping[str, Any]) -> Any:
    """The settings object of a study from plain values; those that it has no field for are left aside.

    Raises:
        UserError: no such study, or a value that does not fit.
    """
    kind = import_module(STUDIES[check_study(study)]).Settings
    known = {field.name for field in fields(kind)}
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in known})


def run(study: str | None, settings: Any, folder: Path, command: str | None = None) -> Path:
    """Make a study, print its tables and write it to a new file in ``folder``.

    Args:
        study: one of :data:`dtvla.benchmarks.STUDIES`.
        settings: of the study.
        folder: made when it is missing.
        command: repeats the study; recorded.

    Returns:
        The file: ``<study>-<what was measured>.json``, numbered when there is one of that name.

    Raises:
        UserError: no such study, an unfit setting, or a folder that cannot be written.
    """
    study = check_study(study)
    measure = getattr(import_module(STUDIES[study]), study)
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
    path = write(document, folder, _name(document))
    print(f"\nresults: {path}")
    return path


def _name(document: Mapping[str, Any]) -> str:
    """What was measured: a model on a device, a suite, or a precision."""
    study, settings = document["study"], document["settings"]
    if study == "memory":
        return f"{study}-{document['precision']}"
    if "env" in settings:
        return f"{study}-{settings['env']['suite']}"
    checkpoint = settings["checkpoint"]
    model = Path(checkpoint).name if checkpoint else str(settings["model"].get("name", "model"))
    return f"{study}-{model}-{document['device'].replace(':', '')}-{document['dtype']}"


def write(document: Mapping[str, Any], folder: Path, name: str) -> Path:
    """Write strict JSON to ``<name>.json``, or ``<name>-2.json`` and so on: no file is overwritten."""
    path, number = folder / f"{name}.json", 2
    while path.exists():
        path, number = folder / f"{name}-{number}.json", number + 1
    records.write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path
