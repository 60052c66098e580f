"""Protects the memory study: predictions without content equal what real tensors and a real process take."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Command
from torch import nn

from dtvla.benchmarks.live_bytes import COPIES, GRADIENTS, REST, STATES, WEIGHTS, LiveBytes
from dtvla.benchmarks.memory import measure, predict
from dtvla.benchmarks.memory_settings import METHODS, Case, Settings, model_group
from dtvla.benchmarks.processes import in_child
from dtvla.errors import UserError

CPU = torch.device("cpu")


def case(method: str = "full", micro_batch: int = 2, **model: Any) -> Case:
    """On half of the nano model."""
    values = model_group("nano")
    values["text"] = {**values["text"], "num_hidden_layers": 2}
    values["vision"] = {**values["vision"], "num_hidden_layers": 1}
    return Case({**values, **model}, method, micro_batch, "32-true")


@cache
def half_nano(method: str) -> dict[str, Any]:
    return predict(case(method))


def total(found: dict[str, Any]) -> int:
    return sum(found["peak_bytes"].values())


def test_live_bytes_follow_storages_through_views_and_frees() -> None:
    live = LiveBytes()
    with live:
        one = torch.zeros(1000)
        view = one.view(10, 100)
        other = one + 1
        assert live.now.total() == 8000
        del one, other
        assert live.now.total() == 4000
        del view
        assert live.now.total() == 0
    assert live.peak.total() == 8000


def test_kinds_of_a_layer_are_counted_by_hand() -> None:
    """One 100 x 100 layer without bias on 7 rows in bfloat16 autocast: every tensor has a known size."""
    layer, live = nn.Linear(100, 100, bias=False), LiveBytes()
    live.claim(layer.parameters(), WEIGHTS)
    live.watch_gradients(layer)
    with live:
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(torch.zeros(7, 100)).sum()
            assert live.now[COPIES] == 2 * 100 * 100
            loss.backward()
        del loss
    assert live.now[WEIGHTS] == live.now[GRADIENTS] == 4 * 100 * 100
    assert live.now[COPIES] == live.now[REST] == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_predicted_without_content(method: str) -> None:
    found, whole = half_nano(method), half_nano("full")["peak_bytes"]
    peak = found["peak_bytes"]
    eight_bit, adapter = "8-bit" in method, "LoRA" in method
    assert peak[GRADIENTS] == 4 * found["trained"]
    if adapter:
        assert found["trained"] == found["adapter"] < found["parameters"]
        assert peak[STATES] == pytest.approx(8 * found["trained"], rel=1e-3)
    else:
        assert found["parameters"] == found["trained"]
        share = 2 + 8 / 256 if eight_bit else 8  # bytes for a weight, with two scales for each 256
        assert peak[STATES] == pytest.approx(share * found["trained"], rel=0.01)
    if "checkpointing" in method:
        assert peak[REST] < half_nano(method.removesuffix(", checkpointing"))["peak_bytes"][REST]
    if method.startswith("QLoRA"):
        assert peak[WEIGHTS] < half_nano(method[1:])["peak_bytes"][WEIGHTS]
    assert (found["sharded_bytes"] is None) == (eight_bit or method.startswith("QLoRA"))
    assert adapter or peak[WEIGHTS] == whole[WEIGHTS]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full, checkpointing", "QLoRA"])
def test_a_prediction_is_within_a_tenth_of_the_memory_of_a_real_process(method: str) -> None:
    tried = case(method, 8, image_size=160)
    predicted, measured = total(predict(tried)), in_child(measure, tried, CPU)
    assert measured == pytest.approx(predicted, rel=0.1)


def test_shares_of_eight_gpus_hold_an_eighth_of_what_is_shared_out() -> None:
    one, eight = predict(case(), gpus=1), half_nano("full")
    own = sum(one["peak_bytes"][kind] for kind in (WEIGHTS, GRADIENTS, STATES))
    assert one["sharded_bytes"] - eight["sharded_bytes"] == pytest.approx(own * 7 / 8, rel=1e-6)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"models": ("huge",)}, "models: 'huge'.*'nano'"),
        ({"methods": ("fast",)}, "methods: 'fast'.*'LoRA'"),
        ({"methods": ()}, "methods: is empty"),
        ({"micro_batches": (0,)}, "micro_batches"),
        ({"precision": "16"}, "precision: '16'.*bf16-mixed"),
        ({"gpus": 0}, "gpus"),
    ],
)
def test_settings_that_cannot_be_built_are_named(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Settings(**wrong)


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_its_numbers(tmp_path: Path) -> None:
    arguments = ["memory", "models=[nano]", "methods=[LoRA]", "micro_batches=[1,2]", f"output={tmp_path}"]
    benchmark = Command("benchmark", *arguments)
    output, errors = benchmark.wait(240)
    assert benchmark.returncode == 0, errors
    document = json.loads((tmp_path / "memory-bf16-mixed.json").read_text())
    assert [(row["model"], row["method"], row["micro_batch"]) for row in document["rows"]] == [
        ("nano", "LoRA", size) for size in (1, 2)
    ]
    for row in document["rows"]:
        assert f"{total(row) / 1e9:.3g}" in output
    one, two = (total(row) for row in document["rows"][:2])
    assert one < two < 2 * one


@pytest.mark.slow
def test_the_published_model_trains_on_24_gb_with_the_recipes_for_it() -> None:
    """The two experiments, at the micro-batch they set."""
    from hydra import compose, initialize_config_dir

    from dtvla.cli import config_dir

    for recipe, method in (("libero_cot_lora", "LoRA, checkpointing"), ("libero_cot_qlora", "QLoRA, checkpointing")):
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = compose("train", overrides=[f"+experiment={recipe}"])
        assert cfg.model.gradient_checkpointing
        assert cfg.algorithm.optimizer.name == METHODS[method][0]
        assert total(predict(Case(model_group("deepthinkvla"), method, cfg.algorithm.micro_batch_size))) < 23e9
