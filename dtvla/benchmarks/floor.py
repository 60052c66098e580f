"""What the device allows: the least time of a forward by its bytes and its operations, from measured rates.

A forward of Q new tokens in each of B rows, over K keys a row, must

- read every weight that it uses once, and the keys and values that it sees once:
  bytes = e (n + 2 L G h K B), with n weights of e bytes, L layers, G key-value heads of size h;
- multiply: operations = 2 n Q B + 4 L H h Q K B, with H query heads (scores, and their product with the values; a
  masked pair counts like any other).

Its floor is max(bytes / bandwidth, operations / matmul rate), the two rates being measured on the same device in the
same process. Forwards depend on one another, so the floor of a phase is the sum of its forwards' floors:

- ``read``: the vision tower and projector over all pictures; the layers over the prompt.
- ``thought``: C - 1 forwards of one token, and C readings of the output layer.
- ``act``: one forward of the action block (S * D + 3 tokens) and S * D readings of the bins' rows of the output layer.
- ``mask`` acts behind an empty thought, whose two tokens are counted with the block.
- autoregressive: N forwards of one token (the empty thought is counted with the first), each reading the bins' rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from dtvla.benchmarks.timing import synchronize
from dtvla.policy.layout import Layout
from dtvla.policy.model import HybridVLA

READ_BYTES = {"cpu": 2**29, "cuda": 2**32}  # far larger than any cache
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Rates:
    """What the device can do, measured: bytes read per second, floating-point operations per second of a matmul."""

    bytes_per_s: float
    flops_per_s: float

    def best(self, other: Rates) -> Rates:
        """The higher of each: a machine that others use now and then shows what it can when they do not."""
        return Rates(max(self.bytes_per_s, other.bytes_per_s), max(self.flops_per_s, other.flops_per_s))


@dataclass(frozen=True)
class Work:
    """What one forward has to read, in bytes, and to compute, in floating-point operations."""

    bytes: float
    flops: float

    def __add__(self, other: Work) -> Work:
        """Both in one forward."""
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, rates: Rates) -> float:
        """The floor."""
        return max(self.bytes / rates.bytes_per_s, self.flops / rates.flops_per_s)


class Workload:
    """The forwards of a decision, from the model's true shapes.

    Args:
        model: whose weights are counted.
        layout: of the sequences.
        rows: batch size B.
        prompt: tokens of each prompt, images included.
        thought: tokens C of each thought, ``<action>`` included.
    """

    def __init__(self, model: HybridVLA, layout: Layout, *, rows: int, prompt: int, thought: int) -> None:
        """Count the weights."""
        config: Any = model.config
        self.text, self.vision, self.layout = config.text_config, config.vision_config, layout
        self.rows, self.prompt, self.thought = rows, prompt, thought
        self.size = model.lm_head.weight.element_size()
        self.layer_weights = _count(model.model.language_model.layers)
        self.vision_weights = _count(model.model.vision_tower) + _count(model.model.multi_modal_projector)

    def floors(self, rates: Rates, action_tokens: Iterable[int]) -> dict[str, dict[str, float]]:
        """Seconds of every phase and ``total``, by side: ``think``, ``mask``, ``autoregressive N``."""
        block = self.layout.slots + 3
        read = {"read": _seconds([self._see(), self._layers(self.prompt, self.prompt)], rates)}
        behind = self.prompt + self.thought - 1
        act = self._layers(block, behind + block) + self._bins(self.layout.slots)
        sides = {
            "think": read | {"thought": _seconds(self._steps(), rates), "act": act.seconds(rates)},
            "mask": read | {"act": self._mask_block(block + 2).seconds(rates)},
        }
        for number in action_tokens:
            steps = [self._layers(1, self.prompt + 3 + i) + self._bins(1) for i in range(number)]
            sides[f"autoregressive {number}"] = read | {"act": _seconds(steps, rates)}
        return {side: phases | {"total": sum(phases.values())} for side, phases in sides.items()}

    def _steps(self) -> list[Work]:
        """The thought: its first token is read off the prompt, the last one is left to the action block."""
        steps = [self._layers(1, self.prompt + i) + self._head() for i in range(1, self.thought)]
        return [self._head(), *steps]

    def _mask_block(self, block: int) -> Work:
        return self._layers(block, self.prompt + block) + self._bins(self.layout.slots)

    def _see(self) -> Work:
        """The vision tower over all pictures of all rows; every picture attends to itself."""
        patches = (self.vision.image_size // self.vision.patch_size) ** 2
        pictures = self.rows * self.layout.image_tokens // patches
        attention = 4 * self.vision.num_hidden_layers * self.vision.hidden_size * patches**2
        flops = pictures * (2 * self.vision_weights * patches + attention)
        return Work(self.size * self.vision_weights, flops)

    def _layers(self, new: int, keys: int) -> Work:
        """The language model's layers over ``new`` tokens a row that see ``keys`` keys."""
        text = self.text
        cached = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * keys * self.rows
        attention = 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * new * keys * self.rows
        flops = 2 * self.layer_weights * new * self.rows + attention
        return Work(self.size * (self.layer_weights + cached), flops)

    def _head(self) -> Work:
        return self._output(self.text.vocab_size, 1)

    def _bins(self, positions: int) -> Work:
        return self._output(self.layout.bins.count, positions)

    def _output(self, columns: int, positions: int) -> Work:
        """Some rows of the output layer at some positions a row."""
        weights = columns * self.text.hidden_size
        return Work(self.size * weights, 2 * weights * positions * self.rows)


def measure_rates(device: torch.device, dtype: torch.dtype, repeats: int = 7) -> Rates:
    """Measure the two rates.

    Bandwidth is the best of three ways to read a large buffer once (a sum, a maximum of integers, a dot product with
    itself: which one is not held up by arithmetic depends on the device), the matmul rate that of two square matrices
    of random numbers in ``dtype``. The fastest of several runs counts: a floor is what the device can do, not what it
    usually does.
    """
    buffer = torch.randn(READ_BYTES[device.type] // 4, device=device)
    integers = buffer.view(torch.int32)
    ways = (buffer.sum, integers.amax, partial(torch.dot, buffer, buffer))
    bandwidth = READ_BYTES[device.type] / min(_best(way, device, repeats) for way in ways)
    del buffer, integers, ways
    side = MATRIX_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return Rates(bandwidth, 2 * side**3 / _best(lambda: left @ right, device, repeats))


def _best(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest run after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _seconds(forwards: Iterable[Work], rates: Rates) -> float:
    return sum(work.seconds(rates) for work in forwards)
