"""Inputs of the comparison with the published class: a tiny checkpoint in its format, pictures, texts and actions.

Both sides build them from here: ``tools/published_oracle.py`` in an environment with transformers 4.48.1, and
``test_fidelity.py``. All numbers are uniform draws, which are the same bits on every machine; only what the published
code answers is stored. The vocabulary has its real 257157 rows, because the published code has ids written into it.
The width 36 has a whole square root: transformers 5 keeps Gemma's embedding scale in float32.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

SEED = 20250907
IMAGE_SIZE, CHUNK, ACTION_DIM = 224, 10, 7
CAP = 48  # thought tokens that are decoded
BASE, TAGS = 257152, ("<image>", "<think>", "</think>", "<action>", "</action>")
THINK_START, THINK_END, ACTION_START, ACTION_END = range(BASE + 1, BASE + 5)
BAND = range(254976, 257024)
GAINS = {"q_proj": 3.0, "k_proj": 3.0, "v_proj": 3.0, "o_proj": 3.0, "down_proj": 2.0}  # 1 for the others
LOUD, QUIET = 0.1, 0.002  # scale of the embedding rows that a thought is made of, and of all other text
CLOSING, PULL = 0.15, 1.0  # scale of the two tokens that end a thought; how much of the first the second contains
CONFIG: dict[str, Any] = {
    "architectures": ["DeepThinkVLA"],
    "model_type": "paligemma",
    "transformers_version": "4.48.1",
    "torch_dtype": "float64",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "ignore_index": -100,
    "image_token_index": BASE,
    "think_start_token_index": THINK_START,
    "think_end_token_index": THINK_END,
    "action_start_token_index": ACTION_START,
    "action_end_token_index": ACTION_END,
    "action_token_begin_idx": BAND[0],
    "action_token_end_idx": BAND[-1],
    "hidden_size": 36,
    "projection_dim": 36,
    "vocab_size": BASE + 5,
    "text_config": {
        "model_type": "gemma",
        "hidden_size": 36,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 12,
        "num_image_tokens": 16,
        "vocab_size": BASE + 5,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 56,
        "num_image_tokens": 16,
        "projection_dim": 36,
        "vision_use_head": False,
    },
}

THINK_PREFIX = (
    "First output the thinking process in <think></think> tags and then output the final action in <action></action>."
)
TASKS = (
    "put_the_bowl_on_the_plate",
    " Open the middle DRAWER of the cabinet",
    "push the plate to the stove",
    "lift it",
)
THOUGHTS = (
    "<think>The drawer is closed. Pull the handle and then move to the plate, close on it and lift the bowl.</think>",
    "",  # a sample without a thought: prompt and thought are the published short ones
    "<think>The bowl is left of the gripper. Move down, then close on it.</think>",
)
BATCH = (1, 2)  # the samples of the padded batch


def rng(*key: int) -> np.random.Generator:
    """A generator of its own for everything that is drawn."""
    return np.random.default_rng([SEED, *key])


def tokenizer() -> Tokenizer:
    """Whole words at random ids of a vocabulary that is laid out like the published one, in Gemma's manner."""
    names = [f"<unused{i}>" for i in range(BASE)]
    names[:4] = ["<pad>", "<eos>", "<bos>", "<unk>"]
    names[256000 : 256000 + 1024] = [f"<loc{i:04d}>" for i in range(1024)]
    names[257024:BASE] = [f"<seg{i:03d}>" for i in range(128)]
    for name, index in words().items():
        names[index] = name
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\p{L}+|[\s\S]"), "isolated")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (*names[:4], TAGS[0])])
    core.add_tokens([AddedToken(name, special=False, normalized=False) for name in TAGS[1:]])
    return core


