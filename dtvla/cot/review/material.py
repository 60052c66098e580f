"""What is reviewed: labelled frames of a dataset, with the pictures and the trace that go with them."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dtvla.cot.labels import CARRIED
from dtvla.cot.review.decisions import Key
from dtvla.errors import UserError

if TYPE_CHECKING:
    from dtvla.cot.episodes import EpisodeView

MOVES = 3  # numbers of an action that move the hand: forward, left, up
JPEG_QUALITY = 90
CACHED_PICTURES = 1000
CACHED_EPISODES = 64


@dataclass(frozen=True)
class LabelledFrame:
    """A frame with a thought.

    Attributes:
        episode, frame: as in :class:`~dtvla.cot.review.decisions.Decision`.
        thought: its text.
        origin: how it came about; "" where the dataset does not say.
        failed: checks that refused an answer before this thought stood.
    """

    episode: int
    frame: int
    thought: str
    origin: str = ""
    failed: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        """Episode and frame."""
        return self.episode, self.frame


@dataclass(frozen=True)
class EpisodeFacts:
    """What is shown of an episode beside pictures.

    Attributes:
        length: number of frames F.
        fps: frames a second.
        instruction: what is to be done.
        objects: names of which a thought mentions one.
        moves: the first three numbers of each frame's action (F, 3).
        closing: for each frame 1 when the gripper is told to close, else 0.
    """

    length: int
    fps: float
    instruction: str
    objects: list[str]
    moves: list[list[float]]
    closing: list[int]


class Material(Protocol):
    """Frames to review, of a dataset or of a bundle.

    Attributes:
        name: of the dataset.
        digest: changes with its content.
        cameras: their names; the first one's pictures are shown of neighbouring frames, too.
        schema: settings of the checks that the thoughts were annotated with; empty where that is not known.
        frames: with a thought, in order.
    """

    name: str
    digest: str
    schema: dict[str, Any]
    cameras: list[str]
    frames: list[LabelledFrame]

    def episode(self, number: int) -> EpisodeFacts:
        """Facts of an episode that has labelled frames."""

    def picture(self, camera: str, episode: int, frame: int) -> bytes | None:
        """A picture as a jpeg file, None where there is none; :class:`UserError` where it can't be read."""


class DatasetMaterial:
    """Labelled frames of a dataset; a :class:`Material`.

    Thoughts that were only carried forward are left out, as is, with ``changes``, a frame whose thought is that of the
    frame before.
    """

    def __init__(
        self,
        root: Path,
        *,
        changes: bool = False,
        episodes: Collection[int] | None = None,
        thought_tokenizer: str | None = None,
    ) -> None:
        """Open a dataset.

        Args:
            root: its folder.
            changes: leave out frames whose thought is that of the frame before.
            episodes: the only ones to look at; None for all.
            thought_tokenizer: reads thoughts that are stored as token ids.

        Raises:
            UserError: the dataset is missing or damaged, has no gripper or no thoughts, or not these episodes.
        """
        from dtvla.cot.episodes import AnnotatedFrames
        from dtvla.data.dataset_folder import DatasetFolder
        from dtvla.data.lerobot import read_info
        from dtvla.data.thoughts import COLUMN

        if COLUMN not in read_info(root)["features"]:
            raise UserError(f"dataset: {root} has no thoughts (column {COLUMN!r}); make them with dtvla annotate")
        self._dataset = AnnotatedFrames(root)
        self.name, self.cameras = root.resolve().name, self._dataset.cameras
        self.digest = self._dataset.demonstrations.fingerprint[:12]
        self.schema = _schema(root)
        if absent := sorted(set(episodes or ()) - set(range(len(self._dataset)))):
            raise UserError(f"episodes: {root} has no episode {absent[0]}; use 0 to {len(self._dataset) - 1}")
        folder = DatasetFolder(root, thoughts=True, thought_tokenizer=thought_tokenizer)
        wanted = range(len(self._dataset)) if episodes is None else sorted(episodes)
        annotations = _annotations(root)
        self.frames = [
            LabelledFrame(number, frame, folder.thoughts[place], *annotations.get((number, frame), ("", ())))
            for number in wanted
            for frame, place in _labelled(folder, number, changes)
            if annotations.get((number, frame), ("",))[0] != CARRIED
        ]
        if not self.frames:
            raise UserError(f"dataset: {root} has no thought to review in these episodes; choose others")
        self.episode = lru_cache(CACHED_EPISODES)(self._episode)
        self.picture = lru_cache(CACHED_PICTURES)(self._picture)

    def _episode(self, number: int) -> EpisodeFacts:
        from dtvla.cot.objects import task_objects

        view = self._dataset[number]
        return EpisodeFacts(
            length=len(view),
            fps=view.fps,
            instruction=view.instruction,
            objects=list(task_objects(view)),
            moves=np.round(view.action_FD[:, :MOVES].astype(float), 3).tolist(),
            closing=view.closing_F.astype(int).tolist(),
        )

    def _picture(self, camera: str, episode: int, frame: int) -> bytes | None:
        if camera not in self.cameras or not 0 <= episode < len(self._dataset):
            return None
        view: EpisodeView = self._dataset[episode]
        return jpeg(view.picture(camera, frame)) if 0 <= frame < len(view) else None


def strip_frames(frame: int, length: int, offsets: Sequence[int]) -> list[int | None]:
    """The frame among its neighbours at these offsets, ascending; None where the episode does not reach."""
    places = [frame + offset for offset in sorted({0, *offsets})]
    return [place if 0 <= place < length else None for place in places]


def jpeg(picture_HWC: np.ndarray) -> bytes:
    """A uint8 RGB picture (H, W, 3) as a jpeg file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture_HWC).save(file, "jpeg", quality=JPEG_QUALITY)
    return file.getvalue()


def _labelled(folder: Any, number: int, changes: bool) -> list[tuple[int, int]]:
    """Frames of an episode with a thought, and the thought's place in the folder's list."""
    place_F = folder.thought_index_F[folder.starts_E[number] : folder.stops_E[number]]
    chosen_F = np.array([bool(text) for text in folder.thoughts])[place_F]
    if changes:
        chosen_F[1:] &= place_F[1:] != place_F[:-1]
    return [(int(frame), int(place_F[frame])) for frame in np.flatnonzero(chosen_F)]


def _schema(root: Path) -> dict[str, Any]:
    from dtvla.cot.provenance import earlier_record

    record = earlier_record(root)
    return dict(record["settings"]["schema"]) if record else {}


def _annotations(root: Path) -> dict[Key, tuple[str, tuple[str, ...]]]:
    """Origin and failed checks by frame; empty for a dataset that was not annotated by dtvla."""
    from dtvla.cot.writing import TABLE
    from dtvla.data.lerobot import read_parquet

    path = root / TABLE
    if not path.is_file():
        return {}
    rows = read_parquet(path, ["episode", "frame", "origin", "failed_checks"]).to_pylist()
    return {(row["episode"], row["frame"]): (row["origin"], tuple(row["failed_checks"])) for row in rows}
