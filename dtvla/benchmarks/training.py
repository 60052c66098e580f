"""The training study: one optimiser step of ours beside the plain way, on the same weights and batch, in one run.

The plain way is transformers' PaliGemma as it comes, with the same attention rule: eager layers, logits of the whole
vocabulary at every position, transformers' own loss over them. Ours compiles the layers, leaves out keys that nobody
of a run of rows sees, and computes the last layer and the logits where a token is supervised, logits a part at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from dtvla.benchmarks.models import INSTRUCTION, fresh_policy, twin
from dtvla.benchmarks.peak import Meter, give_back_freed
from dtvla.benchmarks.processes import in_child
from dtvla.benchmarks.target import Target
from dtvla.benchmarks.timing import TOTAL, Mark, interleave
from dtvla.data.grouping import Cut
from dtvla.errors import UserError
from dtvla.learning.flops import peak_flops, training_flops, work_of
from dtvla.policy.layout import Batch, Layout, stack
from dtvla.policy.loss import sft_loss
from dtvla.policy.model import HybridVLA, configure
from dtvla.policy.placement import DTYPES, place, type_name

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
        model: the ``model`` group, fresh weights; its ``compile_budget`` and ``gradient_checkpointing`` are our side's.
        device: ``auto`` is the GPU when there is one.
        dtype: of the arithmetic; weights, gradients and moments are float32, as in training (``bf16-mixed``). ``auto``
            is float32 on the CPU, bfloat16 on a GPU.
        threads: of the CPU; None is torch's choice.
        seed: of weights, pictures, thoughts and actions.
        compile: whether our side compiles its layers.
        micro_batch: samples of a forward pass; None is :data:`MICRO_BATCH`.
        passes: of a step. The plain way pads the samples of each pass as they come, as the published
            trainer does; ours puts samples of like length together.
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
    compile: bool = True
    micro_batch: int | None = None
    passes: int = 4
    thought_lengths: tuple[int, int] = (40, 90)
    repeats: int = 7
    warmup: int = 2

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.checkpoint is not None or self.model.get("checkpoint"):
            raise UserError("training: measures fresh weights; leave checkpoint out and set model.checkpoint=null")
        if self.dtype not in ("auto", *DTYPES):
            raise UserError(f"dtype: {self.dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
        least = {"micro_batch": 1, "passes": 1, "threads": 1, "repeats": 1, "warmup": 1}
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
        policy = fresh_policy(model, self.device)
        self.layout = policy.processor.layout
        passes = make_passes(self.layout, settings, tuple(policy.processor.images.cameras))
        self.passes = {side: [part.to(self.device) for part in passes[side]] for side in sides}
        self.tokens = sum(part.tokens for part in passes[OURS])
        self.model = policy.model
        self.flops = training_flops(self.model)
        self.models: dict[str, HybridVLA] = {side: twin(policy.model) for side in sides}
        for side, own in self.models.items():
            configure(own, model | {"compile": settings.compile} if side == OURS else {"decoder": own.decoder})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def losses(self, side: str) -> Iterator[Tensor]:
        """What each pass adds to the mean cross entropy of all supervised tokens."""
        model, mixed = self.models[side], self.dtype == torch.bfloat16
        for part in self.passes[side]:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
                if side == PLAIN:
                    loss = plain_loss(model, part) * part.tokens
                else:
                    loss = sft_loss(model, part, self.layout.bins).cross_entropy
            yield loss / self.tokens

    def step(self, side: str, mark: Mark) -> None:
        """One optimiser step; phases ``passes``, ``update``."""
        self.gradient(side)
        mark("passes")
        self.optimizer.step()
        mark("update")

    def gradient(self, side: str) -> float:
        """The loss, and its gradient in place of the one before."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for loss in self.losses(side):
            loss.backward()
            total += loss.detach()
        return float(total)

    def activations(self, side: str) -> int:
        """Bytes that forward and backward need at most beside weights, gradients and moments."""
        self.step(side, lambda phase: None)  # compiled, libraries loaded
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        meter = Meter(self.device)
        next(self.losses(side)).backward()  # the pass of the longest samples
        return meter.peak()


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
    """The loss the plain way: transformers' layers and logits at every position, padding included, and its own loss."""
    logits_BTV = model.lm_head(model.encode(batch))
    loss: Tensor = ForCausalLMLoss(logits_BTV, batch.labels_BT, logits_BTV.shape[-1])
    return loss


