"""A strip of pictures from a filmed episode, each with the thought that the policy had there."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dtvla.errors import UserError
from dtvla.rollout.results import EpisodeResult, write_bytes
from dtvla.sim.film import (
    BACKGROUND,
    FAILURE,
    FAINT,
    HOLD_FRAMES,
    INK,
    MARGIN,
    PANEL_WIDTH,
    SUCCESS,
    THOUGHT_INK,
    fit,
    font,
    line_pitch,
)

COLUMNS = 3
CELL_WIDTH = 560
TEXT_HEIGHT = 190
HEADER = 76
NO_THOUGHT = "(no thought)"


def choose_decisions(episode: EpisodeResult, count: int) -> list[int]:
    """Indices of up to `count` decisions to show, first and last among them.

    Decisions at which the thought changed are preferred, spread evenly; when there are fewer of them than `count`,
    all decisions are spread evenly.
    """
    decisions = range(len(episode.thoughts))
    changed = [i for i in decisions if i == 0 or episode.thoughts[i].text != episode.thoughts[i - 1].text]
    pool = changed if len(changed) >= count else list(decisions)
    picks = np.linspace(0, len(pool) - 1, min(count, len(pool))).round().astype(int)
    return [pool[i] for i in dict.fromkeys(picks.tolist())]


def read_pictures(video: Path) -> list[Image.Image]:
    """The camera part (without the panel and the held last frame) of a film that dtvla wrote, one per step.

    Raises:
        UserError: the file is missing or cannot be decoded.
    """
    import av

    try:
        with av.open(str(video)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
    except (OSError, av.error.FFmpegError) as error:
        raise UserError(f"video: {video} cannot be read ({error.strerror}); evaluate again with record=1") from error
    shown = frames[: max(len(frames) - HOLD_FRAMES, 1)]
    return [f.crop((0, 0, f.width - PANEL_WIDTH, f.height)) for f in shown]


def draw_strip(episode: EpisodeResult, pictures: Sequence[Image.Image], path: Path, count: int = 6) -> Path:
    """Write a PNG with up to `count` moments of an episode, three in a row: cameras above, thought below.

    Args:
        episode: the record of the filmed episode.
        pictures: its frames, one per step from the reset on.
        path: file to write, atomically.
        count: most moments to show.
    """
    chosen = choose_decisions(episode, count)
    width = CELL_WIDTH
    height = round(pictures[0].height * width / pictures[0].width)
    rows = -(-len(chosen) // COLUMNS)
    cell_height = height + TEXT_HEIGHT + MARGIN
    size = (MARGIN + COLUMNS * (width + MARGIN), HEADER + rows * cell_height)
    canvas = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    outcome, colour = (
        (f"success at step {episode.steps}", SUCCESS)
        if episode.success
        else (f"not solved after {episode.steps} steps", FAILURE)
    )
    where = f"init state {episode.init_state}:  "
    end = size[0] - MARGIN
    draw.text((end, HEADER // 2), outcome, colour, font(20, bold=True), anchor="rm")
    end -= round(font(20, bold=True).getlength(outcome))
    draw.text((end, HEADER // 2), where, FAINT, font(20), anchor="rm")
    room = end - round(font(20).getlength(where)) - 2 * MARGIN
    letters, lines = fit(episode.instruction, room, HEADER - 8, largest=24)
    draw.text((MARGIN, HEADER // 2), "\n".join(lines), INK, letters, anchor="lm")
    texts = [episode.thoughts[decision].text or NO_THOUGHT for decision in chosen]
    size_of_all = min(int(fit(text, width, TEXT_HEIGHT - 40)[0].size) for text in texts)
    for place, decision in enumerate(chosen):
        thought = episode.thoughts[decision]
        x = MARGIN + (place % COLUMNS) * (width + MARGIN)
        y = HEADER + (place // COLUMNS) * cell_height
        picture = pictures[min(thought.step, len(pictures) - 1)]
        canvas.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + height + 10), f"step {thought.step}", FAINT, font(16, bold=True))
        letters, lines = fit(texts[place], width, TEXT_HEIGHT - 40, size_of_all)
        for number, line in enumerate(lines):
            draw.text((x, y + height + 36 + number * line_pitch(letters)), line, THOUGHT_INK, letters)
    content = io.BytesIO()
    canvas.save(content, "PNG")
    write_bytes(path, content.getvalue())
    return path
