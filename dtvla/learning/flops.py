"""Floating-point operations of a training step, and the most that a device can do in a second.

Counted are the matrix products that the model needs, a multiplication and an addition as two operations: the layers
of the vision tower for each picture, the projector, the layers of the language model for each token that is no padding,
attention for each pair of positions of which one may see the other (not for the whole square that a kernel computes),
and the output layer at supervised positions. The last language layer counts there, too, but for its keys and values:
nothing else of it is read. Its attention, a small part of one layer's, is left out. A product costs the same again in
the backward pass for the gradient of its input, where something before it is trained, and once more for that of its
weight, where the weight is trained: frozen parts and adapters follow from that. Lookups, norms, softmax and activations
are not counted, and neither is what checkpointing computes anew: the share of the peak is the model's (MFU), not the
hardware's (HFU).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dtvla.policy.adapters import part_of
from dtvla.policy.attention import Segment

if TYPE_CHECKING:
    from dtvla.policy.layout import Batch
    from dtvla.policy.model import HybridVLA

Stage = tuple[int, int]  # a part of the model and a layer in it, in the order of computation
PARTS = {"vision_tower": 0, "projector": 1, "language_model": 2}
HEAD: Stage = (3, 0)
BEFORE, BEHIND = -1, 1_000_000  # places in a part before and behind its layers
FIRST_OF_A_LAYER = (".q_proj", ".k_proj", ".v_proj")

# Dense products (NVIDIA's data sheets). Lightning counts H200 with sparsity, and by names that torch does not report.
H200 = {torch.bfloat16: 989.5e12, torch.float16: 989.5e12, "tfloat32": 494.7e12, torch.float32: 66.9e12}
H200_NVL = {torch.bfloat16: 835.5e12, torch.float16: 835.5e12, "tfloat32": 417.7e12, torch.float32: 60.0e12}


@dataclass(frozen=True)
class Work:
    """What batches ask of a model; the works of two add up without a word from a GPU.

    Attributes:
        samples, pictures: how many; each camera's picture counts.
        supervised: positions at which the next token is predicted.
        on_device: int64 (2,), where the batches are: tokens without padding, and pairs (query, key) of which the query
            may see the key.
    """

    samples: int
    pictures: int
    supervised: int
    on_device: Tensor

    def __add__(self, other: Work) -> Work:
        """Both together."""
        return Work(
            self.samples + other.samples,
            self.pictures + other.pictures,
            self.supervised + other.supervised,
            self.on_device + other.on_device,
        )

    def to_tensor(self) -> Tensor:
        """int64 (5,) on the batches' device: samples, pictures, supervised, tokens, pairs."""
        counts = torch.tensor([self.samples, self.pictures, self.supervised], device=self.on_device.device)
        return torch.cat([counts, self.on_device])


def work_of(batches: Iterable[Batch], causal_actions: bool = False) -> Work:
    """Count what batches ask of a model.

    Args:
        batches: at least one, padded or packed.
        causal_actions: whether the action block sees its own past only, see :class:`~dtvla.policy.attention.Rule`.
    """
    first, *rest = [_work(batch, causal_actions) for batch in batches]
    return sum(rest, first)


def _work(batch: Batch, causal_actions: bool) -> Work:
    device = batch.segment_BT.device
    segment_BTG = batch.segment_BT.unsqueeze(-1) == torch.arange(int(Segment.PAD), device=device)
    if batch.sample_BT is None:
        count_NG = segment_BTG.sum(1)
    else:  # no row has more samples than the batch; places without one count nothing
        sample_BTN = batch.sample_BT.unsqueeze(-1) == torch.arange(len(batch), device=device)
        count_NG = (sample_BTN.unsqueeze(-1) & segment_BTG.unsqueeze(-2)).sum(1).flatten(0, 1)
    prefix_N, think_N, act_N = count_NG.unbind(-1)
    own_N = act_N * (act_N + 1) // 2 if causal_actions else act_N**2
    pairs_N = prefix_N**2 + think_N * prefix_N + think_N * (think_N + 1) // 2 + act_N * (prefix_N + think_N) + own_N
    on_device = torch.stack([count_NG.sum(), pairs_N.sum()])
    return Work(len(batch), len(batch) * batch.pixels_BNCHW.shape[1], batch.tokens, on_device)


