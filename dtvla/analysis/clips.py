"""Films of an evaluation made small enough to lie inside a page: the cameras alone, without the panel of text."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from dtvla.errors import UserError
from dtvla.sim.film import FRAMES_PER_SECOND, PANEL_WIDTH

if TYPE_CHECKING:
    from collections.abc import Iterator

    from av.container import InputContainer
    from av.video.frame import VideoFrame

CLIP_HEIGHT = 256  # pixels: what the cameras of the published protocol have


@dataclass(frozen=True)
class Clip:
    """A film that lies inside a page: ``data:`` addresses of the film (mp4) and of its first picture (JPEG)."""

    film: str
    poster: str

    def __len__(self) -> int:
        return len(self.film) + len(self.poster)


def make_clip(film: Path) -> Clip:
    """The camera part of a film that dtvla wrote, 256 pixels high, as an H.264 mp4: about a sixth of its bytes.

    Frames and their rate stay, so that second ``t`` of the clip shows step ``t * FRAMES_PER_SECOND``. The panel is
    left out because the page has its words as text, which is readable on a phone, too.

    Raises:
        UserError: the file is missing, cannot be decoded, or has no panel.
    """
    import av

    try:
        with av.open(str(film)) as source:
            if not source.streams.video or source.streams.video[0].width <= PANEL_WIDTH:
                raise UserError(f"video: {film} is no film of dtvla evaluate; evaluate again with record=1")
            clip = _encode(_cropped(source))
    except (OSError, av.error.FFmpegError, StopIteration) as error:
        why = getattr(error, "strerror", None) or "it is empty"
        raise UserError(f"video: {film} cannot be read ({why}); evaluate again with record=1") from error
    return clip


def make_clips(films: Sequence[Path], most_bytes: int) -> list[Clip | UserError | None]:
    """Clips of as many films, from the first on, as fit into `most_bytes`.

    Returns:
        For each film its clip, the reason why it cannot be read, or None when it does not fit.
    """
    room = most_bytes
    found: list[Clip | UserError | None] = []
    for film in films:
        try:
            clip = make_clip(film) if room > 0 else None
        except UserError as error:
            found.append(error)
            continue
        fits = clip is not None and len(clip) <= room
        room -= len(clip) if clip is not None and fits else 0
        found.append(clip if fits else None)
    return found


def _cropped(source: "InputContainer") -> "Iterator[VideoFrame]":
    """Frames without the panel, scaled; the width follows, even."""
    from av.filter import Graph
    from av.video.frame import VideoFrame

    pictures = source.streams.video[0]
    graph = Graph()
    graph.link_nodes(
        graph.add_buffer(template=pictures),
        graph.add("crop", f"{pictures.width - PANEL_WIDTH}:{pictures.height}:0:0"),
        graph.add("scale", f"-2:{CLIP_HEIGHT}"),
        graph.add("buffersink"),
    ).configure()
    for frame in source.decode(pictures):
        graph.push(frame)
        picture = graph.pull()
        assert isinstance(picture, VideoFrame)
        yield picture


def _encode(pictures: "Iterator[VideoFrame]") -> Clip:
    import av

    first = next(pictures)
    poster, clip = io.BytesIO(), io.BytesIO()
    first.to_image().save(poster, "JPEG", quality=75)
    with av.open(clip, "w", format="mp4") as target:
        options = {"crf": "27", "preset": "veryfast"}
        stream = target.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
        stream.pix_fmt = "yuv420p"  # the one format that every browser plays
        stream.width, stream.height = first.width, first.height
        for number, picture in enumerate(chain([first], pictures)):
            picture.pts, picture.time_base = number, Fraction(1, FRAMES_PER_SECOND)
            target.mux(stream.encode(picture))
        target.mux(stream.encode())
    return Clip(_address("video/mp4", clip), _address("image/jpeg", poster))


def _address(kind: str, content: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
