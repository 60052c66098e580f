"""Checkpoints in the published format: read, written back bit for bit, and refused by the names of what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dtvla.data.normalization import Statistics
from dtvla.errors import UserError
from dtvla.policy import adapters, checkpoint, published, weights
from dtvla.policy.cot import CotMode
from dtvla.policy.hub import locate
from dtvla.policy.policy import Policy, build_policy

from .conftest import random_observation
from .published_folder import (
    EMBEDDING,
    FORMAT,
    HEAD,
    gemma_tokenizer,
    random_weights,
    read_weights,
    write_published,
    write_weights,
)

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return random_weights()


@pytest.fixture(scope="module")
def shared_folder(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed by tests."""
    folder = tmp_path_factory.mktemp("published") / "sft"
    write_published(folder, tensors)
    return folder


@pytest.fixture
def folder(tensors: Tensors, tmp_path: Path) -> Path:
    write_published(tmp_path / "sft", tensors)
    return tmp_path / "sft"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers))


def rewrite(folder: Path, dtype: torch.dtype | None = None, shard_size: str = "30KB") -> Path:
    """Read a checkpoint and write it in the published format beside itself."""
    source = locate(folder)
    processor = checkpoint.read_processor(source) if source.statistics_file or source.policy_file else None
    model = checkpoint.read_model(source, dtype)
    with weights.new_folder(folder.with_name(f"{folder.name}-again")) as temporary:
        published.write(model, processor, source, temporary, shard_size)
    return folder.with_name(f"{folder.name}-again")


def act(policy: Policy, mode: str = "mask") -> np.ndarray:
    rows = [random_observation(policy, np.random.default_rng(5), side=28)]
    return policy.act(rows, CotMode(mode, max_tokens=5))[0].actions_SD


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_every_published_weight_arrives_in_its_module(tensors: Tensors, tmp_path: Path, shards: int) -> None:
    write_published(tmp_path / "sft", tensors, shards)
    model = Policy.load(tmp_path / "sft", dtype=None).model
    modules = {
        **{f"vision_tower.vision_model.{k}": v for k, v in model.model.vision_tower.state_dict().items()},
        **{f"multi_modal_projector.{k}": v for k, v in model.model.multi_modal_projector.state_dict().items()},
        **{f"language_model.model.{k}": v for k, v in model.model.language_model.state_dict().items()},
    }
    assert modules.keys() == tensors.keys()
    assert all(same_bits(modules[name], tensors[name]) for name in tensors)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not model.training


def test_what_the_folder_does_not_say_comes_from_the_shipped_settings(shared_folder: Path) -> None:
    policy = Policy.load(shared_folder)
    processor, core = policy.processor, gemma_tokenizer()
    layout, words = processor.layout, processor.layout.vocabulary
    assert (layout.chunk, layout.action_dim, layout.max_thought_tokens) == (10, 7, 300)
    assert processor.images.cameras == ("agentview", "wrist")
    assert processor.images.image_size == 28
    assert layout.image_tokens == 8
    assert layout.bins.count == words.action_count == 64
    assert words.think_start_id == core.token_to_id("<think>")
    assert words.image_id == core.token_to_id("<image>")
    text = layout.prompt("Pick up_the Bowl")[9:]
    wanted = (
        "First output the thinking process in <think></think> tags and then output the final action in "
        "<action></action>.Task: pick up the bowl;\n"
    )
    assert text == core.encode(wanted, add_special_tokens=False).ids
    stored = json.loads((shared_folder / "norm_stats.json").read_text())
    assert processor.normalizer.statistics.to_dict() == stored
    assert act(policy).shape == (10, 7)
    assert act(policy, "think").shape == (10, 7)


