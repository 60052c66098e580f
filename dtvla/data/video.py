"""Camera clips: encoded while an episode is fresh, joined without re-encoding, decoded in sequence."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np

CODEC = "h264"
PIXEL_FORMAT = "yuv420p"
# Short groups of pictures and no B-frames: a random frame costs at most ten decodes, and clips join without gaps.
# crf 18 is visually lossless; "veryfast" encodes about 10x faster than AV1 at the same quality. One thread per clip,
# because collection already runs one process per core.
ENCODER_OPTIONS = {"crf": "18", "preset": "veryfast", "g": "10", "bf": "0", "threads": "1"}


def encode_clip(frames_FHWC: np.ndarray, fps: int) -> bytes:
    """Encode uint8 RGB frames (F, H, W, 3) as one mp4 file in memory; equal frames give equal bytes."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as container:
        stream: Any = container.add_stream(CODEC, rate=fps, options=dict(ENCODER_OPTIONS))
        stream.height, stream.width = frames_FHWC.shape[1:3]
        stream.pix_fmt = PIXEL_FORMAT
        for frame_HWC in frames_FHWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")))
        container.mux(stream.encode())
    return target.getvalue()


class ClipJoiner:
    """Appends clips of equal encoding to one mp4 file, without re-encoding.

    Attributes:
        frames: number of frames so far.
        size: bytes so far, without the index.
        picture_shape: height and width in pixels, (0, 0) before the first clip.
    """

    def __init__(self, path: Path, fps: int) -> None:
        """Open ``path`` (its folder is created) for clips of ``fps`` frames a second."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.frames = 0
        self.size = 0
        self.picture_shape = (0, 0)
        self._fps = fps
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "faststart"})
        self._stream: Any = None

    def append(self, clip: bytes, frames: int) -> None:
        """Add a clip of that many frames after what is there.

        Raises:
            ValueError: the clip holds another number of frames.
        """
        with av.open(io.BytesIO(clip), "r") as source:
            stream = source.streams.video[0]
            if self._stream is None:
                self._stream = self._container.add_stream_from_template(stream)
                self.picture_shape = (stream.height, stream.width)
            assert stream.time_base is not None  # every stream of an mp4 file has one
            offset = int(Fraction(self.frames, self._fps) / stream.time_base)
            count = 0
            for packet in source.demux(stream):
                if packet.dts is None or packet.pts is None:  # the flush marker at the end
                    continue
                packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                packet.stream = self._stream
                self._container.mux(packet)
                count += 1
        if count != frames:
            raise ValueError(f"the clip holds {count} frames, expected {frames}")
        self.frames += frames
        self.size += len(clip)

    def close(self) -> None:
        """Write the index and close the file."""
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def decode_frames(path: Path) -> Iterator[np.ndarray]:
    """All pictures of a video file in order, each uint8 (H, W, 3).

    Raises:
        av.FFmpegError: the file is absent, truncated or no video.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            yield frame.to_ndarray(format="rgb24")
