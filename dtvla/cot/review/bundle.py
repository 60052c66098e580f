"""Frames to review in one file, with their pictures, so that they can be reviewed where the dataset is not."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dtvla.cot.review.material import EpisodeFacts, LabelledFrame, Material, strip_frames
from dtvla.errors import UserError

FORMAT, VERSION = "dtvla.review_bundle", 1
ODD_PACKING = (NotImplementedError, RuntimeError)  # what zipfile raises for a method that it lacks, and for a password
DAMAGED = (zipfile.BadZipFile, zlib.error, *ODD_PACKING)
HEAD, FRAMES, EPISODES = "bundle.json", "frames.jsonl", "episodes.jsonl"


def write_bundle(
    path: Path,
    material: Material,
    frames: Sequence[LabelledFrame],
    strip: Sequence[int],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write frames with their pictures, those of their neighbours, and what is shown beside them.

    Args:
        path: the file, which appears when it is whole.
        material: where they come from.
        frames: the ones to review.
        strip: offsets of the neighbours.
        report: is told how many pictures are written, and of how many.

    Raises:
        UserError: there is nothing to write, the file exists or cannot be written, a picture can't be read.
    """
    if path.exists() or path.suffix != ".zip":
        raise UserError(f"export: {path} exists already or is no .zip file; choose another export=FILE.zip")
    if not frames:
        raise UserError("export: every frame is reviewed already; add show=all to export all of them")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file:
            _write(file, material, frames, strip, report)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"export: {path} cannot be written ({error.strerror}); free space or choose another export=FILE"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _write(
    file: zipfile.ZipFile,
    material: Material,
    frames: Sequence[LabelledFrame],
    strip: Sequence[int],
    report: Callable[[int, int], None],
) -> None:
    head = {"format": FORMAT, "version": VERSION, "strip": list(strip)}
    head |= {name: getattr(material, name) for name in ("name", "digest", "cameras", "schema")}
    file.writestr(HEAD, json.dumps(head, indent=1))
    file.writestr(FRAMES, _lines(asdict(frame) for frame in frames))
    facts = {number: material.episode(number) for number in sorted({frame.episode for frame in frames})}
    file.writestr(EPISODES, _lines({"episode": number, **asdict(episode)} for number, episode in facts.items()))
    pictures = {(camera, *frame.key) for frame in frames for camera in material.cameras} | {
        (material.cameras[0], frame.episode, near)
        for frame in frames
        for near in strip_frames(frame.frame, facts[frame.episode].length, strip)
        if near is not None
    }
    for done, (camera, episode, number) in enumerate(sorted(pictures), 1):
        picture = material.picture(camera, episode, number)
        assert picture is not None  # frames and neighbours are within their episodes
        file.writestr(_picture_name(camera, episode, number), picture, zipfile.ZIP_STORED)
        report(done, len(pictures))


class BundleMaterial:
    """Labelled frames of a bundle; a :class:`~dtvla.cot.review.material.Material`.

    Attributes:
        strip: offsets of the neighbours whose pictures are in the bundle.
    """

    def __init__(self, path: Path) -> None:
        """Open a bundle; :class:`UserError` when the file is missing, damaged or none."""
        try:
            self._file = zipfile.ZipFile(path)
            head = json.loads(self._file.read(HEAD))
            if (head["format"], head["version"]) != (FORMAT, VERSION):
                raise ValueError(f"{head['format']} version {head['version']}, expected {FORMAT} version {VERSION}")
            self.name, self.digest = str(head["name"]), str(head["digest"])
            self.cameras, self.strip, self.schema = list(head["cameras"]), list(head["strip"]), dict(head["schema"])
            self.frames = [LabelledFrame(**{**line, "failed": tuple(line["failed"])}) for line in self._records(FRAMES)]
            self._episodes = {int(line.pop("episode")): EpisodeFacts(**line) for line in self._records(EPISODES)}
            known = all(frame.episode in self._episodes for frame in self.frames)
            if not (self.frames and self.cameras and known and all(type(offset) is int for offset in self.strip)):
                raise ValueError("frames, cameras or episodes are missing")
        except OSError as error:
            raise UserError(f"bundle: {path} cannot be read ({error.strerror}); name a file of export=FILE") from None
        except (*DAMAGED, ValueError, KeyError, TypeError) as error:
            raise UserError(f"bundle: {path} is no whole bundle ({error}); copy or export it again") from None

    def episode(self, number: int) -> EpisodeFacts:
        """Facts of an episode that has labelled frames."""
        return self._episodes[number]

    def picture(self, camera: str, episode: int, frame: int) -> bytes | None:
        """A picture as a jpeg file, None where there is none; :class:`UserError` where it is damaged."""
        name = _picture_name(camera, episode, frame)
        try:
            return self._file.read(name)
        except KeyError:
            return None
        except (*DAMAGED, OSError) as error:
            raise UserError(f"bundle: {name} is damaged ({error}); copy or export it again") from None

    def _records(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._file.read(name).decode().splitlines()]


def _lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(record)}\n" for record in records)


def _picture_name(camera: str, episode: int, frame: int) -> str:
    return f"pictures/{camera}/{episode:06d}_{frame:06d}.jpg"
