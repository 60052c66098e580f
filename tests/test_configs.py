"""Protects the configuration: every group option and experiment composes, and errors in it are short and clear."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Command
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from dtvla.cli import config_dir

CONF = config_dir()
GROUPS = "model model/decoder model/lora data env protocol cot algorithm compat trainer callbacks logger"


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dtvla.train", *arguments], capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize("group", GROUPS.split())
def test_every_option_of_every_group_composes_and_resolves(group: str) -> None:
    assert options(group)
    for option in options(group):
        OmegaConf.to_container(composed(f"{group}={option}"), resolve=True)


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_composes_with_every_debug_option(experiment: str) -> None:
    OmegaConf.to_container(composed(f"+experiment={experiment}"), resolve=True)
    for debug in options("debug"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", overrides=[f"+experiment={experiment}", f"+debug={debug}"], return_hydra_config=True)
            assert str(cfg.name).startswith("debug_")


def test_the_published_recipe_has_the_published_values() -> None:
    cfg = composed("+experiment=libero_cot_sft")
    optimizer = cfg.algorithm.optimizer
    assert dict(optimizer.lr) == {"language_model": 2.5e-5, "vision_tower": 5e-6, "projector": 2.5e-6}
    assert (list(optimizer.betas), optimizer.eps, optimizer.weight_decay) == ([0.9, 0.95], 1e-8, 1e-10)
    assert (optimizer.clip, optimizer.warmup_steps, optimizer.min_ratio) == (1.0, 1000, 0.1)
    assert (cfg.trainer.max_steps, cfg.seed, cfg.data.batch_size) == (150_005, 429, 128)
    assert cfg.algorithm.loss.action_smoothing_bins == 0


@pytest.mark.parametrize("model", options("model"))
def test_decoder_and_adapter_are_chosen_apart_from_the_model(model: str) -> None:
    plain, other = composed(f"model={model}").model, composed(f"model={model}", "model/decoder=autoregressive").model
    assert (plain.decoder, plain.lora) == ("hybrid", None)
    assert (other.decoder, other.slot_embedding) == ("autoregressive", False)
    assert {key for key in plain if plain[key] != other[key]} <= {"decoder", "slot_embedding"}


def test_every_value_of_the_recipe_can_be_overridden() -> None:
    cfg = composed("+experiment=quickstart", "algorithm.optimizer.lr.projector=0.5", "name=mine", "seed=7")
    assert cfg.algorithm.optimizer.lr.projector == 0.5
    assert cfg.callbacks.checkpoint.folder == f"{cfg.paths.runs}/mine/checkpoints"
    assert cfg.data.seed == 7


def test_help_answers_within_three_seconds_of_cpu_and_shows_the_groups() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = command("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    assert answer.returncode == 0
    assert "quickstart" in answer.stdout
    assert "micro_batch_size" in answer.stdout
    assert seconds < 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("trainer.max_stepz=3",), "max_stepz"),
        (("+experiment=quikstart",), "quikstart"),
        (("modell=nano",), "modell"),
    ],
)
def test_a_misspelled_option_is_named_without_a_stack(arguments: tuple[str, ...], expected: str) -> None:
    answer = command(*arguments)
    assert answer.returncode != 0
    assert expected in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.slow
def test_absent_weights_and_data_are_named_with_the_commands_that_bring_them(tmp_path: Path) -> None:
    training = Command("train", "+experiment=libero_cot_sft", f"paths.root={tmp_path}")
    lines = training.wait(240)[1].strip().splitlines()
    assert training.returncode == 2
    assert len(lines) == 1
    for words in ("yinchenghust/libero_cot", "yinchenghust/deepthinkvla_base", "hf download", str(tmp_path)):
        assert words in lines[0]
    assert not list(tmp_path.iterdir())