def test_round_trip_of_a_folder_is_exact(folder: Path, tensors: Tensors) -> None:
    (folder / "trainer_notes.txt").write_text("150k steps")
    (folder / "README.md").write_text("# the authors' card")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    again = rewrite(folder)
    written = read_weights(again)
    assert written.keys() == tensors.keys()
    assert all(same_bits(written[name], tensors[name]) for name in tensors)
    left_out = {"training_args.bin", "model.safetensors.index.json"}
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and file.name not in left_out:
            mine = (again / file.name).read_text()
            assert (
                json.loads(mine) == json.loads(file.read_text()) if file.suffix == ".json" else mine == file.read_text()
            )
    assert not (again / "training_args.bin").exists()
    assert not (again / "policy.json").exists()
    index = json.loads((again / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * tensor.numel() for tensor in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    assert len(list(again.glob("model-*-of-0000*.safetensors"))) == len(set(index["weight_map"].values())) > 1
    np.testing.assert_array_equal(act(Policy.load(folder)), act(Policy.load(again)))


def test_a_stored_output_layer_is_kept_refused_or_honoured(folder: Path, tensors: Tensors) -> None:
    write_weights(folder, tensors | {HEAD: tensors[EMBEDDING].clone()})
    assert read_weights(rewrite(folder)).keys() == {*tensors, HEAD}
    other = random_weights(9)[EMBEDDING]
    write_weights(folder, tensors | {HEAD: other})
    with pytest.raises(UserError, match=r"lm_head.* differs from the embedding.*tie_word_embeddings"):
        Policy.load(folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    model = Policy.load(folder, dtype=None).model
    assert same_bits(model.lm_head.weight, other)
    assert same_bits(model.get_input_embeddings().weight, tensors[EMBEDDING])
    folder.with_name("sft-again").rename(folder.with_name("first"))
    assert same_bits(read_weights(rewrite(folder))[HEAD], other)
    write_weights(folder, tensors)
    with pytest.raises(UserError, match="missing weights: language_model.lm_head.weight"):
        Policy.load(folder)


LAYER = "language_model.model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(LAYER), f"missing weights: {LAYER}; copy the whole folder again"),
        (lambda w: w.update(extra=torch.ones(2)), "unknown weights: extra;"),
        (lambda w: w.update({LAYER: torch.ones(3, 16)}), rf"{LAYER} has shape \(3, 16\), config.json says \(24, 16\)"),
        (lambda w: w.update({f"model.{LAYER}": torch.ones(24, 16)}), f"stored twice: .*{LAYER}"),
        (lambda w: [w.pop(k) for k in list(w) if "encoder" in k], "and 11 more"),
    ],
)
def test_wrong_weights_are_named(
    folder: Path, tensors: Tensors, change: Callable[[Tensors], Any], message: str
) -> None:
    changed = dict(tensors)
    change(changed)
    write_weights(folder, changed)
    with pytest.raises(UserError, match=message):
        Policy.load(folder)


def test_absent_damaged_and_pickled_files_are_named(folder: Path, tensors: Tensors) -> None:
    shard, index = folder / "model-00002-of-00002.safetensors", folder / "model.safetensors.index.json"
    content, listed = shard.read_bytes(), index.read_text()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"{shard.name} can't be read"):
        Policy.load(folder)
    shard.unlink()
    with pytest.raises(UserError, match=f"no {shard.name}, which {index.name} names"):
        Policy.load(folder)
    shard.write_bytes(content)
    wrong = json.loads(listed)
    name = next(k for k, v in wrong["weight_map"].items() if v == shard.name)
    wrong["weight_map"][name] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=f"{name} is not in the file"):
        Policy.load(folder)
    index.write_text(listed[:50])
    with pytest.raises(UserError, match=f"{index.name} is damaged"):
        Policy.load(folder)
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(UserError, match=r"pickled \(pytorch_model.bin\).*save_pretrained"):
        Policy.load(folder)


def test_a_base_model_takes_the_statistics_of_its_training_data(
    tensors: Tensors, tmp_path: Path, statistics: Statistics, published_settings: dict[str, Any]
) -> None:
    base = tmp_path / "base"
    write_published(base, tensors, statistics=False)
    with pytest.raises(UserError, match="neither policy.json nor norm_stats.json"):
        Policy.load(base)
    settings = published_settings | {"checkpoint": str(base), "action_bins": 64, "image_size": 28}
    trained = build_policy(settings, [], statistics)
    assert trained.processor.normalizer.statistics == statistics
    for key in ("action_bins", "image_size"):
        with pytest.raises(UserError, match=f"model.{key}: 99, but"):
            build_policy(settings | {key: 99}, [], statistics)
    again = rewrite(base)
    assert all(same_bits(weight, tensors[name]) for name, weight in read_weights(again).items())
    assert not (again / "norm_stats.json").exists()
    rng = np.random.default_rng(6)
    own = Statistics.from_frames(rng.normal(size=(50, 8)), rng.random((50, 7)))
    own.save(base / "norm_stats.json")
    assert build_policy(settings, [], statistics).processor.normalizer.statistics == own


