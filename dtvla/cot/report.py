"""The report of an annotation: one Markdown page with rates per check, the frames that failed, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.analysis.tables import facts_table, markdown_table

if TYPE_CHECKING:
    from dtvla.cot.engine import EpisodeLabels
    from dtvla.cot.episodes import AnnotatedFrames

LISTED = 100  # failed frames that are written out
ORIGIN_WORDS = {
    "annotated": "written by the annotator, all checks passed",
    "reviewed": "accepted or edited by a reviewer",
    "copied": "failed; the last good thought instead",
    "carried": "not labelled; the last thought stands",
    "none": "without a thought",
}


def write_report(
    folder: Path, record: Mapping[str, Any], episodes: Sequence[EpisodeLabels], drawn: Sequence[int]
) -> None:
    """Write ``report.md`` into a folder, which is made.

    Args:
        folder: beside which the dataset lies.
        record: as of :func:`dtvla.cot.provenance.annotation_record`.
        episodes: all that were annotated.
        drawn: numbers of the episodes whose pictures lie there.
    """
    sections = [
        "# Annotation",
        facts_table({name: record[name] for name in ("dataset", "command", "episodes", "frames")}),
        facts_table(record["settings"]["annotator"]) if record["settings"]["annotator"] else "No annotator.",
        "## Thoughts",
        _origins(record),
        "## Checks",
        _checks(record),
        _failures(episodes),
    ]
    if len(record["totals"]) > 1:
        sections += ["## Spent", facts_table(record["totals"])]
    if drawn:
        found = ", ".join(f"{count} {reason}" for reason, count in record["key_frames"].items())
        sections += ["## Key frames", found, *(f"![episode {n}]({picture_name(n)})" for n in drawn)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text("\n\n".join(section for section in sections if section) + "\n")


def draw_episodes(
    folder: Path, dataset: AnnotatedFrames, episodes: Sequence[EpisodeLabels], pictures: int
) -> list[int]:
    """Draw the key frames of the first ``pictures`` episodes into a folder; their numbers, none without cameras."""
    from dtvla.cot.episode_picture import draw_episode
    from dtvla.data.staging import CAMERA_KEYS

    if not dataset.cameras:
        return []
    camera = next((key for key in CAMERA_KEYS.values() if key in dataset.cameras), dataset.cameras[0])
    folder.mkdir(parents=True, exist_ok=True)
    for episode in episodes[:pictures]:
        draw_episode(dataset[episode.number], episode.reasons, folder / picture_name(episode.number), camera)
    return [episode.number for episode in episodes[:pictures]]


def picture_name(number: int) -> str:
    """File with the picture of an episode."""
    return f"episode_{number:06d}.png"


def summary(record: Mapping[str, Any]) -> str:
    """One line: frames by origin, and what the checks refused."""
    origins = ", ".join(f"{count} {origin}" for origin, count in record["origins"].items() if count)
    line = f"{record['episodes']} episodes, {record['frames']} frames: {origins}"
    if record["asked"]:
        line += f"; of {record['asked']} asked {record['passed_later']} passed later, {record['failed']} failed"
    return line


def _origins(record: Mapping[str, Any]) -> str:
    total = max(1, record["frames"])
    rows = [
        [f"`{origin}`", str(count), f"{100 * count / total:.2f} %", ORIGIN_WORDS[origin]]
        for origin, count in record["origins"].items()
    ]
    return markdown_table(["origin", "frames", "share", ""], rows)


def _checks(record: Mapping[str, Any]) -> str:
    asked = record["asked"]
    lines = []
    if asked:
        shares = [f"{record[name]} ({100 * record[name] / asked:.2f} %)" for name in ("passed_at_once", "passed_later")]
        failed = f"{record['failed']} ({100 * record['failed'] / asked:.2f} %)"
        lines.append(
            f"Of {asked} frames that were asked {shares[0]} passed at once, {shares[1]} later, {failed} failed."
        )
    if not record["checks"]:
        return "\n\n".join([*lines, "No check found anything."])
    rows = [
        [f"`{name}`", str(n["first"]), f"{100 * n['first_rate']:.2f} %", str(n["last"]), str(n["result"])]
        for name, n in record["checks"].items()
    ]
    table = markdown_table(["check", "refused first answers", "rate", "refused last answers", "in the result"], rows)
    note = (
        "*In the result* are frames that the comparison of thoughts still finds when copied, carried and reviewed ones "
        "stand among the others."
    )
    return "\n\n".join([*lines, table, note])


def _failures(episodes: Sequence[EpisodeLabels]) -> str:
    failed = [(episode, frame) for episode in episodes for frame in episode.failed]
    if not failed:
        return ""
    rows = []
    for episode, frame in failed[:LISTED]:
        label = episode.labels[frame]
        found = "; ".join(f"{violation.check}: {violation.message}" for violation in label.refused[-1])
        rows.append([str(episode.number), str(frame), str(label.attempts), found, label.origin])
    table = markdown_table(["episode", "frame", "answers", "the last one was refused by", "now"], rows)
    more = f"\n\n... and {len(failed) - LISTED} more." if len(failed) > LISTED else ""
    return f"## Frames that failed\n\n{table}{more}"
