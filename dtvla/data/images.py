"""The one image pipeline: camera pictures to model pixels, for training, evaluation and reinforcement learning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dtvla.errors import UserError

LUMA_3 = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision's ColorJitter uses it


@dataclass(frozen=True)
class ImagePipeline:
    """Selects cameras and resizes their pictures (bilinear, antialiased, on the CPU in uint8).

    Training and control call the same code, so a picture gives the same pixels in both. Training keeps resized
    pictures and augments them; control, validation and training without augmentation apply :meth:`center` to them.

    Attributes:
        cameras: observation names in the order of the model's image tokens, the main camera first.
        image_size: side of the square model input, in pixels.
        center_crop: share of the main camera's area that is kept wherever it is not augmented. The share that
            training keeps at random places (:class:`Augmentation`) shows objects at the size of training; 1 keeps all,
            as published.
    """

    cameras: tuple[str, ...]
    image_size: int
    center_crop: float = 1.0

    def __post_init__(self) -> None:
        """Refuse an empty camera list, a size below one pixel, and a crop that keeps nothing."""
        object.__setattr__(self, "cameras", tuple(self.cameras))
        if not self.cameras or len(set(self.cameras)) != len(self.cameras):
            raise UserError(f"cameras: found {list(self.cameras)}; name at least one camera, each once")
        if self.image_size < 1:
            raise UserError(f"image_size: found {self.image_size}; give a positive number of pixels")
        if not 0 < self.center_crop <= 1:
            raise UserError(f"center_crop: found {self.center_crop}; give the share of the picture to keep, up to 1")

    def __call__(self, images: Mapping[str, np.ndarray | Tensor]) -> Tensor:
        """Turn one picture or a batch of pictures per camera into model pixels.

        Args:
            images: for every camera uint8 (H, W, 3) or (B, H, W, 3), on the CPU; other entries are ignored.

        Returns:
            uint8 (N, 3, size, size) or (B, N, 3, size, size).

        Raises:
            UserError: a camera is missing.
            ValueError: a picture is not uint8 with three channels last.
        """
        missing = [name for name in self.cameras if name not in images]
        if missing:
            raise UserError(f"cameras: {missing} not among the pictures {sorted(images)}; check model.cameras")
        return self.center(torch.stack([self.resize(torch.as_tensor(images[name])) for name in self.cameras], dim=-4))

    def resize(self, picture: Tensor) -> Tensor:
        """Resize uint8 (..., H, W, 3) to uint8 (..., 3, size, size)."""
        if picture.dtype != torch.uint8 or picture.ndim not in (3, 4) or picture.shape[-1] != 3:
            raise ValueError(f"expected uint8 (H, W, 3) or (B, H, W, 3), got {picture.dtype} {tuple(picture.shape)}")
        pixels_BCHW = picture.reshape(-1, *picture.shape[-3:]).permute(0, 3, 1, 2).contiguous()
        if pixels_BCHW.shape[-2:] != (self.image_size, self.image_size):
            size = (self.image_size, self.image_size)
            pixels_BCHW = functional.interpolate(pixels_BCHW, size=size, mode="bilinear", antialias=True)
        return pixels_BCHW.reshape(*picture.shape[:-3], *pixels_BCHW.shape[-3:])

    def center(self, pixels: Tensor) -> Tensor:
        """Crop camera 0 of resized pixels, uint8 (..., N, 3, size, size), to ``center_crop`` and enlarge it again."""
        if self.center_crop == 1:
            return pixels
        result = pixels.clone()
        main_BCHW = pixels[..., 0, :, :, :].reshape(-1, *pixels.shape[-3:])
        still_B3 = torch.full((len(main_BCHW), 3), 0.5)  # the middle of what Augmentation draws
        cropped_BCHW = resample(main_BCHW.float() / 255, still_B3, self.center_crop, rotation=0.0)
        result[..., 0, :, :, :] = to_uint8(cropped_BCHW).reshape(result[..., 0, :, :, :].shape)
        return result

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"cameras": list(self.cameras), "image_size": self.image_size, "center_crop": self.center_crop}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImagePipeline:
        """Inverse of :meth:`to_dict`; what was saved without ``center_crop`` does not crop."""
        crop = float(values.get("center_crop", 1.0))
        return cls(cameras=tuple(values["cameras"]), image_size=int(values["image_size"]), center_crop=crop)


def resample(picture_BCHW: Tensor, draws_B3: Tensor, crop_area: float, rotation: float) -> Tensor:
    """Crop pictures to a share of their area, resize them back and rotate them, in one bilinear resampling.

    Args:
        picture_BCHW: float.
        draws_B3: horizontal place, vertical place and angle, from 0 to 1; 0.5 is the centre and upright.
        crop_area: share of the area that is kept, a square.
        rotation: degrees that a draw of 0 or 1 stands for, either way.
    """
    side = crop_area**0.5
    centre_B2 = (2 * draws_B3[:, :2] - 1) * (1 - side)
    angle_B = torch.deg2rad((2 * draws_B3[:, 2] - 1) * rotation)
    cos_B, sin_B = side * angle_B.cos(), side * angle_B.sin()
    rows = [torch.stack([cos_B, -sin_B, centre_B2[:, 0]], -1), torch.stack([sin_B, cos_B, centre_B2[:, 1]], -1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(picture_BCHW.shape), align_corners=False)
    return functional.grid_sample(picture_BCHW, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def to_uint8(picture: Tensor) -> Tensor:
    """A picture in [0, 1] as uint8."""
    return (picture * 255).round().to(torch.uint8)


@dataclass(frozen=True)
class Augmentation:
    """Random crop, rotation and colour of the main camera (the published recipe; other cameras stay as they are).

    Crop and rotation are one resampling, so a turned picture shows what lies outside the crop where the published
    recipe shows black corners.

    Attributes:
        crop_area: share of the picture's area that is kept, square, at a random place.
        rotation: largest angle in degrees, either way.
        brightness: factor drawn from [1 - brightness, 1 + brightness]; likewise ``contrast`` and ``saturation``.
    """

    crop_area: float = 0.9
    rotation: float = 5.0
    brightness: float = 0.2
    contrast: float = 0.4
    saturation: float = 0.5

    def __call__(self, pixels_BNCHW: Tensor, seeds: Sequence[Sequence[int]]) -> Tensor:
        """Augment camera 0 of every sample.

        Args:
            pixels_BNCHW: uint8 model pixels; not changed.
            seeds: per sample the integers that determine its draw: equal integers give equal pictures, whatever
                else is in the batch.

        Returns:
            uint8 (B, N, 3, H, W).
        """
        if len(seeds) != len(pixels_BNCHW):
            raise ValueError(f"{len(pixels_BNCHW)} samples but {len(seeds)} seeds")
        draws = torch.from_numpy(np.stack([np.random.default_rng(list(seed)).random(7) for seed in seeds])).float()
        picture_BCHW = pixels_BNCHW[:, 0].float() / 255
        picture_BCHW = resample(picture_BCHW, draws[:, :3], self.crop_area, self.rotation)
        result_BNCHW = pixels_BNCHW.clone()
        result_BNCHW[:, 0] = to_uint8(self._colour(picture_BCHW, draws[:, 3:]))
        return result_BNCHW

    def _colour(self, picture_BCHW: Tensor, draws_B4: Tensor) -> Tensor:
        """Brightness, contrast and saturation in random order; each is a blend with black, mean grey or own grey."""
        strength_3 = torch.tensor([self.brightness, self.contrast, self.saturation])
        factor_B3 = 1 + (2 * draws_B4[:, :3] - 1) * strength_3
        orders = torch.tensor([(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
        order_B3 = orders[(draws_B4[:, 3] * 6).long().clamp(max=5)]
        luma_C11 = torch.tensor(LUMA_3).view(3, 1, 1)
        for position in range(3):
            kind_B = order_B3[:, position]
            factor_B111 = factor_B3.gather(1, kind_B[:, None]).view(-1, 1, 1, 1)
            grey_B1HW = (picture_BCHW * luma_C11).sum(1, keepdim=True)
            mean_B111 = grey_B1HW.mean((2, 3), keepdim=True)
            target_B1HW = (kind_B == 1).view(-1, 1, 1, 1) * mean_B111 + (kind_B == 2).view(-1, 1, 1, 1) * grey_B1HW
            picture_BCHW = (factor_B111 * picture_BCHW + (1 - factor_B111) * target_B1HW).clamp(0, 1)
        return picture_BCHW
