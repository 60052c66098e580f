"""One folder holds a policy; anything that does not fit is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import PaliGemmaForConditionalGeneration

from dtvla.data.normalization import Statistics
from dtvla.errors import UserError
from dtvla.policy.cot import CotMode
from dtvla.policy.policy import Policy, build_policy

from .conftest import SETTINGS, WORDS, random_observation


@pytest.fixture(scope="module")
def saved(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "policy"
    policy.save(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_round_trip_is_exact(policy: Policy, saved: Path) -> None:
    again = Policy.load(saved, dtype=torch.float64)
    ours, theirs = policy.model.state_dict(), again.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.processor.layout.vocabulary == policy.processor.layout.vocabulary
    assert again.processor.layout.bins == policy.processor.layout.bins
    rng = np.random.default_rng(0)
    rows = [random_observation(policy, rng) for _ in range(2)]
    for one, other in zip(*(p.act(rows, CotMode("think", max_tokens=9)) for p in (policy, again)), strict=True):
        assert one.thought_ids == other.thought_ids
        np.testing.assert_array_equal(one.actions_SD, other.actions_SD)
    assert again.model.lm_head.weight is again.model.get_input_embeddings().weight
    assert not again.model.training


def test_folder_is_complete_safe_and_readable_by_transformers(policy: Policy, saved: Path) -> None:
    names = {file.name for file in saved.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "policy.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    assert not [file for file in saved.parent.iterdir() if file != saved]
    plain = PaliGemmaForConditionalGeneration.from_pretrained(saved, dtype=torch.float64)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, policy.model.state_dict()[name])
    assert json.loads((saved / "policy.json").read_text())["versions"]["torch"] == torch.__version__.split("+")[0]


def test_saving_never_replaces_without_being_told(policy: Policy, saved: Path, tmp_path: Path) -> None:
    before = (saved / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="exists already"):
        policy.save(saved)
    assert (saved / "model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not a policy"):
        policy.save(tmp_path, overwrite=True)
    target = tmp_path / "deep" / "policy"
    policy.save(target)
    policy.save(target, overwrite=True)
    assert Policy.load(target).processor.layout.chunk == SETTINGS["chunk"]
    assert [file.name for file in target.parent.iterdir()] == ["policy"]


def test_interrupted_save_leaves_the_old_policy(policy: Policy, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(policy.processor.layout.tokenizer), "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        policy.save(copy, overwrite=True)
    monkeypatch.undo()
    Policy.load(copy)
    assert [file for file in copy.parent.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "policy.json"])
def test_missing_and_truncated_files_are_named(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=str(copy)):
        Policy.load(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=name):
        Policy.load(copy)


def test_other_format_edited_statistics_and_other_weights_are_refused(copy: Path) -> None:
    description = json.loads((copy / "policy.json").read_text())
    tampered = json.loads(json.dumps(description))
    tampered["normalizer"]["statistics"]["action"]["q01"][0] += 0.5
    (copy / "policy.json").write_text(json.dumps(tampered))
    with pytest.raises(UserError, match="digest"):
        Policy.load(copy)
    (copy / "policy.json").write_text(json.dumps(description | {"format_version": 99}))
    with pytest.raises(UserError, match="format version 99"):
        Policy.load(copy)
    (copy / "policy.json").write_text(json.dumps(description))
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="missing weights: model.language_model.layers.2"):
        Policy.load(copy)


def test_fresh_weights_depend_on_the_seed_alone(statistics: Statistics) -> None:
    def weights(seed: int, noise: int) -> torch.Tensor:
        torch.manual_seed(noise)
        state = torch.random.get_rng_state()
        policy = build_policy(SETTINGS | {"seed": seed}, WORDS, statistics)
        assert torch.equal(torch.random.get_rng_state(), state)
        return torch.cat([p.detach().flatten() for p in policy.model.parameters()])

    assert torch.equal(weights(1, 5), weights(1, 6))
    assert not torch.equal(weights(1, 5), weights(2, 5))


def test_training_continues_from_a_saved_policy(policy: Policy, saved: Path, statistics: Statistics) -> None:
    again = build_policy(SETTINGS | {"checkpoint": str(saved)}, [], statistics)
    assert torch.equal(again.model.lm_head.weight, policy.model.lm_head.weight.float())
    other = Statistics.from_frames(
        np.random.default_rng(2).normal(size=(50, 8)), np.random.default_rng(3).random((50, 7))
    )
    kept = build_policy(SETTINGS | {"checkpoint": str(saved)}, [], other).processor.normalizer.statistics
    assert kept == policy.processor.normalizer.statistics


def test_transformers_checkpoint_without_policy_file_gives_its_weights(
    policy: Policy, make_policy: Callable[..., Policy], statistics: Statistics, tmp_path: Path
) -> None:
    source = make_policy(slot_embedding=False)
    source.model.save_pretrained(tmp_path)
    source.processor.layout.tokenizer.save_pretrained(tmp_path)
    built = build_policy(SETTINGS | {"checkpoint": str(tmp_path)}, [], statistics)
    assert built.model.slot_embedding is None
    assert torch.equal(built.model.lm_head.weight, source.model.lm_head.weight.float())
    assert built.processor.layout.vocabulary == source.processor.layout.vocabulary
    with pytest.raises(UserError, match="action_bins"):
        build_policy(SETTINGS | {"checkpoint": str(tmp_path), "action_bins": 99}, [], statistics)


def test_absent_checkpoints_say_what_to_download_where(
    statistics: Statistics, repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    published = OmegaConf.to_container(OmegaConf.load(repository / "conf" / "model" / "deepthinkvla.yaml"))
    with pytest.raises(UserError, match="hf download yinchenghust/deepthinkvla_base --local-dir"):
        build_policy(published, [], statistics)
    with pytest.raises(UserError, match="no folder"):
        build_policy(SETTINGS | {"checkpoint": "/nowhere/at/all"}, [], statistics)
    with pytest.raises(UserError, match="an empty folder"):
        build_policy(SETTINGS | {"checkpoint": str(tmp_path)}, [], statistics)