def test_a_trained_policy_is_published_with_every_key_and_file(
    shared_folder: Path, tmp_path: Path, tensors: Tensors
) -> None:
    """Through dtvla's own format, where nothing of the published folder is left to copy."""
    Policy.load(shared_folder, dtype=None).save(tmp_path / "policy")
    again = rewrite(tmp_path / "policy")
    written = read_weights(again)
    assert all(same_bits(written[name], tensors[name]) for name in tensors)
    config = json.loads((again / "config.json").read_text())
    for part in ("text_config", "vision_config"):
        wanted = {k: v for k, v in FORMAT["config.json"][part].items() if k != "projector_hidden_act"}
        assert wanted.items() <= config[part].items()
    outer = {k: v for k, v in FORMAT["config.json"].items() if k not in ("_vocab_size", "text_config", "vision_config")}
    assert outer.items() <= config.items()
    for name in ("generation_config.json", "preprocessor_config.json", "special_tokens_map.json"):
        mine = json.loads((again / name).read_text())
        if name.startswith("special"):
            mine["additional_special_tokens"] = [{"content": t} for t in mine["additional_special_tokens"]]
            for token in FORMAT[name]["additional_special_tokens"]:
                assert token["content"] in [t["content"] for t in mine["additional_special_tokens"]]
        else:
            assert mine == FORMAT[name]
    mine = json.loads((again / "tokenizer_config.json").read_text())
    theirs = json.loads((shared_folder / "tokenizer_config.json").read_text())
    assert mine["added_tokens_decoder"] == theirs["added_tokens_decoder"]
    assert mine["tokenizer_class"] == "GemmaTokenizer"
    assert not (again / "policy.json").exists()
    np.testing.assert_array_equal(act(Policy.load(shared_folder)), act(Policy.load(again)))


def test_settings_that_the_format_lacks_go_into_policy_json(shared_folder: Path, tmp_path: Path) -> None:
    policy = Policy.load(shared_folder)
    policy.processor.layout.chunk = 4
    policy.save(tmp_path / "policy")
    again = rewrite(tmp_path / "policy")
    assert (again / "policy.json").is_file()
    assert Policy.load(again).processor.layout.chunk == 4


def test_what_the_published_model_lacks_is_refused(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    make_policy().save(tmp_path / "policy")
    with pytest.raises(UserError, match="no slot embedding.*format=dtvla"):
        rewrite(tmp_path / "policy")


def test_types_are_kept_or_rounded_once(shared_folder: Path, folder: Path) -> None:
    assert {w.dtype for w in Policy.load(shared_folder, dtype=None).model.parameters()} == {torch.bfloat16}
    exact = random_weights(4, torch.float32)
    write_weights(folder, exact)
    rounded = read_weights(rewrite(folder, torch.bfloat16))
    assert all(same_bits(rounded[name], exact[name].to(torch.bfloat16)) for name in exact)
    assert json.loads((folder.with_name("sft-again") / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_names_of_later_transformers_are_read_too(folder: Path, tensors: Tensors, prefix: str) -> None:
    later = {
        prefix + name.replace("vision_tower.vision_model.", "vision_tower."): weight for name, weight in tensors.items()
    }
    if prefix:
        later = {name.replace("language_model.model.", "language_model."): weight for name, weight in later.items()}
    write_weights(folder, later)
    model = Policy.load(folder, dtype=None).model
    assert same_bits(model.get_input_embeddings().weight, tensors[EMBEDDING])


LORA = {"r": 3, "alpha": 8, "dropout": 0.0}


def train_adapter(checkpoint_folder: Path, settings: dict[str, Any], statistics: Statistics) -> Policy:
    policy = build_policy(settings | {"checkpoint": str(checkpoint_folder), "lora": LORA}, [], statistics)
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if adapters.is_adapter(name):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=rng))
    policy.model.eval()
    return policy


def test_adapters_name_their_base_and_merge_in_float32(
    tensors: Tensors, tmp_path: Path, statistics: Statistics, published_settings: dict[str, Any]
) -> None:
    base = tmp_path / "base"
    write_published(base, tensors, statistics=False)
    settings = published_settings | {"action_bins": 64, "image_size": 28}
    trained = train_adapter(base, settings, statistics)
    trained.save(tmp_path / "adapter")
    names = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "policy.json"}
    loaded = Policy.load(tmp_path / "adapter")
    np.testing.assert_array_equal(act(loaded), act(trained))
    source = locate(tmp_path / "adapter")
    assert source.base == base
    assert {path.parent for path in source.files()} == {base, tmp_path / "adapter"}
    model = checkpoint.read_model(source, torch.float32)
    adapters.merge(model)
    np.testing.assert_allclose(act(Policy(model, loaded.processor)), act(loaded), atol=1e-4)
    with weights.new_folder(tmp_path / "merged") as temporary:
        published.write(model, loaded.processor, source, temporary)
    merged = Policy.load(tmp_path / "merged")
    np.testing.assert_array_equal(act(merged), act(Policy(model, loaded.processor)))
    assert merged.processor.normalizer.statistics == statistics
    second = train_adapter(tmp_path / "adapter", settings, statistics)  # starts from what the first one learned
    second.processor.layout.chunk = 4
    second.save(tmp_path / "second")
    assert locate(tmp_path / "second").adapters == (tmp_path / "adapter", tmp_path / "second")
    np.testing.assert_array_equal(act(Policy.load(tmp_path / "second")), act(second))


