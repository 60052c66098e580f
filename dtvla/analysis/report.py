"""The report of a training run: one Markdown page with tables, curves, a strip of thoughts, and how to repeat it."""

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.analysis.curves import draw_curves, read_metrics
from dtvla.analysis.frames import Run, mode_place, read_runs
from dtvla.analysis.strip import draw_strip, read_pictures
from dtvla.analysis.tables import duration, facts_table, markdown_table, percent_interval, ranges, success_bars
from dtvla.errors import UserError
from dtvla.rollout.results import RESULTS_FILE, EpisodeResult, write_text

if TYPE_CHECKING:
    from omegaconf import DictConfig

MODE_WORDS = {
    "think": "the policy writes its own thought and acts on it",
    "mask": "the thought is left empty",
    "random": "the thought is replaced by random tokens",
    "shuffle": "the words of its own thought are permuted",
    "given": "the thought is given",
    "none": "trained and run without thoughts",
}


def write_report(cfg: "DictConfig") -> Path:
    """Write the page that `cfg` (``conf/report.yaml``) describes, with its pictures beside it; print where it is.

    Raises:
        UserError: the run folder, the evaluations or one of their files is missing or damaged.
    """
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(cfg, "run"):
        raise UserError("run: none was given; name folders, dtvla report FOLDER..., or add run=FOLDER")
    run = Path(str(cfg.run)).expanduser()
    if not run.is_dir():
        raise UserError(f"run: {run} is not a folder; give the folder of a training run")
    default = f"{cfg.paths.root}/evaluations/{run.resolve().name}/*"
    evaluations = load_evaluations([default] if cfg.evaluations is None else cfg.evaluations)
    output = run / "report.md" if cfg.output is None else Path(str(cfg.output)).expanduser()
    dataset = dataset_folder(run, cfg.dataset)
    curves = draw_curves(read_metrics(run / "metrics.csv"), output.with_name("curves.png"))
    sections = [
        f"# {cfg.title or 'Report of ' + run.resolve().name}",
        _results_section(evaluations, output.parent),
        _strip_section(evaluations, output.parent),
        _training_section(run, curves, output.parent),
        _collection_section(dataset, evaluations),
        _repeat_section(run, dataset, evaluations),
        _machine_section(evaluations),
    ]
    write_text(output, "\n\n".join(section for section in sections if section) + "\n")
    print(f"report: {output}")
    return output


