"""Entry point: thoughts for the frames of a dataset, checked, as a new dataset with its provenance and a report.

    python -m dtvla.annotate dataset=FOLDER output=FOLDER annotator=state

Settings are in ``conf/annotate.yaml``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.cli import command_line, entry
from dtvla.errors import UserError
from dtvla.kinds import check_kinds

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dtvla.cot.annotator import Annotator
    from dtvla.cot.answers import Answers
    from dtvla.cot.engine import EpisodeLabels, Labeller
    from dtvla.cot.episodes import AnnotatedFrames
    from dtvla.cot.review.decisions import Decision


def annotate(cfg: DictConfig) -> dict[str, Any]:
    """Annotate as configured and print what it came to.

    Returns:
        The record that is stored as ``meta/annotation.json``.

    Raises:
        UserError: a setting, the dataset, the decisions or the annotator is at fault, or ``output`` is taken; answers
            that arrived are kept in ``<output>.partial``.
    """
    from dtvla.cot.answers import Answers
    from dtvla.cot.episodes import AnnotatedFrames
    from dtvla.cot.report import summary

    source, output = _folders(cfg)
    cfg = cfg.copy()
    cfg.output = str(output)  # without a slash at its end: folders beside it are named after it
    dataset = AnnotatedFrames(source)
    labeller = labeller_from(cfg, _decisions(cfg, dataset))
    annotator = _annotator(cfg)
    with closing(annotator) if annotator else nullcontext():
        settings = _settings(cfg, labeller, annotator, dataset.demonstrations.fingerprint)
        partial = Path(f"{output}.partial")
        if (record := _finished(output, settings)) is not None:
            shutil.rmtree(partial, ignore_errors=True)
            print(f"{output}: already annotated, {summary(record)}")
            return record
        try:
            with Answers.open(partial, {name: settings[name] for name in ("dataset", "annotator")}) as answers:
                episodes = _label(dataset, labeller, annotator, answers)
                record = _assemble(partial / "dataset", cfg, dataset, labeller, settings, episodes, answers.totals())
                os.replace(partial / "dataset", output)
                os.sync()  # a power cut must not find the answers gone and the dataset not there yet
                answers.discard()
        except OSError as error:
            raise UserError(
                f"output: {partial} can't be written ({error}); free space, or choose another output=FOLDER"
            ) from error
    print(f"{output}: {summary(record)}")
    return record


def labeller_from(cfg: DictConfig, decisions: Mapping[tuple[int, int], Decision]) -> Labeller:
    """Checks and policies of a configuration; :class:`UserError` names a setting that is out of range or unknown."""
    from dataclasses import fields

    from dtvla.cot.engine import Labeller
    from dtvla.cot.keyframes import KeyFrameSettings
    from dtvla.cot.labels import LabelSettings
    from dtvla.cot.schema import Schema, SchemaSettings
    from dtvla.cot.temporal import Temporal, TemporalSettings
    from dtvla.learning.composing import plain

    def made(kind: Any, group: str) -> Any:
        values = plain(cfg[group])
        check_kinds("", {group: dict}, {group: values})
        check_kinds(group, kind, values)
        return kind(**values)

    asked = {field.name: cfg[field.name] for field in fields(LabelSettings)}
    check_kinds("", LabelSettings, asked)
    settings = LabelSettings(**asked)
    keyframes = made(KeyFrameSettings, "keyframes")
    checks = Schema(made(SchemaSettings, "schema")), Temporal(made(TemporalSettings, "temporal"))
    return Labeller(settings, keyframes, *checks, decisions)


def _folders(cfg: DictConfig) -> tuple[Path, Path]:
    """Source and output."""
    from omegaconf import OmegaConf

    from dtvla.data.hub import locate

    if missing := [name for name in ("dataset", "output") if OmegaConf.is_missing(cfg, name)]:
        raise UserError(f"{', '.join(missing)}: not given; dtvla annotate dataset=FOLDER output=FOLDER")
    kinds: dict[str, Any] = {"dataset": str, "output": str, "decisions": str | None, "pictures": int}
    check_kinds("", kinds, {name: cfg[name] for name in kinds})
    if cfg.pictures < 0 or not cfg.output:
        raise UserError(
            f"output, pictures: found {cfg.output!r}, {cfg.pictures}; give a folder, and 0 or more pictures"
        )
    source, output = locate(str(cfg.dataset), Path(cfg.paths.data), "dataset"), Path(str(cfg.output)).expanduser()
    if source.resolve() in (output.resolve(), *output.resolve().parents):
        raise UserError(f"output: {output} lies in the dataset, which is not changed; choose another output=FOLDER")
    return source, output


def _decisions(cfg: DictConfig, dataset: AnnotatedFrames) -> dict[tuple[int, int], Decision]:
    """What reviewers decided; refused where it is about other thoughts than those of an annotated dataset."""
    from dtvla.cot.provenance import writers
    from dtvla.cot.review.decisions import read_decisions
    from dtvla.data.demonstrations import Demonstrations

    if cfg.decisions is None:
        return {}
    decisions = read_decisions(Path(str(cfg.decisions)).expanduser())
    lengths_E = dataset.demonstrations.stops_E - dataset.demonstrations.starts_E
    data = Demonstrations(dataset.root) if writers(dataset.root) else None
    for (episode, frame), decision in decisions.items():
        if episode >= len(dataset) or frame >= lengths_E[episode]:
            raise UserError(
                f"decisions: there is no frame {frame} of episode {episode} in {dataset.root}; "
                "give the dataset that was reviewed"
            )
        if data and not decision.concerns(data.thought(int(data.starts_E[episode]) + frame) or ""):
            raise UserError(
                f"decisions: the thought at episode {episode}, frame {frame} of {dataset.root} is not the one that was "
                "reviewed; give the dataset that was, or the one that it was made of"
            )
    return decisions


def _annotator(cfg: DictConfig) -> Annotator | None:
    from hydra.utils import get_class

    from dtvla.learning.composing import made, plain

    if cfg.annotator:
        values = plain(cfg.annotator)
        kind = get_class(values.pop("_target_"))
        check_kinds("annotator", kind, {name: value for name, value in values.items() if name != "_convert_"})
        annotator: Annotator = made(cfg.annotator)
        return annotator
    if cfg.decisions is None:
        raise UserError("annotator: none, and no decisions=FILE to take thoughts from; name one of them")
    return None


def _settings(cfg: DictConfig, labeller: Labeller, annotator: Annotator | None, fingerprint: str) -> dict[str, Any]:
    """Everything that the outcome depends on, besides the answers."""
    import json

    from dtvla.cot.provenance import file_digest
    from dtvla.learning.composing import plain

    settings = {
        "dataset": fingerprint,
        "annotator": dict(annotator.identity) if annotator else None,
        "decisions": None if cfg.decisions is None else file_digest(Path(str(cfg.decisions)).expanduser()),
        **asdict(labeller.settings),
        **{name: plain(cfg[name]) for name in ("keyframes", "schema", "temporal")},
        "pictures": cfg.pictures,
    }
    return dict(json.loads(json.dumps(settings)))


def _finished(output: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of the dataset at ``output`` that these settings made; None when there is nothing there."""
    from dtvla.cot.answers import refuse_others
    from dtvla.cot.provenance import earlier_record

    if not output.is_symlink() and (not output.exists() or (output.is_dir() and not any(output.iterdir()))):
        return None
    try:
        record = earlier_record(output)
        found = record["settings"] if record else None
    except (OSError, UserError, KeyError, TypeError):
        record = found = None
    if record is None or found is None:
        raise UserError(f"output: {output} exists and was not made by annotate; set output=... to a new folder")
    refuse_others(f"output: {output} was made", found, settings)
    return record


