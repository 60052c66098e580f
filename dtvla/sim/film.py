"""Films of episodes: both cameras, and beside them the instruction, the step and the current thought, readable.

Text is never cut to fit: a longer thought gets a smaller font, and only a text that would not fit in the smallest
readable one is shortened, with the number of words that were left out.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dtvla.errors import UserError

PANEL_WIDTH = 576
MIN_HEIGHT = 480
MARGIN = 24
FONT_SIZES = (26, 24, 22, 20, 18, 16, 14, 12)
HOLD_FRAMES = 20  # the outcome stays visible for one second
FRAMES_PER_SECOND = 20  # LIBERO's control rate: films run in real time

BACKGROUND = (250, 250, 248)
INK = (28, 30, 34)
FAINT = (110, 114, 122)
RULE = (214, 214, 210)
THOUGHT_INK = (20, 60, 130)
SUCCESS = (24, 128, 72)
FAILURE = (176, 48, 44)


@dataclass(frozen=True)
class Caption:
    """What the panel says beside one frame.

    Attributes:
        instruction: the task in words.
        thought: the thought of the current decision; empty when there is none.
        step: policy steps taken when the frame was rendered.
        outcome: None while the episode runs, then its success.
    """

    instruction: str
    thought: str
    step: int
    outcome: bool | None = None


def compose(frame_HWC: np.ndarray, caption: Caption) -> np.ndarray:
    """Put the caption's panel to the right of a frame.

    Args:
        frame_HWC: uint8 (H, W, 3), the cameras side by side.
        caption: text of the panel.

    Returns:
        uint8 (s*H, s*W + 576, 3), even height and width, s the smallest whole factor with s*H >= 480.
    """
    height, width = frame_HWC.shape[:2]
    scale = -(-MIN_HEIGHT // height)
    picture = Image.fromarray(frame_HWC).resize((scale * width, scale * height), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (_even(picture.width + PANEL_WIDTH), _even(picture.height)), BACKGROUND)
    canvas.paste(picture, (0, 0))
    canvas.paste(_panel(caption.instruction, caption.thought, canvas.height), (picture.width, 0))
    draw = ImageDraw.Draw(canvas)
    text, colour = _status(caption)
    draw.text((picture.width + MARGIN, canvas.height - MARGIN), text, colour, font(22, bold=True), anchor="ls")
    if caption.outcome is not None:
        draw.rectangle((0, 0, canvas.width - 1, canvas.height - 1), outline=colour, width=6)
    return np.asarray(canvas)


def partial_path(path: Path) -> Path:
    """Where a film is written until it is finished."""
    return path.with_name(f".{path.stem}.partial.mp4")


class Film:
    """An H.264 mp4 of 20 frames per second that is written frame by frame, while its episode runs.

    It appears under its name when it is finished. All frames have the size that :func:`compose` gives.

    Args:
        path: file to write; its folder is made when missing.
    """

    def __init__(self, path: Path):
        self.path = path
        self._container: Any = None
        self._stream: Any = None
        self._last: Any = None
        self._frames = 0

    def add(self, frame_HWC: np.ndarray, caption: Caption) -> None:
        """Encode one frame, uint8 (H, W, 3), with its caption beside it.

        Raises:
            UserError: the film can't be written, for example because the disk is full.
        """
        import av

        picture_HWC = compose(frame_HWC, caption)
        with self._told():
            if self._container is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                options = {"movflags": "+faststart"}
                self._container = av.open(str(partial_path(self.path)), "w", options=options)
                # One thread: the other cores simulate.
                options = {"crf": "20", "preset": "veryfast", "threads": "1"}
                self._stream = self._container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
                self._stream.pix_fmt = "yuv420p"  # the one format that every browser and notebook plays
                self._stream.height, self._stream.width = picture_HWC.shape[:2]
            self._last = av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")
            self._encode_last()

    def finish(self) -> Path:
        """Hold the last frame for one second and give the film its name.

        Raises:
            ValueError: no frame was added.
            UserError: the film can't be written.
        """
        if self._container is None:
            raise ValueError(f"{self.path}: a film needs a frame")
        with self._told():
            for _ in range(HOLD_FRAMES):
                self._encode_last()
            self._container.mux(self._stream.encode())
            self._container.close()
            self._container = None
            os.replace(partial_path(self.path), self.path)
        return self.path

    def abandon(self) -> None:
        """Leave nothing behind of a film that is not finished. Safe to call at any time."""
        container, self._container = self._container, None
        with suppress(OSError):  # the disk may be full, but nobody wants the last frames
            if container is not None:
                container.close()
        with suppress(OSError):
            partial_path(self.path).unlink()

    def _encode_last(self) -> None:
        self._last.pts = self._frames
        self._frames += 1
        self._container.mux(self._stream.encode(self._last))

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # PyAV's errors are OSErrors, too
            self.abandon()
            raise UserError(
                f"record: the film {self.path} can't be written ({error.strerror}); free space, or film nothing"
            ) from error


def wrap(text: str, letters: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a text into lines that are at most `width` pixels wide in `letters`; longer words are broken."""
    lines: list[str] = []
    for word in text.split():
        candidate = f"{lines[-1]} {word}" if lines else word
        if lines and letters.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        while letters.getlength(word) > width and len(word) > 1:
            cut = max(n for n in range(1, len(word)) if n == 1 or letters.getlength(word[:n]) <= width)
            lines.append(word[:cut])
            word = word[cut:]
        lines.append(word)
    return lines


