"""How much memory a training step needs: predicted for any device without one, and measured where it runs.

The prediction runs the real training step of the real model on tensors without content and counts what is alive
(:mod:`dtvla.benchmarks.live_bytes`). It leaves out what lies below torch's operators: scratch space of single kernels,
the allocator's rounding and fragments, and the driver's own half a gigabyte on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dtvla.benchmarks.live_bytes import GRADIENTS, KINDS, REST, STATES, WEIGHTS, LiveBytes, give_fake_weights
from dtvla.benchmarks.memory_settings import METHODS, Case, Settings
from dtvla.benchmarks.models import fresh_policy
from dtvla.benchmarks.peak import Meter, give_back_freed
from dtvla.benchmarks.processes import in_child
from dtvla.learning.optim import OptimizerSettings, build_optimizer, gradient_norm
from dtvla.learning.sft import SFTModule
from dtvla.policy import adapters
from dtvla.policy.layout import IGNORE, Batch, Example, Layout, Segment, stack
from dtvla.policy.model import HybridVLA, configure
from dtvla.policy.policy import Policy
from dtvla.policy.quantization import count

__all__ = ["METHODS", "Case", "Settings", "measure", "memory", "predict"]

MICRO_BATCHES = 2  # of a step: the second one meets whatever the first leaves behind


@dataclass
class _Step:
    """A model ready to train, and what a step takes."""

    module: SFTModule
    optimizer: torch.optim.Optimizer
    batch: Batch
    autocast: bool

    def prepare(self) -> None:
        """Make the optimiser's states, as the first step does, and gradients, which later micro-batches add to."""
        for parameter in self.module.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def run(self) -> None:
        """A later step: what :meth:`SFTModule.training_step` calls, under Lightning's ``bf16-mixed``."""
        device = self.batch.input_ids_BT.device.type
        with torch.autocast(device, torch.bfloat16) if self.autocast else nullcontext():
            batches = [self.batch] * MICRO_BATCHES
            self.module.accumulate(batches, self.module.loss_of(batches))
            gradient_norm(self.module.model, self.module.settings.clip)
            self.optimizer.step()


def memory(settings: Settings) -> dict[str, Any]:
    """Predict every model, method and micro-batch; measure those that fit the device."""
    device = settings.device_to_measure()
    rows = []
    for number, case in enumerate(settings.cases()):
        print(f"\rcase {number + 1} of {len(settings.cases())}", end="", file=sys.stderr)
        row = _names(case) | predict(case, settings.gpus)
        if device is not None:
            row["measured_bytes"] = _measured(case, device, sum(row["peak_bytes"].values()))
        rows.append(row)
    print(file=sys.stderr)
    return {
        "device": str(device or "none"),
        "dtype": settings.precision,
        "precision": settings.precision,
        "gpus": settings.gpus,
        "rows": rows,
    }


def predict(case: Case, gpus: int = 8) -> dict[str, Any]:
    """Bytes by kind when a training step needs most, on one device and on each of ``gpus`` that share the weights out.

    The latter is a division: weights, gradients and optimiser states by ``gpus``, activations as on one device, and the
    layers that FSDP2 holds whole in bfloat16 (the root all the time, the largest layer twice, one gathered ahead).
    """
    model_settings = case.model_settings()
    policy = _policy(model_settings, "meta")
    model = policy.model
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    give_fake_weights(model, mode)
    live = LiveBytes()
    live.claim([*model.parameters(), *model.buffers()], WEIGHTS)
    step = _step(case, policy, model_settings)
    live.watch_gradients(model)
    with mode, live:
        step.prepare()
        states = [leaf for state in step.optimizer.state.values() for leaf in state.values()]
        live.claim((leaf for leaf in states if isinstance(leaf, Tensor)), STATES)
        live.claim((weight.grad for weight in model.parameters() if weight.grad is not None), GRADIENTS)
        live.restart()
        step.run()
    peak = {kind: live.peak[kind] for kind in KINDS}
    return {
        "parameters": count(model),
        "trained": count(model, trainable=True),
        "adapter": count(model, trainable=True) if adapters.has_adapter(model) else 0,
        "sequence": step.batch.input_ids_BT.shape[1],
        "peak_bytes": peak,
        "sharded_bytes": _sharded(model, peak, gpus) if case.can_be_sharded else None,
    }


