"""Protects the count of a training step's operations, against torch's own count of the operators that really run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training_data import TINY

from dtvla.cli import config_dir
from dtvla.data.collate import collate
from dtvla.data.normalization import Statistics
from dtvla.learning import flops
from dtvla.learning.flops import training_flops, work_of
from dtvla.policy import adapters
from dtvla.policy.attention import visible
from dtvla.policy.language import runs
from dtvla.policy.layout import Batch
from dtvla.policy.model import HybridVLA, first_supervised, make_config
from dtvla.policy.policy import Policy, build_policy

TEXTS = ["pick up the soup", "open the drawer", "the gripper is above the soup and closes", "move left"]
THOUGHTS = [TEXTS[2], None, f"{TEXTS[2]} {TEXTS[3]} {TEXTS[3]}"]
LORA = {"r": 4, "alpha": 4, "dropout": 0.0}


def model_settings(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", overrides=list(overrides))
    return OmegaConf.to_container(cfg.model, resolve=True)  # type: ignore[return-value]


def make_policy(**changes: Any) -> Policy:
    rng = np.random.default_rng(0)
    statistics = Statistics.from_frames(rng.normal(size=(50, 8)), rng.uniform(-1, 1, size=(50, 7)))
    return build_policy({**model_settings(*TINY), "seed": 0, **changes}, TEXTS, statistics)


def make_batch(policy: Policy, pack_tokens: int | None = None) -> Batch:
    rng = np.random.default_rng(1)
    layout, images = policy.processor.layout, policy.processor.images
    shape = (len(THOUGHTS), len(images.cameras), 3, images.image_size, images.image_size)
    pixels = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    actions = torch.from_numpy(rng.uniform(-1, 1, (len(THOUGHTS), layout.chunk, layout.action_dim))).float()
    return collate(layout, pixels, TEXTS[:3], THOUGHTS, actions, pack_tokens)


def counted(policy: Policy, batch: Batch, backward: bool = True) -> int:
    """By torch: the operators of a step, with attention as the two plain products that it is."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = policy.model(batch)
        if backward:
            result.sum().backward()
    return int(counter.get_total_flops())


def predicted(policy: Policy, batch: Batch, backward: bool = True) -> float:
    """By us, for the rows and columns that were computed: with padding and pairs that are masked away.

    The attention of the last layer, which is not in the formula, is added.
    """
    work, (rows, columns) = work_of([batch]), batch.input_ids_BT.shape
    cost, text = training_flops(policy.model, backward=backward), policy.model.config.text_config
    masks = runs(policy.model.mask(batch.segment_BT, batch.sample_BT), first_supervised(batch))
    pairs_of_runs = [mask[:, 0].numel() for mask in masks]
    counted_layers = text.num_hidden_layers - 1
    assert sum(pairs_of_runs) < rows * columns**2
    total = cost(pictures=work.pictures, tokens=rows * columns, pairs=sum(pairs_of_runs), supervised=work.supervised)
    return total + cost.pair / counted_layers * pairs_of_runs[-1]


@pytest.mark.parametrize("pack_tokens", [None, 512])
def test_a_full_step_costs_what_torch_counts(pack_tokens: int | None) -> None:
    policy = make_policy()
    batch = make_batch(policy, pack_tokens)
    assert predicted(policy, batch, backward=False) == counted(policy, batch, backward=False)
    assert predicted(policy, batch) == counted(policy, batch)


@pytest.mark.parametrize("frozen", [["vision_tower"], ["vision_tower", "projector"], ["language_model"]])
def test_frozen_parts_cost_only_what_flows_through_them(frozen: list[str]) -> None:
    policy = make_policy(freeze=frozen)
    batch = make_batch(policy)
    assert predicted(policy, batch) == counted(policy, batch)


@pytest.mark.parametrize(
    ("parts", "modules"),
    [
        (["language_model"], None),
        (["language_model", "projector"], None),
        (["language_model", "projector"], ["q_proj", "down_proj", "linear"]),
    ],
)
def test_an_adapter_costs_its_factors_and_no_gradient_of_frozen_weights(
    parts: list[str], modules: list[str] | None
) -> None:
    policy = make_policy(slot_embedding=False)
    whole = training_flops(policy.model).token
    adapters.attach(policy.model, {**LORA, "parts": parts, "modules": modules})
    batch = make_batch(policy)
    assert predicted(policy, batch) == pytest.approx(counted(policy, batch), rel=0.02)
    assert training_flops(policy.model).token < whole


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pack_tokens", [None, 512])
def test_work_counts_tokens_without_padding_and_visible_pairs(pack_tokens: int | None, causal: bool) -> None:
    policy = make_policy(**({"decoder": "autoregressive", "slot_embedding": False} if causal else {}))
    batch = make_batch(policy, pack_tokens)
    work = work_of([batch], causal)
    mask_BTT = visible(batch.segment_BT, batch.sample_BT, policy.model.rule)
    real_BT = batch.segment_BT != 3
    assert work.on_device.tolist() == [int(real_BT.sum()), int((mask_BTT & real_BT.unsqueeze(-1)).sum())]
    assert (work.samples, work.pictures, work.supervised) == (3, 6, int((batch.labels_BT != -100).sum()))
    twice = work_of([batch, batch], causal)
    assert twice.to_tensor().tolist() == (2 * work.to_tensor()).tolist()


def test_the_published_model_needs_six_operations_per_weight_and_token() -> None:
    """The usual estimate, from the sizes of the weights alone; the language model's and the vision tower's differ."""
    settings = model_settings("model=deepthinkvla", "model.checkpoint=null")
    vocabulary = make_policy().processor.layout.vocabulary
    with torch.device("meta"):
        model = HybridVLA(make_config({**settings, "vocabulary_size": None}, vocabulary))
    cost = training_flops(model)
    language = sum(w.numel() for n, w in model.named_parameters() if "language_model.layers" in n and w.ndim == 2)
    last = {n: w.numel() for n, w in model.named_parameters() if "language_model.layers.17" in n and w.ndim == 2}
    keys_and_values = sum(size for name, size in last.items() if "k_proj" in name or "v_proj" in name)
    read = sum(last.values()) - keys_and_values
    assert 0 < keys_and_values < read
    assert cost.token == pytest.approx(6 * (language - read))
    assert cost.supervised == pytest.approx(6 * (read + model.lm_head.weight.numel()))
    assert language == pytest.approx(1.98e9, rel=0.01)
    vision = sum(w.numel() for n, w in model.named_parameters() if "vision_tower" in n and w.ndim == 2)
    assert cost.picture == pytest.approx(6 * 256 * vision, rel=0.08)  # and attention, 256 patches a picture


def test_the_peak_of_a_device_is_that_of_dense_products(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    names = {"NVIDIA H200": 989.5e12, "NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA A100-SXM4-80GB": 312e12}
    for name, expected in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert flops.peak_flops(cuda, "bf16-mixed") == pytest.approx(expected)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Other GPU")
    assert flops.peak_flops(cuda, "bf16-mixed") is None
    assert flops.peak_flops(torch.device("cpu"), "32-true") is None
