"""Protects training of adapters end to end: real data, a resume, the folder that evaluation opens, quantised bases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from training_data import INSTRUCTION, TINY, write_demonstrations

from dtvla.cli import config_dir
from dtvla.errors import UserError
from dtvla.learning.experiment import train
from dtvla.policy import adapters, checkpoint, quantization
from dtvla.policy.cot import CotMode
from dtvla.policy.policy import Decision, Policy

FILES = {"adapter_config.json", "adapter_model.safetensors", "policy.json"}
LORA = ("model/lora=published", "model.lora.r=4", "algorithm.optimizer.warmup_steps=1")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def settings(root: Path) -> list[str]:
    data = write_demonstrations(root / "squares", episodes=3, frames=16)
    return [
        *TINY,
        "model.text.hidden_size=64",
        "model.text.head_dim=32",
        f"data.root={data}",
        f"paths.root={root}",
        "data.num_workers=0",
        "trainer.log_every_n_steps=1",
        "trainer.limit_val_batches=1",
        "callbacks.samples.frames=1",
        "logger=csv",
    ]


@pytest.fixture(scope="module")
def base(settings: list[str], root: Path) -> Path:
    run(*settings, "name=base", "trainer.max_steps=8")
    return root / "runs" / "base" / "policy"


@pytest.fixture(scope="module")
def lora(settings: list[str], base: Path) -> list[str]:
    return [*settings, *LORA, f"model.checkpoint={base}", "trainer.max_steps=8"]


@pytest.fixture(scope="module")
def adapted(lora: list[str], root: Path) -> Path:
    run(*lora, "name=adapted", "callbacks.checkpoint.keep_every_n_steps=3")
    return root / "runs" / "adapted"


def run(*overrides: str) -> float | None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return train(compose("train", overrides=list(overrides)))


def decide(policy: Policy) -> Decision:
    rng = np.random.default_rng(0)
    pictures = {camera: rng.integers(0, 255, (64, 64, 3), dtype=np.uint8) for camera in ("agentview", "wrist")}
    return policy.act([{**pictures, "instruction": INSTRUCTION}], CotMode(max_tokens=8))[0]


def losses(folder: Path) -> list[float]:
    lines = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    column = lines[0].index("train/loss")
    return [float(line[column]) for line in lines[1:]]


def test_a_run_lowers_the_loss_and_leaves_an_adapter_folder(adapted: Path, base: Path) -> None:
    found = losses(adapted)
    assert np.mean(found[-2:]) < np.mean(found[:2])
    assert {file.name for file in (adapted / "policy").iterdir()} == FILES
    config = json.loads((adapted / "policy" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(base), 4, 16)


def test_the_folder_opens_and_merges_into_the_same_decisions(adapted: Path, base: Path) -> None:
    policy, plain = Policy.load(adapted / "policy"), Policy.load(base)
    assert adapters.has_adapter(policy.model)
    for name, weight in plain.model.named_parameters():
        module, _, last = name.rpartition(".")
        layer = policy.model.get_submodule(module)
        kept = getattr(layer, "base_layer", getattr(layer, "original_module", layer))
        assert torch.equal(getattr(kept, last), weight), name
    before = decide(policy)
    adapters.merge(policy.model)
    after = decide(policy)
    assert before.thought_ids == after.thought_ids
    np.testing.assert_array_equal(before.actions_SD, after.actions_SD)


def test_checkpoints_hold_the_adapter_only_and_resume_to_the_same_weights(
    adapted: Path, lora: list[str], root: Path
) -> None:
    content = torch.load(adapted / "checkpoints" / "step-0000003.ckpt", weights_only=True)
    assert content["state_dict"]
    assert all(adapters.is_adapter(name) for name in content["state_dict"])
    folder = root / "runs" / "resumed"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(adapted / "checkpoints" / "step-0000003.ckpt", folder / "checkpoints" / "last.ckpt")
    shutil.copy(adapted / "config.yaml", folder)
    run(*lora, "name=resumed", "resume=true")
    ours, theirs = (load_file(place / "policy" / "adapter_model.safetensors") for place in (folder, adapted))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_resume_on_another_base_is_refused(adapted: Path, lora: list[str], base: Path, root: Path) -> None:
    folder = root / "runs" / "elsewhere"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(adapted / "checkpoints" / "step-0000003.ckpt", folder / "checkpoints" / "last.ckpt")
    shutil.copy(adapted / "config.yaml", folder)
    content = (base / "model.safetensors").read_bytes()
    weights = {name: weight.clone() for name, weight in load_file(base / "model.safetensors").items()}
    weights[min(weights)] += 1e-3
    try:
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"model\.checkpoint changed"):
            run(*lora, "name=elsewhere", "resume=true")
    finally:
        (base / "model.safetensors").write_bytes(content)


def test_an_adapter_on_a_4bit_base_trains_reopens_quantised_and_is_trained_on(
    lora: list[str], root: Path, base: Path
) -> None:
    short = [*lora, "trainer.max_steps=2", "trainer.val_check_interval=null"]
    run(*short, "name=quantised", "model.quantize=4bit")
    folder = root / "runs" / "quantised" / "policy"
    assert {file.name for file in folder.iterdir()} == FILES
    policy = Policy.load(folder)
    assert quantization.bits_of(policy.model) == "4bit"
    assert np.isfinite(decide(policy).actions_SD).all()
    with pytest.raises(UserError, match="can't be merged into 4bit"):
        adapters.merge(policy.model)
    whole = checkpoint.load(folder, as_trained=False)
    assert quantization.bits_of(whole.model) is None
    adapters.merge(whole.model)
    run(*short, "name=further", f"model.checkpoint={folder}")
    further = Policy.load(root / "runs" / "further" / "policy")
    layer = further.model.model.language_model.layers[0].mlp.up_proj.base_layer
    assert torch.equal(layer.weight, whole.model.model.language_model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.checkpoint=null"], r"model\.lora.*model\.checkpoint"),
        (["algorithm.optimizer.lr.projector=0"], r"lr\.projector.*model\.lora\.parts"),
        (["model.freeze=[language_model]"], r"language_model.*model\.freeze"),
        (["model.lora=null", "model.quantize=8bit"], "no weight is left to train"),
        (["model.lora=null", "model.freeze=[language_model,vision_tower,projector]"], "no weight is left to train"),
    ],
)
def test_runs_that_train_nothing_or_contradict_themselves_are_refused(
    lora: list[str], root: Path, overrides: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        run(*lora, "name=refused", *overrides)
    assert not (root / "runs" / "refused").exists()