def measure(case: Case, device: torch.device) -> int:
    """Bytes that the same step takes on a device: of torch's allocator on a GPU, of the process on a CPU (Linux).

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    settings = case.model_settings()
    if device.type == "cpu":
        give_back_freed()
        _step(case, _policy(settings, "cpu"), settings).run()  # libraries load what they need to
    meter = Meter(device)
    step = _step(case, _policy(settings, str(device)), settings)
    step.prepare()
    meter.restart()
    step.run()
    return meter.peak()


def _measured(case: Case, device: torch.device, predicted: int) -> int | None:
    """None where it does not fit."""
    if device.type == "cpu":
        return in_child(measure, case, device) if predicted < psutil.virtual_memory().available else None
    if predicted > torch.cuda.get_device_properties(device).total_memory:
        return None
    try:
        return measure(case, device)
    except torch.OutOfMemoryError:
        return None


def _names(case: Case) -> dict[str, Any]:
    return {key: value for key, value in asdict(case).items() if key != "model"} | {"model": case.model["name"]}


def _policy(settings: Mapping[str, Any], device: str) -> Policy:
    policy = fresh_policy(settings, device)
    adapters.prepare(policy.model, settings)
    configure(policy.model, settings)
    return policy


def _step(case: Case, policy: Policy, settings: Mapping[str, Any]) -> _Step:
    module = SFTModule(policy, OptimizerSettings(name=case.optimizer, warmup_steps=1))
    optimizer, _ = build_optimizer(module.model, module.settings, total_steps=10)
    weight = next(module.model.parameters())
    batch = _batch(policy.processor.layout, settings, case).to(weight.device)
    return _Step(module, optimizer, batch, autocast=case.precision == "bf16-mixed")


def _batch(layout: Layout, settings: Mapping[str, Any], case: Case) -> Batch:
    """Samples of the asked number of tokens; what they say does not matter."""
    words = layout.vocabulary
    word = next(i for i in range(words.action_first_id) if i not in words.control_ids)
    prefix = [words.image_id] * layout.image_tokens + [words.bos_id] + [word] * case.prompt_tokens
    think = [words.think_start_id, *[word] * case.thought_tokens, words.think_end_id]
    act, actions_SD = layout.act_block(), torch.zeros(layout.chunk, layout.action_dim)
    ids_T = torch.tensor(prefix + think + act)
    counts = torch.tensor([len(prefix), len(think), len(act)])
    segment_T = torch.tensor([Segment.PREFIX, Segment.THINK, Segment.ACT]).repeat_interleave(counts)
    slot_T = torch.zeros(len(ids_T), dtype=torch.bool)
    first = len(prefix) + len(think) + 1
    slot_T[first : first + layout.slots] = True
    ids_T[slot_T] = layout.bins.encode(actions_SD).flatten()
    labels_T = torch.where(segment_T == Segment.PREFIX, IGNORE, ids_T)
    example = Example(input_ids_T=ids_T, segment_T=segment_T, labels_T=labels_T, slot_T=slot_T)
    rows, side = case.micro_batch, int(settings["image_size"])
    return Batch(
        pixels_BNCHW=torch.zeros(rows, len(settings["cameras"]), 3, side, side, dtype=torch.uint8),
        actions_BSD=actions_SD.expand(rows, -1, -1),
        **stack([example] * rows, words.pad_id),
    )


def _sharded(model: HybridVLA, peak: Mapping[str, int], gpus: int) -> int:
    layers = (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers)
    sizes = [2 * count(layer) for layer in layers]
    root = 2 * count(model) - sum(sizes)
    own = sum(peak[kind] for kind in (WEIGHTS, GRADIENTS, STATES))
    return round(own / gpus + peak[REST] + root + 2 * max(sizes))
