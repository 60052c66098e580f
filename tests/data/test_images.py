import numpy as np
import pytest
import torch
from PIL import Image

from dtvla.data.images import Augmentation, ImagePipeline
from dtvla.errors import UserError


def random_pictures(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(("height", "width", "size"), [(256, 256, 96), (120, 160, 33), (64, 64, 100)])
def test_resize_agrees_with_pillows_bilinear_filter(height: int, width: int, size: int) -> None:
    picture = random_pictures((height, width, 3), height)
    ours = ImagePipeline(("a",), size)({"a": picture})[0].permute(1, 2, 0).numpy()
    pillow = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR))
    assert np.abs(ours.astype(int) - pillow.astype(int)).max() <= 1


def test_batched_and_single_pictures_give_the_same_pixels_and_camera_order_is_kept() -> None:
    pictures = {name: random_pictures((5, 80, 80, 3), i) for i, name in enumerate(["wrist", "agentview", "other"])}
    pipeline = ImagePipeline(("agentview", "wrist"), 40)
    batch = pipeline(pictures)
    assert batch.shape == (5, 2, 3, 40, 40)
    assert batch.dtype == torch.uint8
    for i in range(5):
        assert torch.equal(batch[i], pipeline({name: torch.from_numpy(p[i]) for name, p in pictures.items()}))
    assert torch.equal(batch[:, 1], ImagePipeline(("wrist",), 40)(pictures)[:, 0])


def test_same_size_is_untouched_and_the_dictionary_round_trips() -> None:
    pipeline = ImagePipeline(("a",), 48)
    picture = random_pictures((48, 48, 3), 3)
    assert np.array_equal(pipeline({"a": picture})[0].permute(1, 2, 0).numpy(), picture)
    assert ImagePipeline.from_dict(pipeline.to_dict()) == pipeline


def test_missing_camera_and_wrong_type_are_refused() -> None:
    pipeline = ImagePipeline(("agentview",), 48)
    with pytest.raises(UserError, match="agentview"):
        pipeline({"wrist": random_pictures((8, 8, 3), 0)})
    with pytest.raises(ValueError, match="uint8"):
        pipeline({"agentview": np.zeros((8, 8, 3), np.float32)})
    with pytest.raises(UserError, match="cameras"):
        ImagePipeline((), 48)


def test_augmentation_depends_on_each_samples_seed_only_and_spares_other_cameras() -> None:
    pixels = torch.from_numpy(random_pictures((6, 2, 3, 48, 48), 1))
    before = pixels.clone()
    seeds = [(3, step) for step in range(6)]
    whole = Augmentation()(pixels, seeds)
    assert torch.equal(pixels, before)
    assert torch.equal(whole[:, 1], pixels[:, 1])
    assert all(not torch.equal(whole[i, 0], pixels[i, 0]) for i in range(6))
    order = [4, 0, 5]
    assert torch.equal(Augmentation()(pixels[order], [seeds[i] for i in order]), whole[order])
    assert not torch.equal(Augmentation()(pixels[:1], [(4, 0)]), whole[:1])


def test_augmentation_of_strength_zero_changes_nothing() -> None:
    pixels = torch.from_numpy(random_pictures((3, 1, 3, 32, 32), 2))
    still = Augmentation(crop_area=1.0, rotation=0.0, brightness=0.0, contrast=0.0, saturation=0.0)
    assert (still(pixels, [(i,) for i in range(3)]).int() - pixels.int()).abs().max() <= 1


def test_crop_zooms_by_the_square_root_of_the_area() -> None:
    size = 200
    ramp = torch.arange(size).expand(size, size).to(torch.uint8).expand(1, 1, 3, size, size)
    zoom = Augmentation(crop_area=0.81, rotation=0.0, brightness=0.0, contrast=0.0, saturation=0.0)
    row = zoom(ramp, [(1,)])[0, 0, 0, size // 2].double()
    slope = (row[-1] - row[0]) / (size - 1)
    assert abs(slope - 0.9) < 0.01


def test_colour_agrees_with_torchvision() -> None:
    from torchvision.transforms import functional

    pixels = torch.from_numpy(random_pictures((1, 1, 3, 16, 16), 5))
    for kind, adjust in {
        "brightness": functional.adjust_brightness,
        "contrast": functional.adjust_contrast,
        "saturation": functional.adjust_saturation,
    }.items():
        strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0} | {kind: 0.5}
        ours = Augmentation(crop_area=1.0, rotation=0.0, **strengths)(pixels, [(9,)])[0, 0].double() / 255
        draw = np.random.default_rng([9]).random(7)[3 + list(strengths).index(kind)]
        expected = adjust(pixels[0, 0].double() / 255, 1 + (2 * draw - 1) * 0.5)
        assert (ours - expected).abs().max() < 0.01


@pytest.mark.parametrize("share", [0.9, 0.5])
def test_center_crop_is_bit_equal_from_camera_pictures_and_from_kept_pixels(share: float) -> None:
    pictures = {name: random_pictures((5, 80, 80, 3), i) for i, name in enumerate(["agentview", "wrist"])}
    plain = ImagePipeline(("agentview", "wrist"), 48)
    cropping = ImagePipeline(("agentview", "wrist"), 48, center_crop=share)
    kept = plain(pictures)
    before = kept.clone()
    cropped = cropping.center(kept)
    assert torch.equal(kept, before)
    assert torch.equal(cropped, cropping(pictures))
    for i in range(5):
        assert torch.equal(cropping({name: frames[i] for name, frames in pictures.items()}), cropped[i])
    assert torch.equal(cropped[:, 1], kept[:, 1])
    assert not torch.equal(cropped[:, 0], kept[:, 0])
    assert torch.equal(plain.center(kept), kept)


@pytest.mark.parametrize("share", [0.9, 0.25])
def test_center_crop_shows_the_middle_at_the_size_of_training(share: float) -> None:
    size = 160
    ramp = np.broadcast_to(np.arange(size, dtype=np.uint8)[None, :, None], (size, size, 3)).copy()
    pixels = ImagePipeline(("a",), size, center_crop=share)({"a": ramp})[0, 0].double()
    side = share**0.5
    places = (np.arange(size) + 0.5 - size / 2) * side + size / 2 - 0.5
    inside = (places > 0) & (places < size - 1)
    assert np.abs(pixels[size // 2].numpy() - places)[inside].max() <= 0.51
    still = Augmentation(crop_area=share, rotation=0.0, brightness=0.0, contrast=0.0, saturation=0.0)
    row = still(torch.from_numpy(ramp).permute(2, 0, 1)[None, None], [(1,)])[0, 0, 0, size // 2].double()
    slopes = [(line[-10] - line[10]) / (size - 20) for line in (pixels[size // 2], row)]
    assert abs(slopes[0] - slopes[1]) < 0.02


def test_center_crop_is_saved_absent_means_none_and_nonsense_is_refused() -> None:
    pipeline = ImagePipeline(("a",), 48, center_crop=0.9)
    assert ImagePipeline.from_dict(pipeline.to_dict()) == pipeline
    assert ImagePipeline.from_dict({"cameras": ["a"], "image_size": 48}) == ImagePipeline(("a",), 48)
    for share in (0.0, 1.2, -0.5):
        with pytest.raises(UserError, match="center_crop"):
            ImagePipeline(("a",), 48, center_crop=share)
