"""Tiny float64 models and random samples."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.gemma import modeling_gemma

from dtvla.cli import config_dir
from dtvla.data.normalization import Statistics
from dtvla.policy.layout import Batch, Example, stack
from dtvla.policy.policy import Policy, build_policy

SENTENCE = "the gripper is above a red bowl and left of plate now move down then close on it"
WORDS = SENTENCE.split()

SETTINGS: dict[str, Any] = {
    "checkpoint": None,
    "cameras": ["agentview", "wrist"],
    "image_size": 16,
    "chunk": 3,
    "action_dim": 7,
    "action_bins": 32,
    "slot_embedding": True,
    "initializer_range": 0.3,  # large, so that every mistake in a mask shows
    "max_prompt_tokens": 40,
    "max_thought_tokens": 40,
    "normalizer": "quantile",
    "normalizer_mask": [True] * 6 + [False],
    "seed": 7,
    "tokenizer_size": 1000,
    "prompt": {"think_prefix": "think: ", "task": "{task}"},
    "text": {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "intermediate_size": 32,
        "max_position_embeddings": 256,
    },
    "vision": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "patch_size": 8,
    },
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """In every test of this folder."""


@pytest.fixture
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's norm computes in float32 whatever the model's type; float64 comparisons need it in float64."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight)

    monkeypatch.setattr(modeling_gemma.GemmaRMSNorm, "forward", forward)


@pytest.fixture(scope="session")
def statistics() -> Statistics:
    rng = np.random.default_rng(0)
    return Statistics.from_frames(rng.normal(size=(200, 8)), rng.uniform(-1, 1, size=(200, 7)))


@pytest.fixture(scope="session")
def make_policy(statistics: Statistics) -> Callable[..., Policy]:
    def make(**changes: Any) -> Policy:
        policy = build_policy(SETTINGS | changes, [" ".join(WORDS)], statistics)
        policy.model.double().eval()
        with torch.no_grad():  # fresh norms have weight zero: make their parity visible too
            for name, parameter in policy.model.named_parameters():
                if "norm" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        return policy

    return make


@pytest.fixture(scope="session")
def published_settings() -> dict[str, Any]:
    """The ``model`` group of ``model=deepthinkvla``."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", ["model=deepthinkvla", "model.checkpoint=null"])
    return OmegaConf.to_container(cfg.model, resolve=True)  # type: ignore[return-value]


@pytest.fixture(scope="session")
def policy(make_policy: Callable[..., Policy]) -> Policy:
    return make_policy()


def sentence(rng: np.random.Generator, low: int = 1, high: int = 20) -> str:
    return " ".join(rng.choice(WORDS, size=rng.integers(low, high)))


def random_example(policy: Policy, rng: np.random.Generator) -> tuple[Example, torch.Tensor, torch.Tensor]:
    """An example with its pixels and actions; every fourth has no thought."""
    layout, size = policy.processor.layout, policy.processor.images.image_size
    actions_SD = torch.from_numpy(rng.uniform(-1.1, 1.1, (layout.chunk, layout.action_dim))).float()
    thought = None if rng.random() < 0.25 else sentence(rng)
    pixels = rng.integers(0, 256, (len(policy.processor.images.cameras), 3, size, size), dtype=np.uint8)
    return layout.encode(sentence(rng, 1, 8), thought, actions_SD), torch.from_numpy(pixels), actions_SD


def make_batch(policy: Policy, samples: list[tuple[Example, torch.Tensor, torch.Tensor]]) -> Batch:
    examples, pixels, actions = zip(*samples, strict=True)
    tokens = stack(list(examples), policy.processor.layout.vocabulary.pad_id)
    return Batch(pixels_BNCHW=torch.stack(pixels), actions_BSD=torch.stack(actions), **tokens)


def random_observation(policy: Policy, rng: np.random.Generator, side: int = 20) -> dict[str, Any]:
    pictures = {c: rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for c in policy.processor.images.cameras}
    return {**pictures, "instruction": sentence(rng, 1, 8), "thought": sentence(rng)}
