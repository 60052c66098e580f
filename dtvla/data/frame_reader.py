"""Model pixels decoded when they are asked for: nothing to prepare and no disk needed, but work for the loaders."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dtvla.data.demonstrations import Demonstrations
from dtvla.data.images import ImagePipeline
from dtvla.data.pictures import DAMAGE, PictureReader, PictureSpan, open_pictures

OPEN_FILES = 64  # kept by a process; opening a video costs as much as decoding a few pictures


class PixelSource(Protocol):
    """Gives the model pixels of frames."""

    def __getitem__(self, frames_B: np.ndarray) -> Tensor:
        """Pixels of these frames, uint8 (B, N, 3, H, W)."""

    def build(self) -> None:
        """Do once what must be done before; :class:`UserError` when pictures can't be read."""


class FrameReader:
    """The pixels that :class:`~dtvla.data.frame_cache.FrameCache` holds, bit for bit, without it.

    Every process keeps its own files open; pickling carries paths only.
    """

    def __init__(self, demonstrations: Demonstrations, pipeline: ImagePipeline) -> None:
        """Read ``demonstrations`` for ``pipeline``."""
        self._pipeline, self._fps = pipeline, demonstrations.fps
        self._stops_E = demonstrations.stops_E
        self._spans = [demonstrations.picture_spans(camera) for camera in pipeline.cameras]
        self._files: OrderedDict[tuple[Path, str | None], PictureReader] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __getitem__(self, frames_B: np.ndarray) -> Tensor:
        """Pixels of these frames, uint8 (B, N, 3, H, W); :class:`UserError` names an episode that can't be read."""
        frames_U, place_B = np.unique(frames_B, return_inverse=True)
        return torch.stack([self._camera(spans, frames_U) for spans in self._spans], dim=1)[torch.from_numpy(place_B)]

    def build(self) -> None:
        """Open every file once, and read the last picture of each video."""
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for spans in self._spans:
                ordered = sorted(spans, key=lambda span: (span.path, span.first))
                list(pool.map(self._check, [list(group)[-1] for _, group in groupby(ordered, lambda span: span.path)]))

    def _check(self, span: PictureSpan) -> None:
        try:
            file = open_pictures(span.path, span.column, self._fps)
            whole = file.holds(span.first + len(span))
            file.close()
        except DAMAGE as error:
            raise span.damaged(error) from None
        if not whole:
            raise span.damaged()

    def _camera(self, spans: list[PictureSpan], frames_U: np.ndarray) -> Tensor:
        """Pixels (U, 3, H, W) of one camera at ascending frames: neighbours in a file share a decode."""
        wanted = []
        for index, frame in enumerate(frames_U.tolist()):
            span = spans[int(np.searchsorted(self._stops_E, frame, side="right"))]
            wanted.append((span.path, span.first + frame - span.frames[0], index, span))
        wanted.sort(key=lambda entry: entry[:3])
        side = self._pipeline.image_size
        pixels_UCHW = torch.empty((len(frames_U), 3, side, side), dtype=torch.uint8)
        for _, group in groupby(wanted, key=lambda entry: entry[0]):
            entries = list(group)
            pictures = self._pictures(entries[0][3], [position for _, position, _, _ in entries])
            for _, _, index, span in entries:
                try:
                    picture = next(pictures, None)
                except DAMAGE as error:
                    raise span.damaged(error) from None
                if picture is None:
                    raise span.damaged()
                pixels_UCHW[index] = self._pipeline.resize(torch.from_numpy(picture))
        return pixels_UCHW

    def _pictures(self, span: PictureSpan, positions: list[int]) -> Iterator[np.ndarray]:
        """Pictures at ascending positions of the span's file."""
        if self._process != os.getpid():  # a forked loader must not share its parent's file positions
            self._files, self._process = OrderedDict(), os.getpid()
        key = (span.path, span.column)
        if key not in self._files:
            self._files[key] = open_pictures(span.path, span.column, self._fps)
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(key)
        yield from self._files[key].read(positions)
