"""Camera clips: encoded while an episode is fresh, joined without re-encoding, decoded in sequence."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
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

END = -(2**40)  # position of a reader with nothing ahead
SEEK_BACK = 32  # frames


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


class VideoReader:
    """Any frames of a video file of constant rate: seeks to the key frame before, decodes on from there.

    The file stays open, and where the next frame asked for is near, decoding goes on instead of seeking.
    """

    def __init__(self, path: Path, fps: float) -> None:
        """Open the file; :class:`av.FFmpegError` when it is absent, truncated or no video."""
        self._container = av.open(str(path))
        self._stream = self._container.streams.video[0]
        self._stream.codec_context.thread_count = 1  # threads decode ahead, which the next seek would throw away
        assert self._stream.time_base is not None  # every stream of an mp4 file has one
        self._ticks = float(1 / (Fraction(fps) * self._stream.time_base))  # of one frame
        self._start = self._stream.start_time or 0
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._position = END  # of the frame that was decoded last
        self._reach = 1  # longest way from a key frame to a wanted frame so far: going on costs no more than seeking

    def read(self, positions: Sequence[int]) -> Iterator[np.ndarray]:
        """uint8 (H, W, 3) frames at these ascending positions; ends where the file does."""
        for position in positions:
            frame = self._frame(position)
            if frame is None:
                return
            yield frame.to_ndarray(format="rgb24")

    def holds(self, count: int) -> bool:
        """Whether the file has that many frames and the last of them decodes."""
        return any(True for _ in self.read([count - 1]))

    def close(self) -> None:
        """Give up the file."""
        self._container.close()

    def _frame(self, position: int) -> av.VideoFrame | None:
        if self._position < position <= self._position + self._reach:
            return self._forward(position)
        for back in (0, SEEK_BACK, position):  # with B-frames a seek can land behind the frame
            target = max(0, position - back) + 0.5  # half a frame on: timestamps are rounded
            self._container.seek(self._start + int(target * self._ticks), stream=self._stream)
            self._frames = self._container.decode(self._stream)
            self._position = END
            frame = self._forward(position)
            if frame is not None:
                return frame
        return None

    def _forward(self, position: int) -> av.VideoFrame | None:
        """Decode up to a frame; None when it is not ahead."""
        decoded = 0
        for frame in self._frames:
            if frame.pts is None:
                continue
            decoded += 1
            self._position = round((frame.pts - self._start) / self._ticks)
            if self._position >= position:
                self._reach = max(self._reach, decoded - 1)
                return frame if self._position == position else None
        self._position = END
        return None