def make_passes(layout: Layout, settings: Settings, cameras: tuple[str, ...]) -> dict[str, list[Batch]]:
    """Random pictures, thoughts of mixed lengths and actions, cut the plain way and ours; the longest come first."""
    generator = torch.Generator().manual_seed(settings.seed)
    rows = settings.micro_batch or MICRO_BATCH.get(place(settings.device, settings.dtype)[0].type, 1)
    count = rows * settings.passes
    low, high = settings.thought_lengths
    words, examples = INSTRUCTION.split(), []
    actions_BSD = torch.rand(count, layout.chunk, layout.action_dim, generator=generator) * 2 - 1
    for length, actions_SD in zip(
        torch.randint(low, high + 1, (count,), generator=generator).tolist(), actions_BSD, strict=True
    ):
        thought = " ".join(words[i] for i in torch.randint(len(words), (length,), generator=generator))
        examples.append(layout.encode(INSTRUCTION, thought, actions_SD))
    side = int(settings.model["image_size"])
    shape = (count, len(cameras), 3, side, side)
    pixels_BNCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    lengths_B = np.array([len(example.input_ids_T) for example in examples])
    plain = sorted(np.arange(count).reshape(-1, rows), key=lambda part: -lengths_B[part].max())
    cuts = {PLAIN: plain, OURS: Cut(micro_batch_size=rows).passes(lengths_B)}
    return {
        name: [
            Batch(
                pixels_BNCHW=pixels_BNCHW[part],
                actions_BSD=actions_BSD[part],
                **stack([examples[index] for index in part], layout.vocabulary.pad_id),
            )
            for part in parts
        ]
        for name, parts in cuts.items()
    }


def _activations(settings: Settings, side: str) -> int:
    give_back_freed()
    return Subject(settings, (side,)).activations(side)


def _agreement(subject: Subject) -> dict[str, float]:
    """Whether both sides learn the same: losses, and how far the gradients are apart, of the plain one's length."""
    plain = subject.gradient(PLAIN)
    expected = [p.grad.detach().clone() for p in subject.model.parameters() if p.grad is not None]
    ours = subject.gradient(OURS)
    found = [p.grad for p in subject.model.parameters() if p.grad is not None]
    length = torch.stack([b.double().square().sum() for b in expected]).sum().sqrt()
    apart = torch.stack([(a.double() - b.double()).square().sum() for a, b in zip(found, expected, strict=True)])
    subject.optimizer.zero_grad()
    return {"plain_loss": plain, "our_loss": ours, "gradients_apart": float(apart.sum().sqrt() / length)}


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
    samples, pictures, supervised, tokens, pairs = work_of(subject.passes[OURS]).to_tensor().tolist()
    operations = subject.flops(pictures=pictures, tokens=tokens, pairs=pairs, supervised=supervised)
    peak = peak_flops(subject.device, "bf16-mixed" if subject.dtype == torch.bfloat16 else "32-true")
    records = []
    for side, phases in timings.items():
        seconds = phases[TOTAL].median
        record: dict[str, Any] = {"side": side, "samples": samples, "samples_per_s": samples / seconds}
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
        "micro_batch": len(subject.passes[OURS][0]),
        "row_tokens": {side: [part.input_ids_BT.shape[1] for part in parts] for side, parts in subject.passes.items()},
        "image_tokens": subject.layout.image_tokens,
        "supervised_tokens": subject.tokens,
    }
