"""Protects training on key frames: which frames are samples, and how long a thought stands."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dtvla.data.datamodule import DemonstrationDataModule
from dtvla.data.demonstrations import Demonstrations
from dtvla.data.recording import write_dataset
from dtvla.data.staging import CAMERA_KEYS, EpisodeSource, StagedEpisode
from dtvla.errors import UserError
from dtvla.policy.layout import Batch, Segment

from .conftest import make_pictures, make_processor

FRAMES = 24
CLOSES, OPENS = 9, 17  # a command at frame 13 does not hold
GRIPPER_F = np.where([CLOSES <= frame < OPENS and frame != 13 for frame in range(FRAMES)], 1.0, -1.0)


def standing(keys: list[int], frame: int) -> int | None:
    """The key frame whose thought a frame has: the last one under the same gripper command."""
    stretch = max(start for start in (0, CLOSES, OPENS) if start <= frame)
    return max((key for key in keys if stretch <= key <= frame), default=None)


def write_key_frames(root: Path, keys: list[list[int]]) -> Path:
    """Episodes of 24 frames with a thought of its own at each of these frames alone."""
    rng = np.random.default_rng(len(keys))
    staged = []
    for number, frames in enumerate(keys):
        thoughts = [f"key {frame} of episode {number}" if frame in frames else "" for frame in range(FRAMES)]
        source = EpisodeSource(number, "libero_object", 0, "pick up the thing", number, number, FRAMES, 0)
        pictures = {camera: make_pictures(number, c, FRAMES) for c, camera in enumerate(CAMERA_KEYS)}
        state, action = rng.normal(size=(FRAMES, 8)), rng.uniform(-1, 1, (FRAMES, 7))
        action[:, 6] = GRIPPER_F
        staged.append(StagedEpisode.encode(source, state, action, thoughts, pictures))
    write_dataset(root, staged, {"made": "for a test"})
    return root


@pytest.fixture(scope="module")
def keys() -> list[list[int]]:
    rng = np.random.default_rng(5)
    drawn = [sorted({0, FRAMES - 1, *rng.integers(0, FRAMES, 3).tolist()}) for _ in range(4)]
    return [*drawn, [6, 17]]  # the last one begins without a thought


@pytest.fixture(scope="module")
def key_frame_root(tmp_path_factory: pytest.TempPathFactory, keys: list[list[int]]) -> Path:
    return write_key_frames(tmp_path_factory.mktemp("keys") / "dataset", keys)


def make_module(root: Path | list[Path], cache: Path, acts: bool = True, **options: Any) -> DemonstrationDataModule:
    settings: dict[str, Any] = {"batch_size": 3, "val_fraction": 0.2, "seed": 3, "augment": False, "cache": False}
    module = DemonstrationDataModule(root, cache_dir=cache, **{**settings, **options})
    module.attach(make_processor(module.demonstrations.texts(), module.demonstrations.statistics), acts=acts)
    return module


def take(module: DemonstrationDataModule, count: int) -> list[Batch]:
    return [part for parts in itertools.islice(module.train_dataloader(), count) for part in parts]


def test_a_thought_stands_until_the_next_one_or_the_next_gripper_command(
    key_frame_root: Path, keys: list[list[int]]
) -> None:
    plain, carried = (Demonstrations(key_frame_root, carry_thoughts=carry) for carry in (False, True))
    for number, frames in enumerate(keys):
        for frame in range(FRAMES):
            key = standing(frames, frame)
            index = number * FRAMES + frame
            assert plain.thought(index) == (f"key {frame} of episode {number}" if frame in frames else None)
            assert carried.thought(index) == (None if key is None else f"key {key} of episode {number}")
    assert plain.texts() == carried.texts()


@pytest.mark.parametrize("carry", [False, True])
def test_frames_without_a_thought_are_no_samples(
    key_frame_root: Path, keys: list[list[int]], tmp_path: Path, carry: bool
) -> None:
    module = make_module(key_frame_root, tmp_path, frames="thoughts", carry_thoughts=carry)
    all_frames = make_module(key_frame_root, tmp_path)
    chosen = np.concatenate([module.train_frames, module.val_frames])
    thinking = [
        number * FRAMES + frame
        for number, frames in enumerate(keys)
        for frame in range(FRAMES)
        if (standing(frames, frame) is not None if carry else frame in frames)
    ]
    assert sorted(chosen.tolist()) == thinking
    assert set(module.val_frames) == set(all_frames.val_frames) & set(thinking)
    seen = take(module, -(-len(module.train_frames) // 3))
    assert all(((batch.segment_BT == Segment.THINK).sum(1) > 2).all() for batch in seen)
    assert sum(len(batch) for parts in module.val_dataloader() for batch in parts) == len(module.val_frames)


def test_without_actions_samples_are_the_same_but_for_their_end(key_frame_root: Path, tmp_path: Path) -> None:
    whole, short = (take(make_module(key_frame_root, tmp_path, acts, frames="thoughts"), 6) for acts in (True, False))
    block = len(make_module(key_frame_root, tmp_path).processor.layout.act_block())
    for one, other in zip(whole, short, strict=True):
        assert torch.equal(one.pixels_BNCHW, other.pixels_BNCHW)
        assert other.input_ids_BT.shape[1] == one.input_ids_BT.shape[1] - block + 1
        assert one.tokens - other.tokens == len(one) * (block - 1)
        assert other.action_tokens == 0


def test_a_dataset_that_has_nothing_to_train_on_or_to_validate_with_is_named(
    key_frame_root: Path, tmp_path: Path
) -> None:
    for number in range(5):  # thoughts in one episode alone: it is held out, or it is not
        root = write_key_frames(tmp_path / str(number), [[3, 9] if number == episode else [] for episode in range(5)])
        held_out = number == int(Demonstrations(root).split(0.2, 3)[1][0]) // FRAMES
        purpose = "train on" if held_out else "validate with"
        with pytest.raises(UserError, match=rf"data.frames: thoughts, .*{root.name} to {purpose} has a thought"):
            make_module([key_frame_root, root], tmp_path, frames="thoughts")
        make_module(root, tmp_path)
        if not held_out:
            make_module(root, tmp_path, frames="thoughts", val_fraction=0.0)


@pytest.mark.parametrize("wrong", [{"frames": "keys"}, {"frames": "thoughts", "thoughts": False}])
def test_contradictory_settings_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"data\.(frames|thoughts)"):
        DemonstrationDataModule(tmp_path, cache_dir=tmp_path, **wrong)
