"""What the commands recorded about a training run, its demonstrations and an evaluation, besides their numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtvla.analysis.frames import Run
from dtvla.analysis.tables import ranges
from dtvla.errors import UserError

MODE_WORDS = {
    "think": "the policy writes its own thought and acts on it",
    "mask": "the thought is left empty",
    "random": "the thought is replaced by random tokens",
    "shuffle": "the words of its own thought are permuted",
    "given": "the thought is given",
    "none": "trained and run without thoughts",
}


def read_facts(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file or no object in it.

    Raises:
        UserError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise UserError(f"{path.name}: {path} is damaged ({error}); delete it or make it again") from None
    return content if isinstance(content, dict) else {}


def demonstration_facts(run: Path, dataset: str | None) -> dict[str, Any]:
    """What `dtvla collect` recorded about the demonstrations of a run; empty when it recorded nothing.

    Args:
        run: folder of a training run.
        dataset: folder of the demonstrations; None: the one that the run's configuration names.

    Raises:
        UserError: `dataset` is no dataset, or a file is damaged.
    """
    folder = _configured_dataset(run) if dataset is None else Path(dataset).expanduser()
    if dataset is not None and not (folder and (folder / "meta").is_dir()):
        raise UserError(f"dataset: {folder} is not a dataset; give the folder that dtvla collect wrote")
    return read_facts(folder / "meta" / "collection.json") if folder else {}


def shared_states(collected: dict[str, Any], evaluations: Sequence[Run]) -> list[str]:
    """Whether evaluations start where a demonstration did, a sentence; none when it is not known.

    Args:
        collected: of :func:`demonstration_facts`.
        evaluations: any; init states are compared within their task only.
    """
    request = collected.get("request", {})
    states, tasks = request.get("init_states") or [], request.get("task_ids") or []
    trained = {(request.get("suite"), task, state) for task in tasks for state in states}
    tested = {(e.suite, e.task_id, e.init_state) for v in evaluations for e in v.results.episodes}
    if not trained or not tested:
        return []
    shared = sorted({state for _, _, state in tested & trained})
    if shared:
        return [f"Init states {ranges(shared)} are in the demonstrations and in the evaluation."]
    return ["No init state of the evaluation is in the demonstrations."]


def phase_seconds(facts: dict[str, Any]) -> float | None:
    """Wall time of a phase, under the name that its command gave it."""
    found = facts.get("seconds", facts.get("seconds_since_last_start"))
    found = found.get("last_run") if isinstance(found, dict) else found
    return None if found is None else float(found)


def _configured_dataset(run: Path) -> Path | None:
    config = run / "config.yaml"
    if not config.is_file():
        return None
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        root = OmegaConf.select(OmegaConf.load(config), "data.root")
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        why = " ".join(str(error).split())
        raise UserError(f"config.yaml: {config} cannot be read ({why}); mend it, or set dataset=FOLDER") from None
    return Path(str(root)) if root else None
