"""Small datasets written by the real writer, and a processor with a real tokenizer."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dtvla.data.images import ImagePipeline
from dtvla.data.normalization import ActionNormalizer
from dtvla.data.recording import write_dataset
from dtvla.data.staging import CAMERA_KEYS, EpisodeSource, StagedEpisode

SIDE = 64


def make_pictures(episode: int, camera: int, frames: int) -> np.ndarray:
    """A gradient that moves with time, tinted by episode and camera: each frame can be told from its pixels."""
    y, x = np.mgrid[:SIDE, :SIDE]
    blue = np.full_like(x, 40 * episode + 20 * camera)
    return np.stack([np.stack([(x + 4 * t) % 256, y * 2, blue], -1) for t in range(frames)]).astype(np.uint8)


def make_episode(index: int, rng: np.random.Generator, frames: int | None = None) -> StagedEpisode:
    frames = frames or 20 + 3 * index
    pictures = {camera: make_pictures(index, c, frames) for c, camera in enumerate(CAMERA_KEYS)}
    source = EpisodeSource(
        index, "libero_object", index % 2, f"pick up thing {index % 2}", index, 100 + index, frames, 0
    )
    state = rng.normal(size=(frames, 8)).astype(np.float32)
    action = rng.uniform(-1, 1, (frames, 7)).astype(np.float32)
    thoughts = [f"the gripper is at place {t // 7} of episode {index}" for t in range(frames)]
    return StagedEpisode.encode(source, state, action, thoughts, pictures)


@pytest.fixture(scope="session")
def episodes() -> list[StagedEpisode]:
    rng = np.random.default_rng(7)
    return [make_episode(index, rng) for index in range(5)]


@pytest.fixture(scope="session")
def dataset_root(tmp_path_factory: pytest.TempPathFactory, episodes: list[StagedEpisode]) -> Path:
    root = tmp_path_factory.mktemp("datasets") / "five"
    write_dataset(root, episodes, {"made": "for a test"})
    return root


def make_processor(texts: list[str], statistics: object, image_size: int = 32, chunk: int = 6) -> SimpleNamespace:
    from dtvla.policy.layout import Layout, PromptTemplate
    from dtvla.policy.vocabulary import Vocabulary, train_tokenizer

    tokenizer = train_tokenizer([*texts, "think: "], action_count=32)
    vocabulary = Vocabulary.from_tokenizer(tokenizer, action_count=32)
    layout = Layout(
        vocabulary,
        tokenizer,
        image_tokens=4,
        chunk=chunk,
        action_dim=7,
        prompt_template=PromptTemplate("think: ", "{task}"),
        bins=vocabulary.bins(),
        max_prompt_tokens=64,
        max_thought_tokens=64,
    )
    images = ImagePipeline(("agentview", "wrist"), image_size)
    return SimpleNamespace(layout=layout, images=images, normalizer=ActionNormalizer(statistics))
