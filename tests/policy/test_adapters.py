"""Protects adapters and freezing: what is trained and what is not, complete files, and merging."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from dtvla.errors import UserError
from dtvla.learning.optim import OptimizerSettings, parameter_groups
from dtvla.policy import adapters
from dtvla.policy.cot import CotMode
from dtvla.policy.layout import Batch
from dtvla.policy.loss import sft_loss
from dtvla.policy.model import HybridVLA
from dtvla.policy.policy import Policy

from .conftest import make_batch, random_example, random_observation

ALL = {"r": 3, "dropout": 0.0, "parts": list(adapters.PARTS)}
THINK = CotMode("think", max_tokens=9)


def randomize(model: HybridVLA, seed: int = 0) -> None:
    """Give the adapter values as after a training; both factors count."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if adapters.is_adapter(name):
                weight.add_(0.06 * torch.randn(weight.shape, generator=rng, dtype=weight.dtype))


def snapshot(model: HybridVLA) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def train(model: HybridVLA, batch: Batch, policy: Policy, steps: int = 8) -> list[float]:
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        sums = sft_loss(model.train(), batch, policy.processor.layout.bins)
        loss = sums.cross_entropy / sums.tokens
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.fixture
def adapted(make_policy: Callable[..., Policy]) -> Policy:
    policy = make_policy()
    policy.model.float()
    adapters.attach(policy.model, ALL, base="somewhere")
    randomize(policy.model)
    return policy


@pytest.fixture
def batch(policy: Policy) -> Batch:
    rng = np.random.default_rng(3)
    return make_batch(policy, [random_example(policy, rng) for _ in range(5)])


def decisions(policy: Policy, seed: int = 5) -> list[tuple[list[int], list[float]]]:
    rng = np.random.default_rng(seed)
    rows = [random_observation(policy, rng) for _ in range(3)]
    return [(d.thought_ids, d.actions_SD.ravel().tolist()) for d in policy.act(rows, THINK)]


def test_a_fresh_adapter_changes_nothing_and_is_drawn_from_its_seed(
    make_policy: Callable[..., Policy], batch: Batch
) -> None:
    models = [make_policy().model for _ in range(3)]
    before = models[0](batch)
    state = torch.random.get_rng_state()
    for model, seed in zip(models, (1, 1, 2), strict=True):
        adapters.attach(model, ALL, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(models[0](batch), before)
    first, same, other = (snapshot(model) for model in models)
    name = "lm_head.lora_A.default.weight"
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], other[name])


def test_the_published_adapter_is_on_every_linear_and_embedding_layer_of_its_parts(
    make_policy: Callable[..., Policy],
) -> None:
    plain = make_policy().model
    layers = [n for n, m in plain.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))]
    wanted = {n for n in layers if "vision_tower" not in n and n != "slot_embedding"}
    assert {"lm_head", "model.language_model.embed_tokens", "model.multi_modal_projector.linear"} < wanted
    adapters.attach(plain, {"r": 2})
    assert {n for n, m in plain.named_modules() if hasattr(m, "lora_A")} == wanted
    trained = [n for n, p in plain.named_parameters() if p.requires_grad]
    assert trained
    assert all(adapters.is_adapter(n) for n in trained)
    assert [n for n in trained if "slot_embedding" in n] == ["slot_embedding.modules_to_save.default.weight"]


def test_a_few_steps_lower_the_loss_and_change_the_adapter_alone(
    make_policy: Callable[..., Policy], policy: Policy, batch: Batch
) -> None:
    model = make_policy().model.float()
    adapters.attach(model, ALL)
    before = snapshot(model)
    losses = train(model, batch, policy)
    assert losses[-1] < losses[0] - 0.5
    for name, weight in model.named_parameters():
        changed = not torch.equal(weight, before[name])
        still = "lora_embedding" in name and "lora_embedding_A" in name and "position" in name  # no gradient is certain
        assert changed == adapters.is_adapter(name) or still, name