@dataclass(frozen=True)
class Flops:
    """Operations of a model for each picture, token, visible pair and supervised position."""

    picture: float = 0.0
    token: float = 0.0
    pair: float = 0.0
    supervised: float = 0.0

    def __call__(self, *, pictures: float, tokens: float, pairs: float, supervised: float) -> float:
        """Operations for so much work."""
        costs = (self.picture * pictures, self.token * tokens, self.pair * pairs, self.supervised * supervised)
        return math.fsum(costs)


def training_flops(model: HybridVLA, *, backward: bool = True) -> Flops:
    """Operations of forward and backward pass, from the model's layers and which of them are trained.

    Exact for whole parts, but for the attention of the last language layer, see above. Where an adapter alone is
    trained, its product with the embedding is left out, and the first layer that has it counts attention and all but
    q, k and v as if gradients reached them: less than a layer too much.

    Args:
        model: with or without adapter; quantised or sharded layers count like whole ones.
        backward: False counts the forward pass alone.
    """
    trained = [_stage(name) for name, weight in model.named_parameters() if weight.requires_grad]
    earliest = min(trained, default=HEAD) if backward else HEAD
    costs = {"picture": 0.0, "token": 0.0, "supervised": 0.0}
    vision: Any = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    text: Any = model.config.text_config
    unit_of = {0: "picture", 1: "picture", 2: "token", 3: "supervised"}
    last: Stage = (PARTS["language_model"], text.num_hidden_layers - 1)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        stage = _stage(name)
        passes = 1 + (backward and module.weight.requires_grad) + (backward and _passes_on(name, stage, earliest))
        rows = patches if stage[0] <= PARTS["projector"] else 1
        read = stage == last and not any(of_all in name for of_all in (".k_proj", ".v_proj"))
        costs["supervised" if read else unit_of[stage[0]]] += 2.0 * rows * _weights(module) * passes

    def attention(part: int, layers: int, width: int) -> float:
        backwards = sum(backward and bool(trained) and (part, layer) >= earliest for layer in range(layers))
        return 4.0 * width * (layers + 2 * backwards)

    costs["picture"] += patches**2 * attention(PARTS["vision_tower"], vision.num_hidden_layers, vision.hidden_size)
    width = text.num_attention_heads * text.head_dim
    return Flops(**costs, pair=attention(PARTS["language_model"], last[1], width))


def _weights(module: nn.Linear | nn.Conv2d) -> int:
    """Multiplications for each output row."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels * math.prod(module.kernel_size) * module.out_channels
    return module.in_features * module.out_features


def _stage(name: str) -> Stage:
    """Where in the order of computation a module or parameter comes."""
    if "lm_head" in name:
        return HEAD
    layer = re.search(r"\.layers\.(\d+)\.", name)
    if layer:
        return PARTS[part_of(name)], int(layer[1])
    return PARTS[part_of(name)], BEFORE if "embed" in name else BEHIND


def _passes_on(name: str, stage: Stage, earliest: Stage) -> bool:
    """Whether a layer's input has a gradient: something before it is trained."""
    if stage == earliest and BEFORE < stage[1] < BEHIND:
        return not any(first in name for first in FIRST_OF_A_LAYER)
    return stage > earliest


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Matrix operations per second of one device at its best, dense, or None where it is not known.

    Args:
        device: where the model is.
        precision: of Lightning's trainer, such as ``bf16-mixed``.
    """
    from lightning.fabric.utilities.throughput import get_available_flops

    bits = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    dtype = bits.get(precision.split("-")[0], torch.float32)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    if "h200" in name and "gh200" not in name:
        tensor_cores = dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"
        return (H200_NVL if "nvl" in name else H200).get("tfloat32" if tensor_cores else dtype)
    with warnings.catch_warnings():  # the caller says so in its own words
        warnings.simplefilter("ignore")
        known = get_available_flops(device, dtype)
    return None if known is None else float(known)