def _label(
    dataset: AnnotatedFrames, labeller: Labeller, annotator: Annotator | None, answers: Answers
) -> list[EpisodeLabels]:
    """Labels of all episodes, with a progress bar."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from dtvla.cot.engine import Engine

    columns = (TextColumn("labelling frames"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[again]}"))
    total = sum(len(labeller.wanted(dataset[number])) for number in range(len(dataset))) if annotator else 0
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bar, repeated = progress.add_task("", total=total, again=""), 0

        def advance(first: int, again: int) -> None:
            nonlocal repeated
            repeated += again
            progress.update(bar, advance=first, again=f"{repeated} asked again" if repeated else "")

        return Engine(labeller, annotator, answers, advance).run(dataset)


def _assemble(
    target: Path,
    cfg: DictConfig,
    dataset: AnnotatedFrames,
    labeller: Labeller,
    settings: Mapping[str, Any],
    episodes: list[EpisodeLabels],
    totals: Mapping[str, float],
) -> dict[str, Any]:
    """Write the new dataset with its provenance and report into the folder ``target``."""
    from dtvla.cot.provenance import annotation_record, earlier_record, write_provenance, writers
    from dtvla.cot.report import draw_episodes, write_report
    from dtvla.cot.writing import RECORD, REPORT, TABLE, write_annotated
    from dtvla.data.lerobot import write_json

    thoughts = [label.thought for episode in episodes for label in episode.labels]
    if not any(thoughts):
        raise UserError(
            f"{cfg.dataset}: no frame got a thought, nothing is written; loosen the checks or ask another way"
        )
    shutil.rmtree(target, ignore_errors=True)
    write_annotated(dataset.root, target, thoughts)
    facts = {"command": command_line("annotate"), "dataset": str(cfg.dataset), "settings": dict(settings)}
    record = annotation_record(episodes, totals, **facts, before=earlier_record(dataset.root))
    write_provenance(target / TABLE, episodes, settings["annotator"] or {}, labeller.decisions, writers(dataset.root))
    write_json(target / RECORD, record)
    drawn = draw_episodes(target / REPORT, dataset, episodes, cfg.pictures)
    write_report(target / REPORT, record, episodes, drawn)
    return record


@entry("annotate")
def main(cfg: DictConfig) -> None:
    """Annotate a dataset."""
    annotate(cfg)


if __name__ == "__main__":
    main()