@lru_cache(maxsize=4)  # the panel changes once per decision, the frame at every step
def _panel(instruction: str, thought: str, height: int) -> Image.Image:
    panel = Image.new("RGB", (PANEL_WIDTH, height), BACKGROUND)
    draw = ImageDraw.Draw(panel)
    inner = PANEL_WIDTH - 2 * MARGIN
    y = MARGIN
    y = _paragraph(draw, "TASK", instruction, y, inner, height // 4, INK)
    draw.line((MARGIN, y, PANEL_WIDTH - MARGIN, y), RULE, 2)
    _paragraph(draw, "THOUGHT", thought or "(none)", y + 16, inner, height - y - 90, THOUGHT_INK if thought else FAINT)
    draw.line((MARGIN, height - 60, PANEL_WIDTH - MARGIN, height - 60), RULE, 2)
    return panel


def _paragraph(
    draw: ImageDraw.ImageDraw, title: str, text: str, y: int, width: int, height: int, ink: tuple[int, int, int]
) -> int:
    """Draw a titled paragraph in the largest font that fits; return the y below it."""
    draw.text((MARGIN, y), title, FAINT, font(14, bold=True))
    y += 24
    letters, lines = fit(text, width, height - 24)
    for line in lines:
        draw.text((MARGIN, y), line, ink, letters)
        y += line_pitch(letters)
    return y + 12


def fit(text: str, width: int, height: int, largest: int = FONT_SIZES[0]) -> tuple[ImageFont.FreeTypeFont, list[str]]:
    """The largest font of at most `largest` pixels, and the lines in it, with which a text fits into width x height."""
    for size in (size for size in FONT_SIZES if size <= largest):
        letters = font(size)
        lines = wrap(text, letters, width)
        if len(lines) * line_pitch(letters) <= height:
            return letters, lines
    kept = lines[: max(height // line_pitch(letters) - 1, 1)]
    left_out = len(text.split()) - len(" ".join(kept).split())
    return letters, [*kept, f"... and {left_out} more words"]


def _status(caption: Caption) -> tuple[str, tuple[int, int, int]]:
    if caption.outcome is None:
        return f"step {caption.step}", INK
    if caption.outcome:
        return f"success at step {caption.step}", SUCCESS
    return f"not solved after {caption.step} steps", FAILURE


@lru_cache(maxsize=32)
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans of `size` pixels."""
    import matplotlib  # carries DejaVu Sans, so that films look alike on every machine

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def line_pitch(letters: ImageFont.FreeTypeFont) -> int:
    """Pixels from one line of text to the next."""
    return round(letters.size * 1.4)


def _even(pixels: int) -> int:
    return pixels + pixels % 2
