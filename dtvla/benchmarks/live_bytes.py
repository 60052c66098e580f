"""Bytes that are alive while torch computes, counted storage by storage, on real tensors or on fake ones.

Fake tensors (torch's ``FakeTensorMode``) have shapes and types but no content, so a model of any size runs on any
machine, and the count is the same: it follows from shapes alone.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

WEIGHTS, COPIES, GRADIENTS, STATES, REST = "weights", "cast weights", "gradients", "optimizer", "activations"
KINDS = (WEIGHTS, COPIES, GRADIENTS, STATES, REST)
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


class LiveBytes(TorchDispatchMode):
    """While it is active, counts the storages that operators return, until they are freed.

    Around a :class:`FakeTensorMode` it also lets everything run really that touches no fake tensor: ids, masks and
    labels have content, on which shapes depend.

    Attributes:
        now: bytes alive by kind, one of :data:`KINDS`; what nobody claimed is :data:`REST`.
        peak: the same at the moment when they were most in all.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        super().__init__()
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._live: dict[int, tuple[int, str]] = {}

    def claim(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count the storages of tensors as ``kind`` from now on."""
        for tensor in tensors:
            self._add(tensor, REST)
            key = tensor.untyped_storage()._cdata
            size, before = self._live[key]
            self.now[before] -= size
            self.now[kind] += size
            self._live[key] = size, kind

    def watch_gradients(self, model: nn.Module) -> None:
        """Count gradients of the weights that are trained as such as soon as they are complete."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._gradient)

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now.copy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it returns."""
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fakes = any(isinstance(tensor, FakeTensor) for tensor in given)
        if not fakes and (given or func.overloadpacket is torch.ops.aten.arange):
            with _disable_current_modes():
                result = func(*args, **kwargs)
        else:
            if fakes and func in INDEXING:  # by a real mask: how many it chooses is known
                args = (args[0], _whole_numbers(args[1]), *args[2:])
            result = func(*args, **kwargs)
        cast = func is torch.ops.aten._to_copy.default and self._kind(args[0]) == WEIGHTS
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf, COPIES if cast else REST)
        return result

    def _gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.claim([parameter.grad], GRADIENTS)

    def _kind(self, tensor: Tensor) -> str | None:
        return self._live.get(tensor.untyped_storage()._cdata, (0, None))[1]

    def _add(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = storage.nbytes(), kind
        self.now[kind] += storage.nbytes()
        weakref.finalize(storage, self._drop, key)
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def _drop(self, key: int) -> None:
        size, kind = self._live.pop(key)
        self.now[kind] -= size


def _whole_numbers(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Indices in which masks are replaced by the places they choose."""
    found: list[Tensor | None] = []
    with _disable_current_modes():
        for index in indices:
            is_mask = index is not None and index.dtype == torch.bool
            found += list(index.nonzero().unbind(1)) if index is not None and is_mask else [index]
    return found


def give_fake_weights(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace all weights and buffers of a model on the meta device by fake ones on the CPU, tied ones by one.

    4-bit layers, which wait on the meta device with their weights still whole, become what bitsandbytes makes of them.
    """
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit

    functional.quantize_4bit(
        torch.zeros(64, 64), compress_statistics=True, quant_type="nf4"
    )  # fills its tables, really
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_weight = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
        return made[id(tensor)]

    with mode:
        for module in list(model.modules()):
            if isinstance(module, Linear4bit):
                old: Any = module.weight
                whole = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                options = {"blocksize": old.blocksize, "quant_type": old.quant_type}
                packed, state = functional.quantize_4bit(whole, compress_statistics=True, **options)
                weight: Any = nn.Parameter(packed, requires_grad=False)
                weight.quant_state = state
                made[id(old)] = weight
            stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in stores:
                tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})
