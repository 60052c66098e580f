"""A sharded policy, lent whole: each rank may then decide at its own pace, without another word to the others.

Sharded weights (FSDP2, tensor parallelism) gather themselves inside of every forward, which all ranks must then make
together. Thinking makes a forward for each token, and episodes end at different times.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dtvla.policy.model import HybridVLA
from dtvla.policy.policy import Policy


@contextmanager
def gathered(policy: Policy) -> Iterator[Policy]:
    """Lend a policy with whole weights on this rank's device.

    All ranks enter together: each weight is one collective operation, once. Inside and at the end there are none. A
    policy without sharded weights is lent as it is, at no cost.

    Args:
        policy: whose weights may be sharded; not changed. Its processor is shared.

    Yields:
        A policy that decides and saves like an unsharded one. Its gathered weights, in the type in which they are
        sharded, are a copy for as long as the context is open.
    """
    for module in policy.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a validation the outermost one is still whole, in the type of its arithmetic
    if not any(isinstance(weight, DTensor) for weight in policy.model.parameters()):
        yield policy
        return
    whole = Policy(cast(HybridVLA, _whole(policy.model, {})), policy.processor)
    whole.engine_mode = policy.engine_mode
    yield whole


@torch.no_grad()
def _whole(module: nn.Module, known: dict[int, nn.Parameter]) -> nn.Module:
    """A module tree that shares everything with another one but what sharding put there.

    Args:
        module: its weights may be sharded.
        known: gathered weights by the identity of the sharded ones, so that tied weights stay tied.
    """
    kind = next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))  # fully_shard adds a class
    double = cast(nn.Module, kind.__new__(kind))
    # Methods that were wrapped for sharding are bound to the sharded module: the class has the original ones.
    own = {name: value for name, value in vars(module).items() if getattr(value, "__self__", None) is not module}
    hooks = {name: _others(value) for name, value in own.items() if name.endswith("_hooks") and value}
    double.__dict__.update(own | hooks)
    double.__dict__["_parameters"] = {name: _gather(w, known) for name, w in module._parameters.items()}
    double.__dict__["_modules"] = {n: None if m is None else _whole(m, known) for n, m in module._modules.items()}
    return double


def _gather(weight: nn.Parameter | None, known: dict[int, nn.Parameter]) -> nn.Parameter | None:
    if not isinstance(weight, DTensor):
        return weight
    if id(weight) not in known:
        known[id(weight)] = nn.Parameter(weight.full_tensor(), requires_grad=False)
    return known[id(weight)]


def _others(hooks: dict[int, object]) -> dict[int, object]:
    """The hooks that torch.distributed did not set: its own gather weights and convert between layouts."""
    kept = [(n, hook) for n, hook in hooks.items() if not str(hook.__module__).startswith("torch.distributed")]
    return type(hooks)(kept)
