"""Protects the recipes that fit a small GPU: they compose, train on a tiny model, resume exactly, and fit 24 GB."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from safetensors.torch import load_file
from training_data import TINY, write_demonstrations

from dtvla.cli import config_dir
from dtvla.errors import UserError
from dtvla.learning.experiment import train
from dtvla.policy import quantization
from dtvla.policy.policy import Policy

RECIPES = ("libero_cot_lora", "libero_cot_qlora")


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def settings(root: Path) -> list[str]:
    """What shrinks any recipe to a tiny model on the CPU."""
    return [
        *TINY,
        "model.text.hidden_size=64",
        "model.text.head_dim=32",
        "++model.compile=false",
        f"data.root={write_demonstrations(root / 'squares', episodes=3, frames=16)}",
        f"paths.root={root}",
        "data.num_workers=0",
        "algorithm.micro_batch_size=4",
        "algorithm.optimizer.warmup_steps=1",
        "trainer=cpu",
        "trainer.precision=bf16-mixed",
        "trainer.max_steps=4",
        "trainer.val_check_interval=null",
        "callbacks.samples.frames=1",
        "logger=csv",
    ]


@pytest.fixture(scope="module")
def base(settings: list[str], root: Path) -> Path:
    train(composed(*settings, "name=base"))
    return root / "runs" / "base" / "policy"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_keep_the_published_values_that_do_not_concern_memory(recipe: str) -> None:
    ours, published = composed(f"+experiment={recipe}"), composed("+experiment=libero_cot_sft")
    assert (ours.data.root, ours.data.batch_size, ours.seed) == (published.data.root, 128, 429)
    assert ours.algorithm.optimizer.lr == published.algorithm.optimizer.lr
    assert ours.trainer.max_steps == published.trainer.max_steps
    assert (ours.model.lora.r, ours.model.lora.alpha, ours.model.lora.dropout) == (64, 16, 0.05)
    assert ours.model.checkpoint == published.model.checkpoint
    assert ours.model.quantize == ("4bit" if recipe.endswith("qlora") else None)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_an_adapter_that_opens_again(recipe: str, settings: list[str], base: Path, root: Path) -> None:
    train(composed(f"+experiment={recipe}", *settings, f"model.checkpoint={base}", "model.lora.r=4", f"name={recipe}"))
    policy = Policy.load(root / "runs" / recipe / "policy")
    assert quantization.bits_of(policy.model) == ("4bit" if recipe.endswith("qlora") else None)
    factors = [w for name, w in policy.model.named_parameters() if "lora_B" in name]
    assert len(factors) > 5
    assert all(w.abs().max() > 0 for w in factors)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_with_8_bit_moments_resumes_to_the_same_weights(
    settings: list[str], root: Path, precision: str
) -> None:
    name = f"eight-{precision}"
    eight = [*settings, "algorithm.optimizer.name=adamw_8bit", f"trainer.precision={precision}"]
    train(composed(*eight, f"name={name}", "callbacks.checkpoint.keep_every_n_steps=2"))
    whole, folder = root / "runs" / name, root / "runs" / f"{name}-resumed"
    saved = torch.load(whole / "checkpoints" / "step-0000002.ckpt", weights_only=True)
    states = saved["optimizer_states"][0]["state"].values()
    assert any(t.dtype == torch.uint8 for s in states for t in s["__bnb_optimizer_quant_state__"].values())
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / "step-0000002.ckpt", folder / "checkpoints" / "last.ckpt")
    shutil.copy(whole / "config.yaml", folder)
    train(composed(*eight, f"name={name}-resumed", "resume=true"))
    ours, theirs = (load_file(place / "policy" / "model.safetensors") for place in (folder, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_unknown_optimizer_is_named_before_the_data_is_opened(root: Path) -> None:
    with pytest.raises(UserError, match=r"algorithm\.optimizer\.name: 'adam'.*adamw_8bit"):
        train(composed(f"paths.root={root}", f"data.root={root / 'nowhere'}", "algorithm.optimizer.name=adam"))
