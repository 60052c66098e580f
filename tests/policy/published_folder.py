"""Tiny checkpoints in the published format, by ``published_format.json``, which transformers 4.48.1 itself wrote."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

FORMAT: dict[str, Any] = json.loads(Path(__file__).with_name("published_format.json").read_text())
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
TAGS = ("<think>", "</think>", "<action>", "</action>")
HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def random_weights(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Weights under their published names."""
    rng = torch.Generator().manual_seed(seed)
    return {k: (0.3 * torch.randn(shape, generator=rng)).to(dtype) for k, shape in FORMAT["weights"].items()}


def write_weights(folder: Path, weights: dict[str, torch.Tensor], shards: int = 2) -> None:
    """One file, or several and an index."""
    for old in folder.glob("model*"):
        old.unlink()
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    places = {name: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        save_file({n: weights[n] for n in weights if places[n] == file}, folder / file, metadata={"format": "pt"})
    size = sum(w.numel() * w.element_size() for w in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder under their names on disk."""
    return {name: weight for file in folder.glob("model*.safetensors") for name, weight in load_file(file).items()}


def write_published(folder: Path, weights: dict[str, torch.Tensor], shards: int = 2, statistics: bool = True) -> None:
    """The whole folder, as the published training code leaves it."""
    folder.mkdir(parents=True)
    write_weights(folder, weights, shards)
    for name, values in FORMAT.items():
        if name.endswith(".json") and name != "tokenizer_config.json":
            (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    core = gemma_tokenizer()
    core.save(str(folder / "tokenizer.json"))
    flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
    added = {
        str(i): {"content": token.content, **{flag: getattr(token, flag) for flag in flags}}
        for i, token in core.get_added_tokens_decoder().items()
    }
    tokenizer_config = FORMAT["tokenizer_config.json"] | {"added_tokens_decoder": added}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "added_tokens.json").write_text(json.dumps({token: core.token_to_id(token) for token in TAGS}))
    if statistics:
        rng = np.random.default_rng(1)
        groups = {"state": 8, "action": 7}
        values = {group: _statistics(rng, size) for group, size in groups.items()}
        (folder / "norm_stats.json").write_text(json.dumps(values))


def gemma_tokenizer() -> Tokenizer:
    """Byte-fallback BPE with the published order of ids: text, 1024 places, 128 segments, image, tags."""
    words = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *map(chr, range(33, 127)), "▁", "▁a", "\n"]
    words += [*(f"<loc{i:04d}>" for i in range(1024)), *(f"<seg{i:03d}>" for i in range(128))]
    vocabulary = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([*SPECIAL, AddedToken("<image>", normalized=False, special=True)])
    core.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return core


def _statistics(rng: np.random.Generator, size: int) -> dict[str, list[float]]:
    low, high = -1 - rng.random(size), 1 + rng.random(size)
    values = {"mean": rng.normal(size=size), "std": 0.1 + rng.random(size), "q01": low, "q99": high}
    return {name: vector.tolist() for name, vector in values.items()}
