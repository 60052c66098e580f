"""A dataset as annotators see it: episode by episode, with pictures when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dtvla.cot.keyframes import GRIPPER
from dtvla.data.demonstrations import Demonstrations
from dtvla.data.pictures import DAMAGE, PictureSpan, open_pictures
from dtvla.errors import UserError


class EpisodeView:
    """One episode of F frames.

    Attributes:
        number: place among the dataset's episodes, from 0.
        instruction: what is to be done.
        state_FD, action_FD: float32, as in :class:`~dtvla.data.demonstrations.Demonstrations`.
        source: where the episode comes from (``meta/episodes_source.jsonl``); empty where the dataset does not say.
        root: folder of the dataset.
    """

    def __init__(self, dataset: AnnotatedFrames, number: int) -> None:
        """View episode ``number`` of a dataset."""
        data = dataset.demonstrations
        frames = slice(int(data.starts_E[number]), int(data.stops_E[number]))
        self.number, self.root, self.fps = number, dataset.root, data.fps
        self.instruction = data.instruction(frames.start)
        self.state_FD, self.action_FD = data.state_FD[frames], data.action_FD[frames]
        self.source: Mapping[str, Any] = data.sources[number] if data.sources else {}
        self._spans = dataset.spans

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.action_FD)

    @property
    def closing_F(self) -> np.ndarray:
        """Bool (F,), whether the gripper is told to close."""
        return self.action_FD[:, GRIPPER] > 0

    def picture(self, camera: str, frame: int) -> np.ndarray:
        """uint8 (H, W, 3); :class:`UserError` names an episode that can't be decoded."""
        return next(self.pictures(camera, [frame]))

    def pictures(self, camera: str, frames: list[int]) -> Iterator[np.ndarray]:
        """Pictures, each uint8 (H, W, 3), of ascending frames."""
        span = self._spans(camera)[self.number]
        try:
            file = open_pictures(span.path, span.column, self.fps)
            try:
                found = file.read([span.first + frame for frame in frames])
                for _ in frames:
                    picture = next(found, None)
                    if picture is None:
                        raise span.damaged()
                    yield picture
            finally:
                file.close()
        except DAMAGE as error:
            raise span.damaged(error) from None


class AnnotatedFrames:
    """A dataset whose frames get thoughts; thoughts that it has are not read.

    Attributes:
        root: its folder.
        demonstrations: its frames.
    """

    def __init__(self, root: Path | str) -> None:
        """Open a dataset.

        Raises:
            UserError: it is missing or damaged, or has no gripper in its actions.
        """
        self.root = Path(root)
        self.demonstrations = Demonstrations(root, thoughts=False)
        width = self.demonstrations.action_FD.shape[1]
        if width <= GRIPPER:
            raise UserError(
                f"dataset: {root} has actions of {width} numbers and no gripper among them (number {GRIPPER + 1}); "
                "key frames are found by the gripper"
            )
        self._by_camera: dict[str, list[PictureSpan]] = {}

    def __len__(self) -> int:
        """Number of episodes."""
        return self.demonstrations.episodes

    def __getitem__(self, number: int) -> EpisodeView:
        """One episode."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        return EpisodeView(self, number)

    @cached_property
    def cameras(self) -> list[str]:
        """Names of the cameras."""
        features = self.demonstrations._folders[0].info["features"]
        return [name for name, feature in features.items() if feature["dtype"] in ("video", "image")]

    def spans(self, camera: str) -> list[PictureSpan]:
        """Where the pictures of a camera are; :class:`UserError` when there is none of that name."""
        if camera not in self._by_camera:
            self._by_camera[camera] = self.demonstrations.picture_spans(camera)
        return self._by_camera[camera]
