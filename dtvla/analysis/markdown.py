"""The report in Markdown, with its pictures as files beside it: for a repository, a terminal, or an editor."""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import count
from pathlib import Path
from urllib.parse import quote

from dtvla.analysis.plots import figure_bytes
from dtvla.analysis.sections import Contents, Section
from dtvla.analysis.sources import Arm
from dtvla.analysis.strip import draw_strip, read_pictures
from dtvla.analysis.tables import markdown_table
from dtvla.rollout.results import write_bytes, write_text


def write_markdown(contents: Contents, arms: Sequence[Arm], output: Path) -> None:
    """Write the page and its pictures, ``<stem>-<number>.png``.

    Args:
        contents: its sections.
        arms: whose films are linked, and shown as a strip of pictures with thoughts.
        output: the file.

    Raises:
        UserError: a file cannot be written, or a film is damaged.
    """
    parts = [f"# {contents.title}", f"dtvla report, {contents.made}"]
    parts += ["\n".join(f"* **{name}**: {number} episodes. {words}".rstrip() for name, number, words in contents.arms)]
    if contents.warnings:
        parts += ["## Compare with care", "\n".join(f"* {sentence}" for sentence in contents.warnings)]
    names = (output.with_name(f"{output.stem}-{number}.png") for number in count(1))
    for section in contents.results:
        parts += [f"## {section.title}", *_body(section, names)]
    parts += _films(arms, output)
    for section in contents.measured:
        parts += [f"## {section.title}", *_body(section, names)]
    for section in contents.behind:
        parts += [f"<details><summary>{escape(section.title)}</summary>", *_body(section, names), "</details>"]
    write_text(output, "\n\n".join(part for part in parts if part) + "\n")


def _body(section: Section, names: Iterator[Path]) -> list[str]:
    parts = list(section.sentences)
    for picture in section.pictures:
        path = next(names)
        write_bytes(path, figure_bytes(picture.figure, "png"))
        parts.append(f"![{picture.words}]({quote(path.name)})")
    parts += [markdown_table(table.header, table.rows) for table in section.tables]
    parts.append(section.note)
    if section.command:
        parts.append(f"```sh\n{section.command}\n```")
    if section.facts:
        parts.append(markdown_table(["what", "value"], [list(fact) for fact in section.facts]))
    return parts


def _films(arms: Sequence[Arm], output: Path) -> list[str]:
    """Links to all films, and a strip of the first one whose episode has thoughts."""
    filmed = [(arm.name, run.folder / e.video, e) for arm in arms for run, e in arm.episodes if e.video]
    if not filmed:
        return []
    lines = []
    for arm, film, e in filmed:
        address = quote(film.relative_to(output.parent.resolve(), walk_up=True).as_posix())
        link = f"[{film.name}]({address})" if film.is_file() else f"{film.name} is not there"
        where = f"{e.suite} task {e.task_id}, init state {e.init_state}, seed {e.seed}"
        lines.append(f"* {arm}, {where}, {'solved' if e.success else 'not solved'}: {link}")
    parts = ["## Films and thoughts", "\n".join(lines)]
    thinking = [(film, e) for _, film, e in filmed if film.is_file() and any(thought.text for thought in e.thoughts)]
    if thinking:
        film, episode = thinking[0]
        strip = draw_strip(episode, read_pictures(film), output.with_name(f"{output.stem}-thoughts.png"))
        parts.append(f"![moments of {film.name} with the thought at each]({quote(strip.name)})")
    return parts
