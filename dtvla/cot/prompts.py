"""Prompts for annotators, read from files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from dtvla.cli import config_dir
from dtvla.cot.annotator import Job
from dtvla.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from dtvla.cot.episodes import EpisodeView

_SECTION = re.compile(r"^# (system|frame|again)[ \t\r]*$", re.MULTILINE)
_PLACEHOLDERS = {"instruction", "seconds", "duration", "frame", "frames", "gripper", "cameras", "complaints"}


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        sections: by name; ``frame`` and ``again`` are always there, ``system`` may be.
        digest: sha256 of the file.
    """

    sections: Mapping[str, Template]
    digest: str

    @classmethod
    def load(cls, prompt: str) -> Prompt:
        """Read the file of this path, or of this name among dtvla's own prompts.

        Raises:
            UserError: no such file, a section is missing or twice there, or a placeholder is unknown.
        """
        path = _path(prompt)
        try:
            content = path.read_bytes()
            _, *parts = _SECTION.split(content.decode())
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"annotator.prompt: {path} can't be read ({error})") from None
        names = parts[::2]
        if len({*names}) < len(names) or not {"frame", "again"} <= {*names}:
            raise UserError(
                f"annotator.prompt: {path} has the sections {names}; each once on a line of its own there must be "
                "'# frame' and '# again', and may be '# system'"
            )
        sections = {name: Template(text.strip()) for name, text in zip(names, parts[1::2], strict=True)}
        for name, template in sections.items():
            _check_placeholders(path, name, template)
        return cls(sections, hashlib.sha256(content).hexdigest())

    def messages(self, episode: EpisodeView, job: Job, cameras: Sequence[str]) -> tuple[str | None, str]:
        """The system's message, if there is one, and the user's."""
        seconds, duration = (frame / episode.fps for frame in (job.frame, len(episode) - 1))
        values = {
            "instruction": episode.instruction,
            "seconds": f"{seconds:.1f}",
            "duration": f"{duration:.1f}",
            "frame": job.frame + 1,
            "frames": len(episode),
            "gripper": gripper_words(episode, job.frame),
            "cameras": ", ".join(f"{number}. {camera}" for number, camera in enumerate(cameras, 1)),
            "complaints": "\n".join(f"- {complaint}" for complaint in job.complaints),
        }
        system = self.sections["system"].substitute(values) if "system" in self.sections else None
        names = ["frame", "again"] if job.complaints else ["frame"]
        return system, "\n\n".join(self.sections[name].substitute(values) for name in names)


def gripper_words(episode: EpisodeView, frame: int) -> str:
    """What the gripper is told at a frame and since when, such as ``told to close since 3.4 s``."""
    closing_F = episode.closing_F[: frame + 1]
    same = next((back for back, told in enumerate(closing_F[::-1]) if told != closing_F[-1]), len(closing_F))
    first = frame + 1 - same
    return f"told to {'close' if closing_F[-1] else 'open'} since " + (
        f"{first / episode.fps:.1f} s" if first else "the start"
    )


def fitted(picture_HWC: np.ndarray, longest_side: int | None) -> Image.Image:
    """A uint8 picture (H, W, 3) for a model, its longer side this many pixels; None leaves it as it is."""
    from PIL import Image, ImageOps

    picture = Image.fromarray(picture_HWC)
    return picture if longest_side is None else ImageOps.contain(picture, (longest_side, longest_side))


def _path(prompt: str) -> Path:
    if prompt.endswith(".md") or "/" in prompt:
        return Path(prompt).expanduser()
    folder = config_dir() / "annotator/prompts"
    if not (folder / f"{prompt}.md").is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.md")))
        raise UserError(f"annotator.prompt: there is no {prompt!r}; there are {known}, or give the path of an .md file")
    return folder / f"{prompt}.md"


def _check_placeholders(path: Path, name: str, template: Template) -> None:
    unknown = sorted(set(template.get_identifiers()) - _PLACEHOLDERS)
    if unknown:
        raise UserError(
            f"annotator.prompt: {path}: unknown placeholder ${', $'.join(unknown)} in section {name}; "
            f"there are ${', $'.join(sorted(_PLACEHOLDERS))}"
        )
    if not template.is_valid():
        raise UserError(f"annotator.prompt: {path}: section {name} has a stray dollar sign; write $$ for one")
