"""Where the pictures of an episode are, and how a file's pictures are read: in sequence, or any of them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dtvla.data.video import VideoReader, decode_frames
from dtvla.errors import UserError

DAMAGE = (av.FFmpegError, pa.ArrowInvalid, OSError, IndexError, KeyError)  # what reading a broken file raises


@dataclass(frozen=True)
class PictureSpan:
    """Pictures of one episode inside a file.

    Attributes:
        path: a video, or a parquet file with encoded pictures.
        column: of the parquet file; None for a video.
        first: position of the episode's first picture in the file.
        frames: dataset rows [start, stop) that these pictures belong to.
        episode: its number in its dataset, for messages.
    """

    path: Path
    column: str | None
    first: int
    frames: tuple[int, int]
    episode: int

    def __len__(self) -> int:
        """Number of pictures."""
        return self.frames[1] - self.frames[0]

    def moved(self, rows: int) -> PictureSpan:
        """The same pictures for a dataset that starts at row ``rows``."""
        return replace(self, frames=(self.frames[0] + rows, self.frames[1] + rows)) if rows else self

    def damaged(self, error: Exception | None = None) -> UserError:
        """The error to raise when this episode's pictures can't be read (None: the file ends before they do)."""
        if error is None:
            problem = "the file is shorter than its episodes"
        elif isinstance(error, FileNotFoundError):
            problem = "the file is missing"
        else:
            problem = f"the file can't be decoded ({(str(error).splitlines() or [type(error).__name__])[0]})"
        return UserError(f"{self.path}: episode {self.episode}: {problem}; copy or collect the dataset again")


class PictureReader(Protocol):
    """Reads any pictures of one file."""

    def read(self, positions: Sequence[int]) -> Iterator[np.ndarray]:
        """uint8 (H, W, 3) pictures at these positions, which ascend; the iterator ends where the file does."""

    def holds(self, count: int) -> bool:
        """Whether the file has that many pictures."""

    def close(self) -> None:
        """Give up the file."""


def read_all(path: Path, column: str | None) -> Iterator[np.ndarray]:
    """All pictures of a file in order, each uint8 (H, W, 3)."""
    return decode_frames(path) if column is None else _read_rows(pq.ParquetFile(path), column)


def open_pictures(path: Path, column: str | None, fps: float) -> PictureReader:
    """Open a file of pictures; ``fps`` is the number of pictures a second in a video."""
    return VideoReader(path, fps) if column is None else ColumnReader(path, column)


def _read_rows(file: pq.ParquetFile, column: str) -> Iterator[np.ndarray]:
    for batch in file.iter_batches(batch_size=16, columns=[column]):
        yield from (decode_picture(cell) for cell in batch.column(0).to_pylist())


class ColumnReader:
    """Encoded pictures in a parquet column, which is read by groups of rows: one picture costs as much as its group."""

    def __init__(self, path: Path, column: str) -> None:
        """Open the file; pictures are read when asked for."""
        self._file = pq.ParquetFile(path, memory_map=True)
        self._column = column
        metadata = self._file.metadata
        self._stops_G = np.cumsum([metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)])

    def read(self, positions: Sequence[int]) -> Iterator[np.ndarray]:
        """uint8 (H, W, 3) pictures at these rows, which ascend; ends where the file does."""
        groups = np.searchsorted(self._stops_G, positions, side="right").tolist()
        for group, pairs in groupby(zip(groups, positions, strict=True), key=lambda pair: pair[0]):
            if group >= len(self._stops_G):
                return
            cells = self._file.read_row_group(group, columns=[self._column]).column(0)
            first = int(self._stops_G[group]) - len(cells)
            yield from (decode_picture(cells[position - first].as_py()) for _, position in pairs)

    def holds(self, count: int) -> bool:
        """Whether the file has that many rows."""
        return len(self._stops_G) > 0 and int(self._stops_G[-1]) >= count

    def close(self) -> None:
        """Give up the file."""
        self._file.close()


def decode_picture(cell: Any) -> np.ndarray:
    """uint8 (H, W, 3) of a LeRobot picture: ``{"bytes": a png or jpeg file, "path": its former name}``."""
    if not cell or not cell.get("bytes"):
        raise IndexError("a row without a picture inside")
    with Image.open(io.BytesIO(cell["bytes"])) as picture:
        return np.array(picture.convert("RGB"))
