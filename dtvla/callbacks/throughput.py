"""How fast training is, how much of the device's peak that is, and how much memory it takes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dtvla.errors import UserError
from dtvla.learning.flops import Flops, Work, peak_flops, training_flops, work_of

if TYPE_CHECKING:
    from dtvla.policy.layout import Batch
    from dtvla.policy.model import HybridVLA


class Throughput(Callback):
    """Logs speed, model FLOPs utilisation and peak memory over windows of ``trainer.log_every_n_steps`` steps.

    The clock runs from the end of one step to the end of the next, waiting for data included, and stands still during
    validation and rollouts. Padding is not counted, neither as tokens nor as work. Figures are those of all ranks
    together; of memory, that of the rank with the most.

    ``throughput/samples_per_s``, ``tokens_per_s``, ``supervised_tokens_per_s``: as they say.
    ``throughput/mfu``: the work that the model needs (:mod:`dtvla.learning.flops`) per second, as a share of the
    devices' peak.
    ``throughput/peak_memory_gb``: most memory so far, in 10^9 bytes: of torch's tensors on a GPU, of the process
    (without its loaders) on a CPU.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        """Start with an empty window.

        Args:
            peak_tflops: of one device, dense, in the precision of training, in 10^12 operations per second; None looks
                the device up, and where it is not known no MFU is logged.

        Raises:
            UserError: it is not positive.
        """
        if peak_tflops is not None and peak_tflops <= 0:
            raise UserError(f"callbacks.throughput.peak_tflops: {peak_tflops} is not positive; null looks it up")
        self.peak_tflops = peak_tflops
        self._peak: float | None = None
        self._flops = Flops()
        self._since: float | None = None
        self._work: Work | None = None
        self._seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the model and the device."""
        self._flops = training_flops(cast("HybridVLA", pl_module.model))
        device = trainer.strategy.root_device
        known = peak_flops(device, str(trainer.precision))
        self._peak = known if self.peak_tflops is None else self.peak_tflops * 1e12
        if self._peak is None and device.type != "cpu" and trainer.is_global_zero:  # on CPUs nobody expects it
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
            unknown = f"the peak of {name} in {trainer.precision} is not known"
            print(f"no MFU: {unknown}; set callbacks.throughput.peak_tflops")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: list[Batch], batch_idx: int
    ) -> None:
        """Count the batch, and log when the window is full. The first step of all only starts the clock."""
        now = time.monotonic()
        if self._since is not None:
            self._seconds += now - self._since
            work = work_of(batch, cast("HybridVLA", pl_module.model).autoregressive)
            self._work = work if self._work is None else self._work + work
        self._since = now
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % every == 0 and self._work is not None:
            values = self._measure(trainer, self._work.to_tensor(), self._seconds)
            shown = {name: values.pop(name) for name in ("supervised_tokens_per_s",)}
            pl_module.log_dict({f"throughput/{name}": value for name, value in values.items()}, prog_bar=True)
            pl_module.log_dict({f"throughput/{name}": value for name, value in shown.items()})
            self._work, self._seconds = None, 0.0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock again."""
        self.start()

    def stop(self) -> None:
        """Add the time since the last step to the window and stop the clock."""
        if self._since is not None:
            self._seconds += time.monotonic() - self._since
        self._since = None

    def start(self) -> None:
        """Let the next step count from now."""
        self._since = time.monotonic()

    def _measure(self, trainer: Trainer, work_5: Tensor, seconds: float) -> dict[str, float]:
        """Put the counts of all ranks together; the only time that this callback waits for a device."""
        device = trainer.strategy.root_device
        counts = trainer.strategy.reduce(work_5.to(device), reduce_op="sum").tolist()
        memory = trainer.strategy.reduce(torch.tensor(peak_memory(device), device=device), reduce_op="max")
        samples, pictures, supervised, tokens, pairs = counts
        values = {
            "samples_per_s": samples / seconds,
            "tokens_per_s": tokens / seconds,
            "supervised_tokens_per_s": supervised / seconds,
            "peak_memory_gb": int(memory) / 1e9,
        }
        if self._peak is not None:
            flops = self._flops(pictures=pictures, tokens=tokens, pairs=pairs, supervised=supervised)
            values["mfu"] = flops / seconds / (self._peak * trainer.world_size)
        return values


def peak_memory(device: torch.device) -> int:
    """Most bytes that torch's tensors have taken on a GPU, or else that this process has taken."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def clock_stopped(trainer: Trainer) -> Iterator[None]:
    """Keep whatever happens inside (rollouts) out of the training throughput."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    clocks = [callback for callback in callbacks if isinstance(callback, Throughput)]
    for clock in clocks:
        clock.stop()
    try:
        yield
    finally:
        for clock in clocks:
            clock.start()
