"""Pictures of observations in memory that two processes share, so that no pixel goes through a pipe.

The memory is a file without a name (memfd): it is gone with the last process that has it open, however that ends, and
a container's small /dev/shm does not limit it.
"""

import mmap
import os
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class _Place:
    """Where a picture lies: its first byte and its shape."""

    offset: int
    shape: tuple[int, ...]


class SharedPictures:
    """Memory for the pictures of one observation at a time; it takes its size from the first observation.

    Args:
        descriptor: of the memory, inherited from the process that called :meth:`create`.
    """

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self._bytes: np.ndarray = np.empty(0, np.uint8)

    @classmethod
    def create(cls) -> "SharedPictures":
        """New memory, without a byte yet."""
        return cls(os.memfd_create("pictures"))

    def put(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Write the pictures, uint8 (H, W, 3) each; the observation with places in their stead, for :meth:`take`."""
        pictures = {key: value for key, value in observation.items() if getattr(value, "ndim", 0) == 3}
        size = sum(picture.nbytes for picture in pictures.values())
        if size > os.fstat(self.descriptor).st_size:
            os.ftruncate(self.descriptor, size)
        places: dict[str, _Place] = {}
        offset = 0
        for key, picture in pictures.items():
            places[key] = _Place(offset, picture.shape)
            self._at(places[key])[:] = picture
            offset += picture.nbytes
        return observation | places

    def take(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The observation that :meth:`put` got, with copies of the pictures."""
        return {k: self._at(v).copy() if isinstance(v, _Place) else v for k, v in observation.items()}

    def close(self) -> None:
        """Give the memory back."""
        self._bytes = np.empty(0, np.uint8)
        os.close(self.descriptor)

    def _at(self, place: _Place) -> np.ndarray:
        size = int(np.prod(place.shape))
        if place.offset + size > len(self._bytes):
            self._bytes = np.frombuffer(mmap.mmap(self.descriptor, 0), np.uint8)
        return self._bytes[place.offset : place.offset + size].reshape(place.shape)
