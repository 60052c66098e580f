"""Weights, gradients and optimiser state shared out over the ranks of a training (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dtvla.errors import UserError
from dtvla.policy import quantization

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from dtvla.policy.model import HybridVLA


def shard(model: HybridVLA, mesh: DeviceMesh, precision: str, *, offload: bool = False) -> None:
    """Share out each layer's weights, and what is left (embedding, projector, norms) at the root.

    A layer is whole while it computes, forward and backward; the root from the first forward to the last backward,
    because its embedding is needed at both ends. What checkpoints or compiles layers comes before. A model that is
    sharded already stays as it is.

    Args:
        model: equal on all ranks; changed in place.
        mesh: of the ranks, one dimension.
        precision: of Lightning's Trainer. ``bf16-mixed`` keeps the shards and adds up gradients in float32, and gathers
            and computes in bfloat16.
        offload: keep the shards in main memory; each is moved to the device when it is gathered.

    Raises:
        UserError: the model is quantised.
    """
    if isinstance(model, FSDPModule):
        return
    bits = quantization.bits_of(model)
    if bits:
        raise UserError(
            f"model.quantize: {bits} weights can't be shared out over ranks; use trainer=single_gpu or ddp, or null"
        )
    policy = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    where: OffloadPolicy = CPUOffloadPolicy() if offload else OffloadPolicy()
    layers = (*model.model.vision_tower.encoder.layers, *model.model.language_model.layers)
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, offload_policy=where)


@contextmanager
def gradient_exchange(model: nn.Module, last: bool) -> Iterator[None]:
    """Inside, the backward of a micro-batch; copies of a model (DDP) exchange gradients in the last one only.

    Shards exchange them each time: else every rank would have to hold the whole gradient.

    Args:
        model: the strategy's, which may be wrapped.
        last: whether it is the step's last micro-batch.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield
