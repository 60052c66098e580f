"""Everything between raw observations and the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dtvla.data.images import ImagePipeline
from dtvla.data.normalization import ActionNormalizer
from dtvla.errors import UserError
from dtvla.policy.layout import Layout


@dataclass
class Processor:
    """Everything between raw observations and the model, saved with the weights.

    Attributes:
        layout: token sequences.
        images: pictures to pixels.
        normalizer: actions between robot units and [-1, 1].
    """

    layout: Layout
    images: ImagePipeline
    normalizer: ActionNormalizer

    def pixels(self, observation: Mapping[str, Any]) -> Tensor:
        """uint8 pixels (N, 3, H, W) of one observation.

        Raises:
            UserError: a camera is missing, or a picture is not uint8 (H, W, 3).
        """
        for camera in self.images.cameras:
            if camera not in observation:
                names = ", ".join(sorted(observation))
                raise UserError(
                    f"observation: no picture {camera!r} (found: {names}); send it, or change model.cameras"
                )
            picture = np.asarray(observation[camera])
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
                found = f"{picture.dtype} {picture.shape}"
                raise UserError(f"observation: picture {camera!r} is {found}; send uint8 (height, width, 3)")
        pictures = {camera: np.ascontiguousarray(observation[camera]) for camera in self.images.cameras}
        return self.images(pictures)
