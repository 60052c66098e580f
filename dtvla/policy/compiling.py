"""Layers that are compiled for training: fewer operations, and fewer intermediate values kept for the gradient.

Every layer of a kind runs the same compiled code, so compiling takes as long for two layers as for thirty; the last
language layer, which computes less, has code of its own. The code holds for all lengths and batch sizes. Without
gradients (validation, decisions) layers run as they are: evaluation would otherwise wait for code of its own. So they
do in float64, which is for checks.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from transformers.modeling_layers import GradientCheckpointingLayer

from dtvla.errors import UserError

aten = torch.ops.aten
BUDGET = 0.7  # norms, activations and rotations are computed again, products and attention are not


def compile_layers(model: nn.Module, budget: float = BUDGET) -> None:
    """Compile the layers of vision tower and language model, in place; names and weights stay.

    Compiling itself happens in the first steps. Checkpointing lies around the compiled code, and hooks (of sharding)
    around both, so they can be set up before or after this.

    Args:
        model: its layers.
        budget: share of the values that torch would keep for the gradient, for the fastest backward pass; the others
            are computed again, the cheapest first. It holds for all that this process compiles with gradients.

    Raises:
        UserError: the budget is no share.
    """
    if not 0 < budget <= 1:
        raise UserError(f"model.compile_budget: {budget} is no share; give a number above 0, up to 1")
    functorch_config.activation_memory_budget = budget
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and not is_compiled(module):
            module.__class__ = _compiled_kind(type(module))  # type: ignore[assignment, arg-type]


def is_compiled(layer: nn.Module) -> bool:
    """Whether :func:`compile_layers` has seen this layer."""
    return hasattr(type(layer), "_compiled_from")


@cache
def _compiled_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward is compiled; transformers wraps the forward of every subclass in checkpointing."""
    plain: Any = getattr(kind.forward, "__wrapped__", kind.forward)  # without checkpointing
    compiled = torch.compile(plain, dynamic=True, options={"post_grad_custom_post_pass": _OneDNN()})

    def forward(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        # In float64 torch 2.11 compiles a backward of attention that fails on the CPU: its sums are taken for float32.
        learns = torch.is_grad_enabled() and hidden.dtype != torch.float64
        return (compiled if learns else plain)(self, hidden, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "_compiled_from": kind, "__module__": kind.__module__})


class _OneDNN(CustomGraphPass):
    """Lets oneDNN multiply float32 matrices on a CPU, where torch asks MKL: by a tenth faster on processors of AMD."""

    def __call__(self, graph: fx.Graph) -> None:
        """Replace the products of a graph."""
        for node in graph.find_nodes(op="call_function", target=aten.mm.default):
            self._replace(graph, node, *node.args, None)
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            bias, left, right = node.args
            if not node.kwargs and bias.meta["val"].ndim == 1:
                self._replace(graph, node, left, right, bias)
        graph.lint()

    def uuid(self) -> Any:
        """Of this code, for the cache of compiled graphs."""
        return get_hash_for_files((__file__,))

    @staticmethod
    def _replace(graph: fx.Graph, node: fx.Node, *arguments: Any) -> None:
        value = node.meta["val"]
        if value.device.type == "cpu" and value.dtype == torch.float32:
            node.target, node.args = torch.ops.dtvla.product.default, arguments


@torch.library.custom_op("dtvla::product", mutates_args=())
def _product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.t(), bias, "none", [], "")
    return result


@_product.register_fake
def _(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])
