"""The training study: one optimiser step of ours beside the plain way, on the same weights and batch, in one run.

The plain way is transformers' PaliGemma as it comes, with the same attention rule: eager layers, logits of the whole
vocabulary at every position, transformers' own loss over them. Ours compiles the layers and computes logits where a
token is supervised, a part at a time.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from dtvla.benchmarks.peak import peak_bytes
from dtvla.benchmarks.processes import in_child
from dtvla.benchmarks.target import Target
from dtvla.benchmarks.timing import TOTAL, Mark, interleave
from dtvla.data.normalization import Statistics
from dtvla.errors import UserError
from dtvla.learning.flops import peak_flops, training_flops, work_of
from dtvla.policy import build
from dtvla.policy.compiling import compile_layers
from dtvla.policy.layout import Batch, Layout, stack
from dtvla.policy.loss import sft_loss
from dtvla.policy.model import HybridVLA, configure
from dtvla.policy.placement import DTYPES, place, type_name
from dtvla.policy.vocabulary import TAGS

INSTRUCTION = "put the black bowl in the bottom drawer of the cabinet and close it"  # libero_10 task 3
FRAMES, STATE_DIM = 100, 8  # of random statistics
OURS, PLAIN = "ours", "plain"
MICRO_BATCH = {"cpu": 4, "cuda": 8}
TARGETS = {
    "cpu": [Target("samples/s: ours / plain", True, 1.3), Target("activations: ours / plain", False, 0.5)],
    "cuda": [
        Target("samples/s: ours / plain", True, 1.5),
        Target("activations: ours / plain", False, 0.5),
        Target("share of the peak: ours", True, 0.45),
    ],
}


@dataclass(frozen=True)
class Settings:
    """See ``conf/benchmark.yaml``, which has the same names.

    Attributes:
        model: the ``model`` group, fresh weights; its ``compile`` (true) and ``gradient_checkpointing`` are our side's.
        device: ``auto`` is the GPU when there is one.
        dtype: of the weights and all that is computed; ``auto`` is float32 on the CPU, bfloat16 on a GPU.
        threads: of the CPU; None is torch's choice.
        seed: of weights, pictures, thoughts and actions.
        micro_batch: samples of the step; None is :data:`MICRO_BATCH`.
        thought_lengths: words of the shortest and of the longest thought; all between are as likely.
        repeats: steps of each side that count.
        warmup: steps before them; the first one compiles.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: None = None
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    seed: int = 0
    micro_batch: int | None = None
    thought_lengths: tuple[int, int] = (40, 90)
    repeats: int = 7
    warmup: int = 2

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.checkpoint is not None or self.model.get("checkpoint"):
            raise UserError("training: measures fresh weights; leave checkpoint out and set model.checkpoint=null")
        if self.dtype not in ("auto", *DTYPES):
            raise UserError(f"dtype: {self.dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
        least = {"micro_batch": 1, "threads": 1, "repeats": 1, "warmup": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < smallest):
                raise UserError(f"{name}: {value!r} is not a whole number from {smallest} on; give one")
        lengths = self.thought_lengths
        if len(lengths) != 2 or not 1 <= lengths[0] <= lengths[1]:
            raise UserError(f"thought_lengths: {list(lengths)}; give the shortest and the longest, such as [40,90]")


class Subject:
    """A model, the batch it learns from, and both ways to make a step. Weights, gradients and moments are shared."""

    def __init__(self, settings: Settings, sides: tuple[str, ...] = (PLAIN, OURS)) -> None:
        """Draw weights and batch; nothing is compiled yet.

        Raises:
            UserError: no such device, or thoughts longer than the model takes.
        """
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.device, self.dtype = place(settings.device, settings.dtype)
        model = {**settings.model, "seed": settings.seed}
        # A tokenizer of real data fills its table; the one sentence here would make the output layer too small.
        model["vocabulary_size"] = model.get("vocabulary_size") or (
            int(model["tokenizer_size"]) + int(model["action_bins"]) + len(TAGS)
        )
        rng = np.random.default_rng(settings.seed)
        frames = rng.normal(size=(FRAMES, STATE_DIM)), rng.uniform(-1, 1, size=(FRAMES, int(model["action_dim"])))
        policy = build.fresh(model, [INSTRUCTION], Statistics.from_frames(*frames), self.device, self.dtype)
        self.layout = policy.processor.layout
        self.batch = make_batch(self.layout, settings, tuple(policy.processor.images.cameras)).to(self.device)
        self.model = policy.model
        self.flops = training_flops(self.model)
        self.models: dict[str, HybridVLA] = {side: _twin(policy.model) for side in sides}
        for side, twin in self.models.items():
            configure(twin, model | {"compile": False} if side == OURS else {"decoder": twin.decoder})
            if side == OURS and model.get("compile", True):
                compile_layers(twin)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def loss(self, side: str) -> Tensor:
        """Mean cross entropy of the batch's supervised tokens."""
        model = self.models[side]
        return plain_loss(model, self.batch) if side == PLAIN else sft_loss(model, self.batch, self.layout.bins).mean

    def step(self, side: str, mark: Mark) -> None:
        """One optimiser step; phases ``forward``, ``backward``, ``update``."""
        self.optimizer.zero_grad()
        loss = self.loss(side)
        mark("forward")
        loss.backward()
        mark("backward")
        self.optimizer.step()
        mark("update")

    def gradient(self, side: str) -> tuple[float, list[Tensor]]:
        """The loss and its gradient, all trained weights in order."""
        self.optimizer.zero_grad()
        loss = self.loss(side)
        loss.backward()
        found = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self.optimizer.zero_grad()
        return float(loss.detach()), found

    def activations(self, side: str) -> int:
        """Bytes that forward and backward need at most beside weights, gradients and moments."""
        self.step(side, lambda phase: None)  # compiled, libraries loaded
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return peak_bytes(lambda: self.loss(side).backward(), self.device)


def training(settings: Settings) -> dict[str, Any]:
    """Measure both sides; returns the parts of the file that ``docs/benchmark.md`` describes.

    Raises:
        UserError: a setting does not suit the model or the machine.
    """
    subject = Subject(settings)
    agreement = _agreement(subject)
    measurements = _measure(subject)
    kind, shapes = subject.device.type, _shapes(subject)
    for record in measurements:
        side = record["side"]
        record["activation_bytes"] = (
            subject.activations(side) if kind == "cuda" else in_child(_activations, settings, side)
        )
    ratios = _ratios(measurements)
    return {
        "device": str(subject.device),
        "dtype": type_name(subject.dtype),
        "threads": torch.get_num_threads(),
        "shapes": shapes,
        "measurements": measurements,
        "agreement": agreement,
        "ratios": ratios,
        "targets": [t.verdict(ratios[t.ratio]["value"]) for t in TARGETS.get(kind, []) if t.ratio in ratios],
    }


def plain_loss(model: HybridVLA, batch: Batch) -> Tensor:
    """The loss the plain way: logits of every position, prompt and padding included, and transformers' loss of them."""
    logits_BTV = model.lm_head(model.encode(batch))
    loss: Tensor = ForCausalLMLoss(logits_BTV, batch.labels_BT, logits_BTV.shape[-1])
    return loss


def make_batch(layout: Layout, settings: Settings, cameras: tuple[str, ...]) -> Batch:
    """Random pictures, thoughts of mixed lengths and actions; padded to the longest thought."""
    generator = torch.Generator().manual_seed(settings.seed)
    rows = settings.micro_batch or MICRO_BATCH.get(place(settings.device, settings.dtype)[0].type, 1)
    low, high = settings.thought_lengths
    words, examples, actions = INSTRUCTION.split(), [], []
    for length in torch.randint(low, high + 1, (rows,), generator=generator).tolist():
        thought = " ".join(words[i] for i in torch.randint(len(words), (length,), generator=generator))
        actions.append(torch.rand(layout.chunk, layout.action_dim, generator=generator) * 2 - 1)
        examples.append(layout.encode(INSTRUCTION, thought, actions[-1]))
    side = int(settings.model["image_size"])
    shape = (rows, len(cameras), 3, side, side)
    return Batch(
        pixels_BNCHW=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        actions_BSD=torch.stack(actions),
        **stack(examples, layout.vocabulary.pad_id),
    )


def _twin(model: HybridVLA) -> HybridVLA:
    """Modules of its own over the same weights."""
    shared: list[Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _activations(settings: Settings, side: str) -> int:
    return Subject(settings, (side,)).activations(side)


def _agreement(subject: Subject) -> dict[str, float]:
    """Whether both sides learn the same: losses, and how far the gradients are apart, of the plain one's length."""
    plain, plain_gradient = subject.gradient(PLAIN)
    ours, gradient = subject.gradient(OURS)
    pairs = list(zip(gradient, plain_gradient, strict=True))
    length = torch.stack([b.double().square().sum() for _, b in pairs]).sum().sqrt()
    apart = torch.stack([(a.double() - b.double()).square().sum() for a, b in pairs]).sum().sqrt()
    return {"plain_loss": plain, "our_loss": ours, "gradients_apart": float(apart / length)}


def _measure(subject: Subject) -> list[dict[str, Any]]:
    """Time both sides in turns; one record for each."""
    settings, done = subject.settings, 0

    def on_round() -> None:
        nonlocal done
        done += 1
        print(f"\rround {done} of {settings.warmup + settings.repeats}", end="", file=sys.stderr)

    sides: dict[str, Callable[[Mark], object]] = {side: partial(subject.step, side) for side in (PLAIN, OURS)}
    timings = interleave(
        sides, repeats=settings.repeats, warmup=settings.warmup, device=subject.device, on_round=on_round
    )
    print(file=sys.stderr)
    samples, pictures, supervised, tokens, pairs = work_of([subject.batch]).to_tensor().tolist()
    operations = subject.flops(pictures=pictures, tokens=tokens, pairs=pairs, supervised=supervised)
    peak = peak_flops(subject.device, "bf16-true" if subject.dtype == torch.bfloat16 else "32-true")
    records = []
    for side, phases in timings.items():
        seconds = phases[TOTAL].median
        record: dict[str, Any] = {"side": side, "micro_batch": samples, "samples_per_s": samples / seconds}
        record |= {"tokens_per_s": tokens / seconds, "flops_per_s": operations / seconds}
        record["share_of_peak"] = None if peak is None else operations / seconds / peak
        records.append(record | {"phases": {phase: timing.to_dict() for phase, timing in phases.items()}})
    return records


def _ratios(measurements: list[dict[str, Any]]) -> dict[str, Any]:
    plain, ours = ({m["side"]: m for m in measurements}[side] for side in (PLAIN, OURS))
    values = {"samples/s: ours / plain": ours["samples_per_s"] / plain["samples_per_s"]}
    values["activations: ours / plain"] = ours["activation_bytes"] / plain["activation_bytes"]
    if ours["share_of_peak"] is not None:
        values["share of the peak: ours"] = ours["share_of_peak"]
    return {name: {"value": value} for name, value in values.items()}


def _shapes(subject: Subject) -> dict[str, Any]:
    head: nn.Linear = subject.model.lm_head
    return {
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "vocabulary": head.out_features,
        "row_tokens": subject.batch.input_ids_BT.shape[1],
        "image_tokens": subject.layout.image_tokens,
        "supervised_tokens": subject.batch.tokens,
    }
