"""A small LeRobot dataset that can be learned, written by the real recorder, and settings of a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dtvla.data.recording import write_dataset
from dtvla.data.staging import CAMERA_KEYS, EpisodeSource, StagedEpisode

SIDE = 64
INSTRUCTION = "pick up the alphabet soup and place it in the basket"
PHASES = ("move above the soup", "close the gripper around the soup", "carry the soup to the basket")

TINY = (
    "model=nano",
    "model.image_size=32",
    "model.text.hidden_size=32",
    "model.text.num_hidden_layers=2",
    "model.text.num_attention_heads=2",
    "model.text.head_dim=16",
    "model.text.intermediate_size=64",
    "model.vision.hidden_size=32",
    "model.vision.num_hidden_layers=1",
    "model.vision.num_attention_heads=2",
    "model.vision.intermediate_size=64",
    "data.batch_size=8",
    "data.val_fraction=0.2",
    "algorithm.optimizer.warmup_steps=4",
    "algorithm.optimizer.lr.language_model=3e-3",
    "algorithm.optimizer.lr.vision_tower=3e-3",
    "algorithm.optimizer.lr.projector=3e-3",
)


def write_demonstrations(root: Path, episodes: int = 5, frames: int = 24, seed: int = 0) -> Path:
    """A white square on noise moves along a line; the action is its direction and the thought names the phase."""
    rng = np.random.default_rng(seed)
    staged = []
    for index in range(episodes):
        direction_D = rng.uniform(-1, 1, 7)
        pictures = {camera: rng.integers(0, 90, (frames, SIDE, SIDE, 3), dtype=np.uint8) for camera in CAMERA_KEYS}
        for time in range(frames):
            left, top = (int(SIDE / 2 + direction_D[axis] * time) for axis in (0, 1))
            for frames_FHWC in pictures.values():
                frames_FHWC[time, top : top + 8, left : left + 8] = 255
        staged.append(
            StagedEpisode.encode(
                EpisodeSource(index, "libero_object", 0, INSTRUCTION, index, index, frames, 0),
                rng.normal(size=(frames, 8)),
                direction_D * np.linspace(0.2, 1, frames)[:, None],
                [f"i {PHASES[3 * time // frames]} of the table" for time in range(frames)],
                pictures,
            )
        )
    write_dataset(root, staged, {"made": "for a test"})
    return root