def test_merging_keeps_logits_and_decisions_in_float32(adapted: Policy, batch: Batch) -> None:
    """The token embedding and the output layer share a weight but not an adapter: both must come out right."""
    model = adapted.model
    with torch.no_grad():
        expected, chosen = model(batch), decisions(adapted)
        base = copy.deepcopy(model)
        adapters.merge(model)
        found = model(batch)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert decisions(adapted) == chosen
    assert not adapters.has_adapter(model)
    assert not [name for name, _ in model.named_modules() if "lora" in name or "base_layer" in name]
    assert all(weight.requires_grad for weight in model.parameters())
    assert model.lm_head.weight is not model.model.language_model.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    with adapters.disabled(base), torch.no_grad():
        assert (base(batch) - expected).abs().max() > 0.1


def test_merging_is_exact_in_float64(make_policy: Callable[..., Policy], batch: Batch, exact_norms: None) -> None:
    model = make_policy().model
    adapters.attach(model, ALL)
    randomize(model)
    with torch.no_grad():
        expected = model(batch)
        adapters.merge(model)
        assert torch.allclose(model(batch), expected, rtol=1e-11, atol=1e-11)


def test_bfloat16_weights_are_merged_in_float32_and_rounded_once(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    model: Any = policy.model.bfloat16()
    adapters.attach(model, ALL)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if adapters.is_adapter(n))
    randomize(model)
    layers = {"model.language_model.layers.1.mlp.up_proj": False, "lm_head": False}
    expected = {}
    for name in layers:
        layer = model.get_submodule(name)
        product = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double() * 16 / 3
        expected[name] = layer.weight.double() + product
    embedding = model.model.language_model.embed_tokens
    a, b = embedding.lora_embedding_A["default"].double(), embedding.lora_embedding_B["default"].double()
    expected["model.language_model.embed_tokens"] = embedding.weight.double() + (b @ a).T * 16 / 3
    adapters.merge(model)
    for name, exact in expected.items():
        weight = model.get_submodule(name).weight
        assert weight.dtype == torch.bfloat16
        bound = exact.abs() * 2**-8 + 1e-6
        assert bool(((weight.double() - exact).abs() <= bound).all()), name


def test_the_action_pass_reads_the_adapted_output_layer(adapted: Policy) -> None:
    model, bins = adapted.model, adapted.processor.layout.bins
    hidden = torch.randn(2, 5, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(2))

    def band() -> torch.Tensor:
        return adapters.linear_rows(model.lm_head, hidden, bins.first_id, bins.last_id).flip(-1)

    whole = model.logits(hidden)[..., bins.first_id : bins.last_id + 1].flip(-1)
    assert torch.allclose(band(), whole, atol=1e-4)
    with adapters.disabled(model):
        assert not torch.allclose(band(), whole, atol=1e-2)


def test_disabled_is_the_base_model_and_leaves_no_trace(
    make_policy: Callable[..., Policy], adapted: Policy, batch: Batch
) -> None:
    base = make_policy()
    base.model.float()
    for weight in adapted.model.parameters():
        weight.requires_grad_(False)
    with torch.no_grad():
        expected, chosen = adapted.model(batch), decisions(adapted)
        with adapters.disabled(adapted.model):
            assert torch.equal(adapted.model(batch), base.model(batch))
            assert decisions(adapted) == decisions(base) != chosen
        assert torch.equal(adapted.model(batch), expected)
        assert decisions(adapted) == chosen
    assert not any(weight.requires_grad for weight in adapted.model.parameters())


def test_saved_adapter_makes_the_same_model_of_the_same_base(
    make_policy: Callable[..., Policy], adapted: Policy, batch: Batch, tmp_path: Path
) -> None:
    adapters.save(adapted.model, tmp_path)
    again = make_policy()
    again.model.float()
    adapters.load(again.model, tmp_path)
    assert torch.equal(again.model(batch), adapted.model(batch))
    assert decisions(again) == decisions(adapted)
    assert adapters.base_of(again.model) == "somewhere"
    assert not any(weight.requires_grad for weight in again.model.parameters())
    size = sum(weight.numel() for weight in load_file(tmp_path / adapters.WEIGHTS_FILE).values())
    assert size == sum(w.numel() for n, w in adapted.model.named_parameters() if adapters.is_adapter(n))
    trainable = make_policy().model.float()
    adapters.load(trainable, tmp_path, trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in trainable.named_parameters() if adapters.is_adapter(n)
    }