def words() -> dict[str, int]:
    """The pieces of all texts and their ids; semicolon and newline have Gemma's."""
    split = Regex(r"▁?\p{L}+|[\s\S]")
    tasks = "".join(f"Task: {task.lower().strip().replace('_', ' ')};" for task in TASKS)
    text = "".join((THINK_PREFIX, tasks, *THOUGHTS))
    for tag in TAGS:
        text = text.replace(tag, "\n")
    found = [piece for piece, _ in pre_tokenizers.Split(split, "isolated").pre_tokenize_str(text.replace(" ", "▁"))]
    pieces = sorted({*found} - {";", "\n"})
    ids = 1000 + rng(0).permutation(200000)[: len(pieces)]
    return {";": 235289, "\n": 108, **{piece: int(i) for piece, i in zip(pieces, ids, strict=True)}}


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """float64 weights by published name: uniform draws, scaled so that every layer matters."""
    drawn = {}
    for index, name in enumerate(sorted(shapes)):
        shape = tuple(shapes[name])
        values = (rng(1, index).random(shape) * 2 - 1) * 3**0.5
        if "embed_tokens" in name:
            scale = np.full((shape[0], 1), QUIET)
            scale[[*words().values(), *BAND, *range(BASE + 1, shape[0])]] = LOUD
            scale[[THINK_END, ACTION_START]] = CLOSING
            values *= scale
            values[ACTION_START] += PULL * values[THINK_END]
        elif name.endswith("bias") or "norm" in name:
            values *= 0.2
            if name.endswith("model.norm.weight"):
                values += 9.0  # 1 + w: logits of some size, so that the loss is not that of a uniform guess
            elif "vision" in name and name.endswith("weight"):
                values += 1.0
        elif "position" not in name:
            values *= GAINS.get(name.split(".")[-2], 1.0) / float(np.prod(shape[1:])) ** 0.5
        drawn[name] = torch.from_numpy(values)
    return drawn


def pictures(index: int, cameras: int = 2) -> np.ndarray:
    """uint8 (N, H, W, 3): coarse random blocks, so that the patches differ strongly."""
    coarse = rng(2, index).integers(0, 256, (cameras, 8, 8, 3), dtype=np.uint8)
    fine = rng(3, index).integers(-20, 21, (cameras, IMAGE_SIZE, IMAGE_SIZE, 3))
    return (coarse.repeat(IMAGE_SIZE // 8, 1).repeat(IMAGE_SIZE // 8, 2) + fine).clip(0, 255).astype(np.uint8)


def statistics() -> dict[str, dict[str, list[float]]]:
    """A ``norm_stats.json``."""
    low, high = rng(4).uniform(-1, -0.2, 8), rng(5).uniform(0.2, 1, 8)
    fields = {"mean": (low + high) / 2, "std": (high - low) / 4, "q01": low, "q99": high}
    return {group: {k: v[:n].tolist() for k, v in fields.items()} for group, n in (("state", 8), ("action", 7))}


def actions(index: int) -> np.ndarray:
    """float32 (S, D) in robot units, somewhat beyond the quantiles; the gripper is -1 or 1."""
    drawn = rng(6, index).uniform(-1.1, 1.1, (CHUNK, ACTION_DIM))
    drawn[:, -1] = np.sign(drawn[:, -1])
    return drawn.astype(np.float32)


def action_grid() -> np.ndarray:
    """float32 (n,): values for the table of the action tokenizer, beyond the ends too."""
    return np.concatenate([[-1.2, -1, 0, 1, 1.2], rng(7).uniform(-1.05, 1.05, 3000)]).astype(np.float32)


def summary(logits_TV: Tensor, columns: Sequence[int]) -> dict[str, np.ndarray]:
    """What is stored of logits (T, V): some columns, sums with random signs over all columns, and the log-sum-exp."""
    size = logits_TV.shape[-1]
    signs = torch.from_numpy(rng(8).integers(0, 2, (size, 3)) * 2.0 - 1.0) / size**0.5
    return {
        "columns": logits_TV[:, columns].numpy(),
        "sums": (logits_TV @ signs).numpy(),
        "logsumexp": logits_TV.logsumexp(-1).numpy(),
        "argmax": logits_TV.argmax(-1).numpy(),
    }


def token_columns() -> list[int]:
    """Columns of the vocabulary: control tokens, both ends of the action band, some words and some others."""
    drawn = rng(9).integers(3, BASE, 4).tolist()
    return [0, 1, 2, *range(BASE, BASE + 5), BAND[0], BAND[-1], *sorted(words().values())[::20], *drawn]


def bin_columns() -> list[int]:
    """Some action bins."""
    return [*range(0, len(BAND), 150), len(BAND) - 1]


def write_checkpoint(folder: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """A folder as the published code saves one."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (folder / "norm_stats.json").write_text(json.dumps(statistics()))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {**names, "additional_special_tokens": ["<image>"], "tokenizer_class": "GemmaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer().save(str(folder / "tokenizer.json"))
    save_file(weights(shapes), folder / "model.safetensors", metadata={"format": "pt"})


def projections(gradients: Mapping[str, Tensor]) -> np.ndarray:
    """(n, 2) per published name in order: the norm of a gradient, and its product with random signs."""
    rows = []
    for index, name in enumerate(sorted(gradients)):
        gradient = gradients[name].detach()
        signs = torch.from_numpy(rng(10, index).integers(0, 2, tuple(gradient.shape)) * 2.0 - 1.0)
        rows.append([gradient.norm().item(), (gradient * signs).sum().item()])
    return np.array(rows)
