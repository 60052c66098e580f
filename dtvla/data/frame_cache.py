"""Decoded and resized pictures in memory-mapped files: every file of pictures is decoded once, in sequence."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from dtvla.data.demonstrations import Demonstrations
from dtvla.data.images import ImagePipeline
from dtvla.data.pictures import DAMAGE, PictureSpan, read_all
from dtvla.errors import UserError

BLOCK = 64  # pictures resized at a time
NUMERICS = "bilinear-antialias-uint8-1"  # change when ImagePipeline's pixels change


class FrameCache:
    """Model pixels of every frame of a dataset, one file per camera.

    The files' name holds a digest of the dataset's content and of the resizing, so a stale cache is never read.
    Pickling (for loader workers) carries the paths only.
    """

    def __init__(self, demonstrations: Demonstrations, pipeline: ImagePipeline, cache_dir: Path) -> None:
        """Point at the cache of ``demonstrations`` for ``pipeline`` below ``cache_dir``; :meth:`build` fills it."""
        self._demonstrations: Demonstrations | None = demonstrations
        self._pipeline = pipeline
        self.shape = (len(demonstrations), 3, pipeline.image_size, pipeline.image_size)
        self.paths = {camera: Path(cache_dir) / f"{self._digest(camera)}.npy" for camera in pipeline.cameras}
        self._arrays: list[np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None, "_demonstrations": None}

    def __getitem__(self, frames_B: np.ndarray) -> Tensor:
        """Pixels of these frames, uint8 (B, N, 3, H, W)."""
        if self._arrays is None:
            self._arrays = [np.load(path, mmap_mode="r", allow_pickle=False) for path in self.paths.values()]
        return torch.from_numpy(np.stack([array[frames_B] for array in self._arrays], axis=1))

    def build(self) -> None:
        """Decode what is not there yet, with a progress bar.

        Raises:
            UserError: a file of pictures is missing, truncated or damaged (names the episode), or the disk is full.
        """
        missing = [camera for camera, path in self.paths.items() if not path.exists()]
        if not missing:
            return
        folder = next(iter(self.paths.values())).parent
        folder.mkdir(parents=True, exist_ok=True)
        needed = len(missing) * int(np.prod(self.shape))
        free = shutil.disk_usage(folder).free
        if free < needed * 1.02:
            raise UserError(
                f"data.cache_dir: decoded pictures need {needed / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB; "
                "free some space or set another folder"
            )
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress, ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            bar = progress.add_task("decoding pictures", total=len(missing) * self.shape[0])
            list(pool.map(lambda camera: self._build_camera(camera, progress, bar), missing))

    def _digest(self, camera: str) -> str:
        assert self._demonstrations is not None
        key = {
            "dataset": self._demonstrations.fingerprint,
            "camera": self._demonstrations.camera_key(camera),
            "size": self._pipeline.image_size,
            "numerics": NUMERICS,
        }
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]

    def _build_camera(self, camera: str, progress: Progress, bar: TaskID) -> None:
        """Decode all pictures of one camera into its file."""
        assert self._demonstrations is not None  # only the process that opened the dataset builds
        path = self.paths[camera]
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            # Plain writes, not a writable memory map: a full disk is an exception there and a bus error here.
            with temporary.open("wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
                np.lib.format.write_array_header_1_0(file, header)
                start = file.tell()
                spans = sorted(self._demonstrations.picture_spans(camera), key=lambda span: (span.path, span.first))
                for _, group in groupby(spans, key=lambda span: span.path):
                    self._copy_file(list(group), file, start, lambda n: progress.advance(bar, n))
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"data.cache_dir: writing {path} failed ({error.strerror}); free some space") from None
        finally:
            temporary.unlink(missing_ok=True)

    def _copy_file(self, spans: list[PictureSpan], file: Any, start: int, advance: Callable[[int], None]) -> None:
        """Decode one file once and write the blocks of its episodes to their rows."""
        frame_bytes = int(np.prod(self.shape[1:]))
        pictures = read_all(spans[0].path, spans[0].column)
        position = 0
        for span in spans:
            if span.first < position:
                raise span.damaged(ValueError("its pictures begin before the previous episode's end"))
            while position < span.first:
                position += len(_take(pictures, min(BLOCK, span.first - position), span))
            row, stop = span.frames
            while row < stop:
                block = np.stack(_take(pictures, min(BLOCK, stop - row), span))
                file.seek(start + row * frame_bytes)
                file.write(self._pipeline.resize(torch.from_numpy(block)).numpy().tobytes())
                row += len(block)
                position += len(block)
                advance(len(block))


def _take(pictures: Iterator[np.ndarray], count: int, span: PictureSpan) -> list[np.ndarray]:
    """The next ``count`` pictures; an error names the episode that they belong to."""
    try:
        taken = list(islice(pictures, count))
    except DAMAGE as error:
        raise span.damaged(error) from None
    if len(taken) < count:
        raise span.damaged()
    return taken
