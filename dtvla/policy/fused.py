"""A few tokens through all layers on a CPU, in one function compiled by Numba.

A decoding step reads every weight once and does little else. As torch operations it spends a third of its time between
them, and their products of one row read at half of the memory's speed; here nothing stands between two reads. Weights
are read where the model keeps them. The arithmetic is that of :func:`dtvla.policy.gemma.decoder_layer`: float64 and
float32 as they are, bfloat16 in float32 with a rounding wherever torch's operations round.

Compiling takes seconds, once per machine and type of the weights: Numba keeps the code on disk.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic, overload
from torch import Tensor, nn
from transformers.activations import GELUTanh

# Above so many tokens, oneDNN's blocked products are faster; by the size of a layer (measured on two cores).
MOST_TOKENS, MOST_TOKENS_SMALL, SMALL = 4, 16, 1 << 20
# How numbers of a type look to Numba, which has no bfloat16: its bits.
STORED = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.uint16}
PARTS = (
    *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_config: Any = numba.config
_intrinsic: Any = intrinsic  # its types do not know that the first argument is Numba's own
# Sums may be taken in vectors, and nothing else is rearranged: with "contract" and "nsz" as well, the code that a
# process has just compiled and the code that later ones read from the disk differed in the last bits of their results.
_OPTIONS: dict[str, Any] = {"cache": True, "error_model": "numpy", "fastmath": {"reassoc"}}
try:
    njit(**_OPTIONS)(lambda: None)
except RuntimeError:  # neither this folder nor the user's cache can be written: compiled anew in each process
    _OPTIONS["cache"] = False


def can_fuse(language: Any) -> bool:
    """Whether these are plain Gemma layers on a CPU: no adapters, no bias, one known type, GELU in its tanh form."""
    modules = [layer.get_submodule(part) for layer in language.layers for part in PARTS]
    dtype = modules[0].weight.dtype
    return all(isinstance(layer.mlp.act_fn, GELUTanh) for layer in language.layers) and all(
        (type(module) is nn.Linear or part.endswith("norm"))
        and getattr(module, "bias", None) is None
        and can_read(module.weight)
        and module.weight.dtype == dtype
        for module, part in zip(modules, PARTS * len(language.layers), strict=True)
    )


def can_read(weight: Tensor) -> bool:
    """Whether the compiled code can read this weight."""
    regular = weight.is_contiguous() and weight.shape[-1] % 2 == 0  # bfloat16 is read in pairs
    return weight.device.type == "cpu" and weight.dtype in STORED and regular


def most_tokens(weights: int) -> int:
    """The number of tokens up to which the compiled code is faster for layers of so many weights."""
    return MOST_TOKENS_SMALL if weights < SMALL else MOST_TOKENS


class Fused:
    """The decoder layers of a language model for a few tokens.

    Attributes:
        most_tokens: up to so many tokens it is the faster way.
    """

    def __init__(self, language: Any) -> None:
        """Look up where the weights lie; they are read anew in each forward.

        Args:
            language: transformers' ``GemmaModel`` for which :func:`can_fuse` holds.
        """
        self._weights = [[layer.get_submodule(part).weight for part in PARTS] for layer in language.layers]
        self.most_tokens = most_tokens(sum(weight.numel() for weight in self._weights[0]))
        self._addresses = np.array([[weight.data_ptr() for weight in layer] for layer in self._weights])
        attention, mlp = language.layers[0].self_attn, language.layers[0].mlp
        self._sizes = (attention.q_proj.out_features // attention.head_dim, mlp.down_proj.in_features)
        self._constants = (float(attention.scaling), float(language.norm.eps))

    def __call__(
        self,
        x_ND: Tensor,
        rotation: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        column_BQ: Tensor,
        limit_BQ: Tensor,
    ) -> Tensor:
        """Hidden states (N, D) behind the last layer.

        Args:
            x_ND: hidden states of the N = B * Q new tokens.
            rotation: cosines and (signed) sines (B, Q, 1, head width).
            cache: keys and values (L, R, C, key heads, head width); written in place.
            column_BQ: cache column of each token.
            limit_BQ: number of columns that it sees; (B, 1) for all of a row.
        """
        _use_threads()
        hidden = _numbers(x_ND).copy()
        rotations = [_numbers(part).reshape(len(hidden), -1) for part in rotation]
        stored = [part.view(STORED[part.dtype]).numpy() for part in cache]
        row = np.arange(len(column_BQ)).repeat(column_BQ.shape[1])
        columns, limits = (part.reshape(-1).numpy() for part in (column_BQ, limit_BQ.expand_as(column_BQ)))
        _layers(hidden, self._addresses, self._sizes, *stored, *rotations, row, columns, limits, self._constants)
        return torch.from_numpy(hidden).to(x_ND.dtype)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Product (..., out) of a few vectors (..., in) with a weight (out, in) for which :func:`can_read` holds."""
    _use_threads()
    numbers = _numbers(x).reshape(-1, x.shape[-1])
    output = np.empty((len(numbers), len(weight)), numbers.dtype)
    like = torch.empty(0, dtype=STORED[x.dtype]).numpy()
    _multiply(numbers, np.array([weight.data_ptr()]), np.array([len(weight)]), output, like)
    return torch.from_numpy(output).to(x.dtype).view(*x.shape[:-1], -1)