def test_adapters_that_peft_itself_wrote_are_read(shared_folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    expected = Policy.load(shared_folder)
    torch.manual_seed(0)  # peft draws the factors; with this scale they change the actions
    config = LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped = get_peft_model(expected.model, config)
    wrapped.peft_config["default"].base_model_name_or_path = str(shared_folder)
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = Policy.load(tmp_path / "adapter")
    assert adapters.has_adapter(loaded.model)
    plain = act(Policy.load(shared_folder))
    np.testing.assert_array_equal(act(loaded), act(expected))
    assert (act(loaded) != plain).any()


def test_adapters_of_the_published_training_code_are_read(shared_folder: Path, tmp_path: Path) -> None:
    """They name modules, whole, as transformers 4.48 does."""
    names = ["language_model.model.embed_tokens", "language_model.lm_head", LAYER.removesuffix(".weight")]
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(shared_folder),
        "r": 2,
        "lora_alpha": 4,
        "target_modules": names,
        "bias": "none",
        "inference_mode": True,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    rng = torch.Generator().manual_seed(1)
    shapes = {
        f"{names[0]}.lora_embedding_A": (2, 1514),
        f"{names[0]}.lora_embedding_B": (16, 2),
        f"{names[1]}.lora_A.weight": (2, 16),
        f"{names[1]}.lora_B.weight": (1514, 2),
        f"{names[2]}.lora_A.weight": (2, 16),
        f"{names[2]}.lora_B.weight": (24, 2),
    }
    factors = {f"base_model.model.{name}": torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    save_file(factors, tmp_path / "adapter_model.safetensors")
    model = Policy.load(tmp_path).model
    base = Policy.load(shared_folder).model
    adapters.merge(model)
    up, down = (factors[f"base_model.model.{names[2]}.lora_{x}.weight"] for x in "BA")
    layer = "model.language_model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(model.state_dict()[layer], base.state_dict()[layer] + 2 * up @ down)
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_adapters_without_a_base_or_weights_are_refused(shared_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    for text, message in (
        ("{}", "adapter_config.json is damaged"),
        ('{"base_model_name_or_path": null}', "names no base model"),
        ('{"base_model_name_or_path": "/nowhere"}', "its base_model_name_or_path: no folder /nowhere"),
        (json.dumps({"base_model_name_or_path": str(tmp_path)}), "based on themselves"),
    ):
        file.write_text(text)
        (tmp_path / "adapter_model.safetensors").write_bytes(b"")
        with pytest.raises(UserError, match=message):
            Policy.load(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no adapter_model.safetensors"):
        Policy.load(tmp_path)
