"""Models to measure that nobody has trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtvla.data.normalization import Statistics
from dtvla.policy import build
from dtvla.policy.model import HybridVLA
from dtvla.policy.policy import Policy
from dtvla.policy.vocabulary import TAGS

INSTRUCTION = "put the black bowl in the bottom drawer of the cabinet and close it"  # libero_10 task 3
FRAMES, STATE_DIM = 100, 8


def random_statistics(action_dim: int, seed: int) -> Statistics:
    """Of random states and actions, where there are no data."""
    rng = np.random.default_rng(seed)
    return Statistics.from_frames(rng.normal(size=(FRAMES, STATE_DIM)), rng.uniform(-1, 1, size=(FRAMES, action_dim)))


def fresh_policy(
    model: Mapping[str, Any],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    texts: Sequence[str] = (INSTRUCTION,),
) -> Policy:
    """Fresh weights on random statistics, with as many tokens as with real data.

    A tokenizer of real data fills its table; that of a few sentences would make the output layer too small.

    Args:
        model: the ``model`` group.
        device: where the weights are drawn.
        dtype: their type.
        texts: that the tokenizer is made of.
    """
    size = int(model["tokenizer_size"]) + int(model["action_bins"]) + len(TAGS)
    settings = {**model, "vocabulary_size": model.get("vocabulary_size") or size}
    return build.fresh(settings, texts, random_statistics(int(model["action_dim"]), int(model["seed"])), device, dtype)


def twin(model: HybridVLA) -> HybridVLA:
    """Modules of its own over the same weights."""
    shared: list[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