def _use_threads() -> None:
    """As many threads as torch uses. When Numba starts its own it changes OpenMP's number, which is torch's, too."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, _config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def _numbers(x: Tensor) -> Any:
    """As the compiled code calculates with them: float32, or float64 if they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).numpy()


@_intrinsic
def _pointer(context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), generate


@_intrinsic
def _as_float(context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@_intrinsic
def _as_bits(context: Any, number: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


def _value(number: Any) -> Any:
    """A stored number as one to calculate with."""


@overload(_value, strict=False)
def _value_of(number: Any) -> Any:
    if isinstance(number, types.Integer):
        return lambda number: _as_float(np.uint32(number) << np.uint32(16))
    return lambda number: number


def _narrow(number: Any, stored: Any) -> Any:
    """A number as it is stored; bfloat16 rounds to the nearest, of two equally near to the even one."""


@overload(_narrow, strict=False)
def _narrow_of(number: Any, stored: Any) -> Any:
    if isinstance(stored.dtype, types.Integer):

        def narrow(number: Any, stored: Any) -> Any:
            if np.isnan(number):
                return np.uint16(0x7FC0)
            bits = _as_bits(np.float32(number))
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

        return narrow
    return lambda number, stored: stored.dtype.type(number)


def _row(address: Any, row: Any, width: Any, stored: Any) -> Any:
    """One row of a weight, bfloat16 in pairs."""


@overload(_row, strict=False)
def _row_of(address: Any, row: Any, width: Any, stored: Any) -> Any:
    if isinstance(stored.dtype, types.Integer):
        return lambda address, row, width, stored: numba.carray(
            _pointer(address + row * width * 2), width // 2, np.uint32
        )
    kind = np.float64 if stored.dtype == types.float64 else np.float32
    size = 8 if stored.dtype == types.float64 else 4
    return lambda address, row, width, stored: numba.carray(_pointer(address + row * width * size), width, kind)


def _dot(row: Any, x: Any) -> Any:
    """Product of a row of a weight and a vector."""


@overload(_dot, strict=False)
def _dot_of(row: Any, x: Any) -> Any:
    if isinstance(row.dtype, types.Integer):

        def dot(row: Any, x: Any) -> Any:
            even, odd = np.float32(0), np.float32(0)
            for i in range(len(row)):
                even += _as_float(row[i] << np.uint32(16)) * x[2 * i]
                odd += _as_float(row[i] & np.uint32(0xFFFF0000)) * x[2 * i + 1]
            return even + odd

        return dot

    def plain(row: Any, x: Any) -> Any:
        total = x.dtype.type(0)
        for i in range(len(row)):
            total += row[i] * x[i]
        return total

    return plain


@njit(**_OPTIONS)
def _round(number: Any, stored: Any) -> Any:
    return _value(_narrow(number, stored))


@njit(parallel=True, **_OPTIONS)
def _multiply(x: Any, addresses: Any, ends: Any, y: Any, stored: Any) -> None:
    """Products (N, out) with the rows of several weights, the last of which end at ``ends``."""
    for out in prange(ends[-1]):
        part, start = 0, 0
        while out >= ends[part]:
            start = ends[part]
            part += 1
        row = _row(addresses[part], out - start, x.shape[1], stored)
        for n in range(len(x)):
            y[n, out] = _round(_dot(row, x[n]), stored)


@njit(**_OPTIONS)
def _norm(x: Any, address: Any, epsilon: Any, y: Any, stored: Any) -> None:
    """Gemma's RMS norm, with weight 1 + w."""
    one = x.dtype.type(1)
    weight = numba.carray(_pointer(address), x.shape[1], stored.dtype)
    for n in range(len(x)):
        total = x.dtype.type(0)
        for i in range(x.shape[1]):
            total += x[n, i] * x[n, i]
        inverse = one / np.sqrt(total / x.dtype.type(x.shape[1]) + x.dtype.type(epsilon))
        for i in range(x.shape[1]):
            y[n, i] = _round(x[n, i] * inverse * (one + _value(weight[i])), stored)


@njit(**_OPTIONS)
def _rotate(x: Any, cos: Any, sin: Any, y: Any, stored: Any) -> None:
    """Rotary embedding; the sines of the first half carry the minus sign."""
    half = len(x) // 2
    for i in range(len(x)):
        other = x[i + half] if i < half else x[i - half]
        y[i] = _round(_round(x[i] * cos[i], stored) + _round(other * sin[i], stored), stored)


@njit(parallel=True, **_OPTIONS)
def _attend(query: Any, keys: Any, values: Any, row: Any, limit: Any, scaling: Any, scores: Any, y: Any) -> None:
    """Attention of queries (N, heads, W) to the first ``limit`` columns of their rows of a layer's cache."""
    heads, width = query.shape[1:]
    group = heads // keys.shape[2]
    for index in prange(query.shape[0] * heads):
        n, head = index // heads, index % heads
        r, shared, own, score, mixed = row[n], head // group, query[n, head], scores[index], y[n, head]
        highest = query.dtype.type(-np.inf)
        for c in range(limit[n]):
            total = query.dtype.type(0)
            for i in range(width):
                total += own[i] * _value(keys[r, c, shared, i])
            score[c] = total * query.dtype.type(scaling)
            highest = max(highest, score[c])
        mass = query.dtype.type(0)
        mixed[:] = 0
        for c in range(limit[n]):
            weight = np.exp(score[c] - highest)
            mass += weight
            for i in range(width):
                mixed[i] += weight * _value(values[r, c, shared, i])
        for i in range(width):
            mixed[i] = _round(mixed[i] / mass, keys)


@njit(**_OPTIONS)
def _add(x: Any, y: Any, stored: Any) -> None:
    for n in range(len(x)):
        for i in range(x.shape[1]):
            x[n, i] = _round(x[n, i] + y[n, i], stored)


@njit(**_OPTIONS)
def _gate(gate_up: Any, y: Any, stored: Any) -> None:
    """GELU (its tanh form) of the first half times the second."""
    kind, width = gate_up.dtype.type, y.shape[1]
    slope, cubic = kind(math.sqrt(2.0 / math.pi)), kind(0.044715)
    for n in range(len(y)):
        for i in range(width):
            x = gate_up[n, i]
            gate = kind(0.5) * x * (kind(1) + math.tanh(slope * (x + cubic * x * x * x)))
            y[n, i] = _round(_round(gate, stored) * gate_up[n, width + i], stored)


@njit(**_OPTIONS)
def _layers(
    x: Any,
    addresses: Any,
    sizes: Any,
    keys: Any,
    values: Any,
    cos: Any,
    sin: Any,
    row: Any,
    column: Any,
    limit: Any,
    constants: Any,
) -> None:
    """All layers over ``x`` (N, D), in place; addresses (L, P) in the order of ``PARTS``."""
    tokens, kind = len(x), x.dtype
    (heads, inner), (key_heads, width), (scaling, epsilon) = sizes, keys.shape[3:], constants
    normed, added = np.empty_like(x), np.empty_like(x)
    joint = np.empty((tokens, heads + 2 * key_heads, width), kind)
    query, mixed = np.empty((tokens, heads, width), kind), np.empty((tokens, heads, width), kind)
    rotated = np.empty(width, kind)
    gate_up, gated = np.empty((tokens, 2 * inner), kind), np.empty((tokens, inner), kind)
    scores = np.empty((tokens * heads, keys.shape[2]), kind)
    x_ends, gate_ends = np.array([x.shape[1]]), np.array([inner, 2 * inner])
    joint_ends = np.array([heads, heads + key_heads, heads + 2 * key_heads]) * width
    for layer in range(len(addresses)):
        own = addresses[layer]
        _norm(x, own[0], epsilon, normed, keys)
        _multiply(normed, own[1:4], joint_ends, joint.reshape(tokens, -1), keys)
        for n in range(tokens):
            for head in range(heads):
                _rotate(joint[n, head], cos[n], sin[n], query[n, head], keys)
            for head in range(key_heads):
                _rotate(joint[n, heads + head], cos[n], sin[n], rotated, keys)
                for i in range(width):
                    keys[layer, row[n], column[n], head, i] = _narrow(rotated[i], keys)
                    values[layer, row[n], column[n], head, i] = _narrow(joint[n, heads + key_heads + head, i], keys)
        _attend(query, keys[layer], values[layer], row, limit, scaling, scores, mixed)
        _multiply(mixed.reshape(tokens, -1), own[4:5], x_ends, added, keys)
        _add(x, added, keys)
        _norm(x, own[5], epsilon, normed, keys)
        _multiply(normed, own[6:8], gate_ends, gate_up, keys)
        _gate(gate_up, gated, keys)
        _multiply(gated, own[8:9], x_ends, added, keys)
        _add(x, added, keys)
