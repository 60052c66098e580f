"""TensorBoard in one folder per run, continued on resume, with pictures and videos."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

if TYPE_CHECKING:
    from PIL import Image

GIF_FRAMES, GIF_WIDTH, GIF_FRAME_MS = 60, 640, 150


class ResumableTensorBoard(TensorBoardLogger):
    """Lightning's TensorBoard logger without version folders.

    A resumed training hides the points after its start step, which the interrupted one had already written.
    """

    def __init__(self, folder: str, start_step: int = 0) -> None:
        """Log to ``folder``.

        Args:
            folder: of the event files.
            start_step: optimiser steps behind the checkpoint that the training starts from.
        """
        purge: dict[str, Any] = {"purge_step": start_step + 1} if start_step else {}
        super().__init__(save_dir=folder, name="", version="", default_hp_metric=False, **purge)

    @rank_zero_only
    def save(self) -> None:
        """Flush events; the settings are in the run's config.yaml."""
        self.experiment.flush()

    @rank_zero_only
    def log_gif(self, name: str, film: Path, step: int) -> None:
        """Show a film as a moving picture of at most 60 frames.

        TensorBoard's own ``add_video`` needs moviepy; it displays any GIF as it is.

        Args:
            name: tag.
            film: path of a video file.
            step: optimiser steps done.
        """
        frames = _thin(film)
        buffer = io.BytesIO()
        frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=GIF_FRAME_MS, loop=0)
        self._add_encoded(name, buffer.getvalue(), frames[0].size, step)

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[str | Path], step: int) -> None:
        """Show picture files, with the signature that the loggers of Weights & Biases and SwanLab have.

        Args:
            key: tag; from the second picture on with its number.
            images: paths of PNG or JPEG files, which are stored as they are.
            step: optimiser steps done.
        """
        from PIL import Image

        for number, path in enumerate(images):
            with Image.open(path) as picture:
                self._add_encoded(f"{key}/{number + 1}" if number else key, Path(path).read_bytes(), picture.size, step)

    def _add_encoded(self, name: str, data: bytes, size: tuple[int, int], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        image = Summary.Image(width=size[0], height=size[1], colorspace=3, encoded_image_string=data)
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self.experiment._get_file_writer().add_summary(summary, step)


def _thin(film: Path) -> list[Image.Image]:
    import av
    from PIL import Image

    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        every = max(1, -(-stream.frames // GIF_FRAMES))
        kept = [frame.to_image() for index, frame in enumerate(container.decode(stream)) if index % every == 0]
    size = (GIF_WIDTH, round(kept[0].height * GIF_WIDTH / kept[0].width))
    return [frame.resize(size).quantize(64, method=Image.Quantize.FASTOCTREE) for frame in kept]