def load_evaluations(patterns: Sequence[str] | str) -> list[Run]:
    """Read the results in all folders (or files) that match; ordered think, mask, random, ...

    Raises:
        UserError: nothing matches, or a results file is damaged.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    matches = [Path(match) for pattern in patterns for match in sorted(glob.glob(str(Path(pattern).expanduser())))]
    folders = [path for path in matches if path.is_dir() or path.name == RESULTS_FILE]
    if not folders:
        raise UserError(f"evaluations: no {RESULTS_FILE} in {', '.join(patterns)}; run dtvla evaluate first")
    return sorted(read_runs(folders), key=mode_place)


def _results_section(evaluations: Sequence[Run], base: Path) -> str:
    rows = []
    for evaluation in evaluations:
        results = evaluation.results
        rate = results.total()
        latency = results.decision_latency()
        solved = [e.steps for e in results.episodes if e.success]
        rows.append(
            [
                f"**{evaluation.mode}**",
                f"{rate.successes} of {rate.episodes}",
                f"**{100 * rate.share:.1f} %**",
                percent_interval(rate),
                f"{sum(solved) / len(solved):.0f}" if solved else "-",
                "-" if latency is None else f"{1000 * latency:.0f} ms",
                success_bars(rate),
            ]
        )
    header = ["thought", "solved", "success rate", "95 % interval", "steps when solved", "decision", ""]
    notes = [f"* `{e.mode}`: {MODE_WORDS.get(e.mode, '')}" for e in evaluations]
    tasks = dict.fromkeys((e.suite, e.task_id, e.instruction) for v in evaluations for e in v.results.episodes)
    named = [f"* {suite} task {task_id}: *{words}*" for suite, task_id, words in tasks]
    states = dict.fromkeys(ranges(v.results.settings.get("init_states", [])) for v in evaluations)
    named.append(f"* init states {' / '.join(states)} of the benchmark; intervals are Wilson's")
    films = [
        f"* `{v.mode}`, init state {e.init_state}, {'solved' if e.success else 'not solved'}: "
        f"[{e.video}]({_link(v.folder / e.video, base)})"
        for v in evaluations
        for e in v.results.episodes
        if e.video
    ]
    parts = ["## Success in LIBERO", "\n".join(named), markdown_table(header, rows), "\n".join(notes)]
    different = _differences(evaluations)
    if different:
        parts.append(f"**These evaluations also differ in {', '.join(different)}: compare them with care.**")
    if len(tasks) > 1:
        parts.append(_task_table(evaluations))
    if films:
        parts += ["Films with the thought beside the picture:", "\n".join(films)]
    return "\n\n".join(parts)


def _differences(evaluations: Sequence[Run]) -> list[str]:
    """Settings other than the thought mode in which the evaluations are not alike."""
    names = dict.fromkeys(name for v in evaluations for name in v.results.settings if name != "cot")
    first = evaluations[0].results.settings
    return [n.replace("_", " ") for n in names if any(v.results.settings.get(n) != first.get(n) for v in evaluations)]


def _task_table(evaluations: Sequence[Run]) -> str:
    keys = dict.fromkeys(key for v in evaluations for key in v.results.by_task())
    by_mode = [v.results.by_task() for v in evaluations]
    rows = [[suite, str(task), *(str(rates.get((suite, task), "-")) for rates in by_mode)] for suite, task in keys]
    return markdown_table(["suite", "task", *(v.mode for v in evaluations)], rows)


def _strip_section(evaluations: Sequence[Run], base: Path) -> str:
    """A strip of the first filmed episode: one with thoughts and solved, when there is one."""
    filmed = [(v, e) for v in evaluations for e in v.results.episodes if e.video and e.thoughts]
    if not filmed:
        return ""

    def rank(pair: tuple[Run, EpisodeResult]) -> tuple[bool, bool]:
        return not any(thought.text for thought in pair[1].thoughts), not pair[1].success

    evaluation, episode = min(filmed, key=rank)
    picture = draw_strip(
        episode, read_pictures(evaluation.folder / str(episode.video)), base / f"thoughts_{evaluation.mode}.png"
    )
    return f"## What it thought\n\n![moments of an episode with the thought at each]({_link(picture, base)})"


def _training_section(run: Path, curves: Path | None, base: Path) -> str:
    parts = ["## Training"]
    facts = read_facts(run / "result.json")
    if facts:
        parts.append(facts_table({"optimiser steps": facts.get("steps"), "parameters": facts.get("parameters")}))
    if curves is not None:
        parts.append(f"![training curves]({_link(curves, base)})")
    held_out = {k: v for k, v in read_metrics(run / "metrics.csv").items() if k.startswith("val/")}
    rows = [[f"`{name}`", str(steps[-1]), f"{values[-1]:.4g}"] for name, (steps, values) in held_out.items()]
    if rows:
        parts.append(markdown_table(["held-out episodes", "step", "last value"], rows))
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _collection_section(dataset: Path | None, evaluations: Sequence[Run]) -> str:
    facts = collection_facts(dataset)
    if not facts:
        return ""
    request = facts.get("request", {})
    used = request.get("init_states", [])
    rows = {
        "episodes kept": facts.get("episodes"),
        "episodes tried": facts.get("attempts"),
        "success rate of the tries": facts.get("success_rate"),
        "steps": facts.get("steps"),
        "rendering": request.get("render"),
        "init states": ranges(used),
    }
    parts = ["## Demonstrations", facts_table(rows)]
    parts += [f"**{sentence}**" for sentence in shared_states(used, evaluations)]
    return "\n\n".join(parts)


def shared_states(trained: Sequence[int], evaluations: Sequence[Run]) -> list[str]:
    """Whether init states of the evaluations are in the demonstrations, a sentence; none when it is not known."""
    tested = {i for v in evaluations for i in v.results.settings.get("init_states") or []}
    if not trained or not tested:
        return []
    shared = sorted(tested & set(trained))
    if shared:
        return [f"Init states {ranges(shared)} are in the demonstrations and in the evaluation."]
    return ["No init state of the evaluation is in the demonstrations."]


def _repeat_section(run: Path, dataset: Path | None, evaluations: Sequence[Run]) -> str:
    phases = [("collect", collection_facts(dataset)), ("train", read_facts(run / "result.json"))]
    phases += [(f"evaluate ({v.mode}{_part(v)})", v.results.provenance) for v in evaluations]
    times = [(name, seconds) for name, facts in phases if (seconds := phase_seconds(facts)) is not None]
    commands = dict.fromkeys(str(facts["command"]) for _, facts in phases if facts.get("command"))
    parts = ["## How to repeat it"]
    if commands:
        parts.append("```sh\n" + "\n".join(commands) + "\n```")
    if times:
        rows = [[name, duration(seconds)] for name, seconds in times]
        rows.append(["**together**", f"**{duration(sum(seconds for _, seconds in times))}**"])
        parts.append(markdown_table(["phase", "time"], rows))
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _part(evaluation: Run) -> str:
    """What the seconds of an evaluation that was taken up again stand for."""
    return ", since it was resumed" if evaluation.results.provenance.get("resumed") else ""


def phase_seconds(facts: dict[str, Any]) -> float | None:
    """Wall time of a phase, under the name that its command gave it."""
    found = facts.get("seconds", facts.get("seconds_since_last_start"))
    found = found.get("last_run") if isinstance(found, dict) else found
    return None if found is None else float(found)


def collection_facts(dataset: Path | None) -> dict[str, Any]:
    """What `dtvla collect` recorded about a dataset; empty when it recorded nothing."""
    return read_facts(dataset / "meta" / "collection.json") if dataset else {}


def _machine_section(evaluations: Sequence[Run]) -> str:
    provenance = evaluations[0].results.provenance
    facts = {**provenance.get("machine", {}), **provenance.get("versions", {})}
    return f"## Machine and versions\n\n{facts_table(facts)}" if facts else ""


def dataset_folder(run: Path, setting: str | None) -> Path | None:
    """The folder of the demonstrations: as set, else as the run's configuration says, else None."""
    if setting is not None:
        folder = Path(str(setting)).expanduser()
        if not (folder / "meta").is_dir():
            raise UserError(f"dataset: {folder} is not a dataset; give the folder that dtvla collect wrote")
        return folder
    config = run / "config.yaml"
    if not config.is_file():
        return None
    from omegaconf import OmegaConf

    root = OmegaConf.select(OmegaConf.load(config), "data.root")
    return Path(str(root)) if root else None


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


def _link(path: Path, base: Path) -> str:
    return Path(path.resolve()).relative_to(base.resolve(), walk_up=True).as_posix()
