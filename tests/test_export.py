"""``dtvla export`` from the command line's settings to a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from policy.conftest import SETTINGS, WORDS
from policy.published_folder import random_weights, read_weights, write_published
from safetensors.torch import load_file

from dtvla.cli import config_dir
from dtvla.data.normalization import Statistics
from dtvla.errors import UserError
from dtvla.export import export
from dtvla.policy.policy import Policy, build_policy


def config(checkpoint: Path | str, output: Path, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("export", [f"checkpoint={checkpoint}", f"output={output}", *overrides])


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "sft"
    write_published(folder, random_weights())
    return folder


def test_export_there_and_back_keeps_every_weight(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, back = tmp_path / "own", tmp_path / "back"
    assert export(config(published, own, "format=dtvla", "compat.action_decode=published")) == own
    assert f"34 weights (bfloat16): {own}" in capsys.readouterr().out
    assert json.loads((own / "policy.json").read_text())["action_decode"] == "published"
    export(config(own, back, "shard_size=40KB", "compat.action_decode=fixed"))
    expected = read_weights(published)
    written = read_weights(back)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    assert len(list(back.glob("model-*.safetensors"))) > 1
    assert not (back / "policy.json").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["back", "own"]


@pytest.mark.parametrize(("stored", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "null")])
def test_dtype_is_that_of_the_written_weights(tmp_path: Path, stored: str, dtype: str) -> None:
    weights = random_weights(2, getattr(torch, stored))
    write_published(tmp_path / "in", weights, shards=1)
    export(config(tmp_path / "in", tmp_path / "out", f"dtype={dtype}"))
    wanted = stored if dtype == "null" else dtype
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], weights[name].to(getattr(torch, wanted))) for name in weights)
    assert {weight.dtype for weight in written.values()} == {getattr(torch, wanted)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == wanted


def test_model_card_tells_facts_and_an_own_one_is_kept(published: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    export(config(published, tmp_path / "out"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "dtvla"
    assert "robotics" in card.data.to_dict().values()
    assert "actions: 10 steps of 7 dimensions, 64 bins" in card.text
    (tmp_path / "out" / "README.md").write_text("# mine")
    export(config(tmp_path / "out", tmp_path / "again"))
    assert (tmp_path / "again" / "README.md").read_text() == "# mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["format=onnx"], "format: 'onnx' is unknown; use published, dtvla or adapter"),
        (["dtype=float64"], "dtype: 'float64' is unknown"),
        (["shard_size=big"], "shard_size: 'big' is not a size"),
        (["push_to_hub=me"], "push_to_hub: 'me' is not OWNER/NAME"),
        (["push_to_hub=a/b/c"], "push_to_hub: 'a/b/c' is not OWNER/NAME"),
        (["checkpoint=/nowhere"], "checkpoint: no folder /nowhere"),
        (["compat.action_decode=wrong"], "compat.action_decode: 'wrong' is unknown"),
    ],
)
def test_wrong_settings_are_named_and_leave_nothing(
    published: Path, tmp_path: Path, change: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export(config(published, tmp_path / "out", *change))
    assert list(tmp_path.iterdir()) == []


def test_existing_folders_and_unfit_formats_are_refused(published: Path, tmp_path: Path, statistics: Any) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=f"output: {tmp_path / 'out'} exists already"):
        export(config(published, tmp_path / "out"))
    write_published(tmp_path / "base", random_weights(), statistics=False)
    with pytest.raises(UserError, match="has no norm_stats.json, which dtvla's format contains"):
        export(config(tmp_path / "base", tmp_path / "new", "format=dtvla"))
    build_policy(SETTINGS, WORDS, statistics).save(tmp_path / "nano")
    with pytest.raises(UserError, match="no slot embedding"):
        export(config(tmp_path / "nano", tmp_path / "new"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base", "nano", "out"]
    with pytest.raises(UserError, match="checkpoint: none was given"):
        export(config("???", tmp_path / "new"))


@pytest.fixture
def statistics() -> Statistics:
    import numpy as np

    rng = np.random.default_rng(0)
    return Statistics.from_frames(rng.normal(size=(50, 8)), rng.uniform(-1, 1, (50, 7)))


def test_adapters_are_merged(tmp_path: Path) -> None:
    from dtvla.policy import adapters

    write_published(tmp_path / "base", random_weights())
    (tmp_path / "base" / "README.md").write_text("# the base")
    policy = Policy.load(tmp_path / "base")
    adapters.attach(policy.model, {"r": 2, "parts": ["projector"]}, base=str(tmp_path / "base"))
    weight = policy.model.model.multi_modal_projector.linear
    with torch.no_grad():
        weight.lora_B["default"].weight.fill_(0.25)
    product = weight.get_delta_weight("default").detach()
    policy.save(tmp_path / "adapter")
    export(config(tmp_path / "adapter", tmp_path / "out"))
    name = "multi_modal_projector.linear.weight"
    before, after = random_weights(), read_weights(tmp_path / "out")
    assert torch.equal(after.pop(name), (before.pop(name).float() + product).bfloat16())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert "adapters: merged" in (tmp_path / "out" / "README.md").read_text()


def test_a_checkpoint_of_an_unfinished_training_becomes_a_policy(tmp_path: Path, statistics: Any) -> None:
    """Everything but the weights is that of the run's beginning."""
    run = tmp_path / "run"
    policy = build_policy(SETTINGS, WORDS, statistics)
    begun(policy, run)
    checkpointed(policy, run)
    export(config(run / "checkpoints" / "last.ckpt", tmp_path / "out", "format=dtvla"))
    policy.save(tmp_path / "plain")
    same_policy(tmp_path / "out", tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain", "run"]
    (run / "processor").rename(run / "other")
    with pytest.raises(UserError, match="processor is missing; copy the run folder whole"):
        export(config(run / "checkpoints" / "last.ckpt", tmp_path / "new"))
    with pytest.raises(UserError, match=r"best\.ckpt does not exist"):
        export(config(run / "checkpoints" / "best.ckpt", tmp_path / "new"))


def test_a_checkpoint_of_an_adapter_becomes_the_adapter_or_is_merged(tmp_path: Path) -> None:
    from dtvla.policy import adapters

    write_published(tmp_path / "base", random_weights())
    policy = Policy.load(tmp_path / "base")
    adapters.attach(policy.model, {"r": 2}, base=str(tmp_path / "base"))
    begun(policy, tmp_path / "run")
    with torch.no_grad():  # fresh adapters change nothing
        for name, weight in policy.model.named_parameters():
            if "lora_" in name:
                weight.fill_(0.02)
    checkpointed(policy, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    policy.save(tmp_path / "finished")
    export(config(last, tmp_path / "adapter", "format=adapter"))
    same_policy(tmp_path / "adapter", tmp_path / "finished")
    export(config(last, tmp_path / "merged"))
    export(config(tmp_path / "finished", tmp_path / "expected"))
    same_policy(tmp_path / "merged", tmp_path / "expected")
    with pytest.raises(UserError, match="has no adapter; use published or dtvla"):
        export(config(tmp_path / "base", tmp_path / "new", "format=adapter"))
    with pytest.raises(UserError, match="dtype: bfloat16, but an adapter keeps its type"):
        export(config(last, tmp_path / "new", "format=adapter", "dtype=bfloat16"))


def begun(policy: Policy, run: Path) -> None:
    """What a training writes before its first step."""
    from dtvla.policy import checkpoint

    (run / "processor").mkdir(parents=True)
    checkpoint.write_without_weights(policy, run / "processor")


def checkpointed(policy: Policy, run: Path) -> None:
    """What a training writes behind a step, as far as an export reads it."""
    from dtvla.policy import adapters

    weights = {f"model.{name}": weight for name, weight in policy.model.state_dict().items()}
    if adapters.has_adapter(policy.model):
        weights = {name: weight for name, weight in weights.items() if adapters.is_adapter(name)}
    (run / "checkpoints").mkdir()
    torch.save({"global_step": 3, "state_dict": weights}, run / "checkpoints" / "last.ckpt")


def same_policy(first: Path, second: Path) -> None:
    of_libraries = {"README.md", "generation_config.json", "tokenizer_config.json"}
    names = [{path.name for path in folder.iterdir()} - of_libraries for folder in (first, second)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith(".safetensors"):
            ours, theirs = load_file(first / name), load_file(second / name)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(weight, theirs[key]) for key, weight in ours.items())
        else:
            assert (first / name).read_text() == (second / name).read_text(), name