def test_the_folder_is_one_that_peft_reads(
    make_policy: Callable[..., Policy], adapted: Policy, batch: Batch, tmp_path: Path
) -> None:
    adapters.save(adapted.model, tmp_path)
    theirs = PeftModel.from_pretrained(make_policy().model.float(), str(tmp_path))
    assert torch.equal(theirs.base_model.model(batch), adapted.model(batch))
    names = get_peft_model_state_dict(adapted.model, save_embedding_layers=False)
    assert set(load_file(tmp_path / adapters.WEIGHTS_FILE)) == {adapters.PREFIX + name for name in names}


def test_adapters_that_do_not_fit_are_refused_by_name(
    make_policy: Callable[..., Policy], adapted: Policy, tmp_path: Path
) -> None:
    adapters.save(adapted.model, tmp_path)
    weights, config = tmp_path / adapters.WEIGHTS_FILE, tmp_path / adapters.CONFIG_FILE
    content, values = weights.read_bytes(), json.loads(config.read_text())
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match):
            adapters.load(make_policy().model, tmp_path)

    weights.write_bytes(content[: len(content) // 2])
    refused("damaged")
    name = sorted(tensors)[0]
    save_file({n: t for n, t in tensors.items() if n != name}, weights)
    refused("does not fit")
    save_file({**tensors, name: tensors[name][:1].contiguous()}, weights)
    refused("does not fit")
    weights.write_bytes(content)
    config.write_text(json.dumps({**values, "use_dora": True}))
    refused("plain LoRA")
    config.write_text("{")
    refused("damaged")
    config.unlink()
    refused("no adapter_config.json")


def test_preparing_an_adapted_model_merges_first(adapted: Policy, batch: Batch) -> None:
    with torch.no_grad():
        expected = adapted.model(batch)
        adapters.prepare(adapted.model, {"lora": {"r": 2}, "checkpoint": "next"})
        assert (adapted.model(batch) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert adapters.base_of(adapted.model) == "next"


def test_the_optimizer_has_each_adapter_weight_once_at_the_rate_of_its_part(adapted: Policy) -> None:
    rates = {"language_model": 3e-3, "vision_tower": 2e-3, "projector": 1e-3}
    groups = parameter_groups(adapted.model, OptimizerSettings(lr=rates))
    placed = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    assert len(placed) == sum(len(group["params"]) for group in groups)
    owners = {"vision_tower": "vision_tower", "projector": "multi_modal_projector"}
    for name, weight in adapted.model.named_parameters():
        part = next((part for part, words in owners.items() if words in name), "language_model")
        assert placed.pop(id(weight), None) == (rates[part] if adapters.is_adapter(name) else None), name
    assert not placed


def test_the_published_configuration_is_the_default(repository: Path) -> None:
    groups = repository / "conf" / "model" / "lora"
    values: Any = OmegaConf.to_container(OmegaConf.load(groups / "published.yaml"))
    assert adapters.LoraSettings.from_dict(values["lora"]) == adapters.LoraSettings()
    assert OmegaConf.to_container(OmegaConf.load(groups / "none.yaml")) == {"lora": None}


@pytest.mark.parametrize("part", adapters.PARTS)
def test_freezing_keeps_exactly_the_named_part(
    make_policy: Callable[..., Policy], policy: Policy, batch: Batch, part: str
) -> None:
    model = make_policy().model.float()
    adapters.prepare(model, {"freeze": [part]})
    before = snapshot(model)
    train(model, batch, policy, steps=3)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == (adapters.part_of(name) == part), name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"freeze": ["llm"]}, "model.freeze.*llm"),
        ({"lora": {"rank": 4}}, "model.lora.*rank"),
        ({"lora": {"r": 0}}, "model.lora.r"),
        ({"lora": {"dropout": 1.0}}, "model.lora.dropout"),
        ({"lora": {"alpha": 0}}, "model.lora.alpha"),
        ({"lora": {"parts": ["head"]}}, "model.lora.parts"),
        ({"lora": {"parts": []}}, "model.lora.parts"),
        ({"lora": {"modules": ["qkv"]}}, "model.lora.modules"),
        ({"lora": {"parts": ["vision_tower"]}, "freeze": ["vision_tower"]}, "vision_tower.*model.freeze"),
        ({"quantize": "3bit"}, "quantize"),
    ],
)
def test_impossible_settings_are_refused(
    make_policy: Callable[..., Policy], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        adapters.prepare(make_policy().model, settings)
