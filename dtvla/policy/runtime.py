"""The language model over a static key-value cache, written lean for decoding.

Rows are left-aligned: the n tokens of a row lie in cache columns 0 .. n - 1 without holes, at positions column + 1. The
attention rule of decoding is then one number per query, its *limit*: it sees the columns below. The limit of the prefix
is its length, that of a thought token (or an autoregressive action) its own column + 1, that of the hybrid action block
the block's end. Whatever lies at and beyond a row's length is never seen and is overwritten in time, so a row that is
shorter, done, or has rejected draft tokens needs nothing but its length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from dtvla.errors import UserError
from dtvla.policy import fused, packed
from dtvla.policy.adapters import linear_rows
from dtvla.policy.gemma import compiled, decoder_layer, rms_norm
from dtvla.policy.graphs import Graphs
from dtvla.policy.layout import Layout
from dtvla.policy.model import HybridVLA

Mode = Literal["auto", "eager", "compile", "graph"]
MODES: tuple[str, ...] = get_args(Mode)
Source = Literal["prefix", "tokens", "slots"]
Head = Literal["none", "last", "thought", "action", "logits"]
COLUMN_STEP = {"eager": 64, "compile": 512, "graph": 512}  # caches grow, and compiled code looks, in such steps


@dataclass(frozen=True)
class Forward:
    """What is fixed about a forward over cached rows; a CUDA graph is captured for each.

    Attributes:
        rows: B, the first rows of the cache.
        new: Q, tokens per row.
        columns: T, cache columns that are looked at.
        source: ``prefix`` (images, then ids), ``tokens`` (ids) or ``slots`` (the hybrid action block).
        head: what is returned. ``none``: nothing (an empty tensor). ``last``: hidden states (B, D) of each row's last
            new token. ``thought``, ``action``: float64 (B, Q, 2), the chosen token and its log-probability.
            ``logits``: of the action bins (B, Q, K).
        temperature: of the choice; 0 takes the most likely one.
        masked: False when every query sees all T columns.
    """

    rows: int
    new: int
    columns: int
    source: Source
    head: Head
    temperature: float = 0.0
    masked: bool = True


class Runtime:
    """Runs forwards of a model over its own cache of R rows and C columns."""

    def __init__(self, model: HybridVLA, layout: Layout, mode: Mode = "auto") -> None:
        """Prepare nothing yet: :meth:`refresh` does, before each decision.

        Raises:
            UserError: an unknown mode, or CUDA graphs without a GPU.
        """
        if mode not in MODES:
            raise UserError(f"engine: {mode!r} is unknown; use one of {', '.join(MODES)}")
        self.model, self.layout, self.asked_mode = model, layout, mode
        self.mode = "eager"
        self.keys, self.values = torch.empty(0), torch.empty(0)
        self._graphs: Graphs | None = None
        self._places: int | None = None
        self._state: tuple[object, ...] | None = None
        self._bins = layout.bins

    @property
    def most_columns(self) -> int:
        """The longest row: the positions that the model knows."""
        text: Any = self.model.config.text_config
        return int(text.max_position_embeddings)

    @property
    def rows(self) -> int:
        """Rows R of the cache."""
        return self.keys.shape[1]

    @property
    def columns(self) -> int:
        """Columns C of the cache."""
        return self.keys.shape[2]

    def refresh(self) -> None:
        """Follow the model: where its weights lie, what they are, and whether adapters are on."""
        places = packed.places(self.model)
        if places != self._places:
            self._start()
            self._places, self._state = places, None
        state, before = packed.state(self.model), self._state
        self._state = state
        if self.device.type == "cpu" and state != before:
            self._pack()
        if self._graphs is not None and before is not None and state[1] != before[1]:
            self._graphs.clear()  # captured with other adapters; weights written in place they read anew

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for so many rows and columns; what is cached stays."""
        step = COLUMN_STEP[self.mode]
        rows, columns = max(self.rows, power_of_two(rows)), max(self.columns, -(-columns // step) * step)
        if (rows, columns) == (self.rows, self.columns):
            return
        layers, old_rows, old_columns, heads, width = self.keys.shape
        old, shape = (self.keys, self.values), (layers, rows, columns, heads, width)
        self.keys, self.values = (torch.zeros(shape, dtype=t.dtype, device=t.device) for t in old)
        self.keys[:, :old_rows, :old_columns], self.values[:, :old_rows, :old_columns] = old
        self._offsets = torch.arange(columns, device=self.device)
        positions = self._offsets[None] + 1
        cos, sin = self._language.rotary_emb(self.values[0, :1, :, 0], positions)
        half = sin.shape[-1] // 2
        self._cos, self._sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
        if self._graphs is not None:
            self._graphs.clear()

    def swap(self, row: int, other: int) -> None:
        """Exchange two rows of the cache."""
        for cache in (self.keys, self.values):
            cache[:, [row, other]] = cache[:, [other, row]]

    def images(self, pixels_BNCHW: Tensor) -> Tensor:
        """Image tokens (B, I, D)."""
        embed = self._twin.embed_images
        if self._graphs is None:
            return embed(pixels_BNCHW.to(self.device))
        return self._graphs.run(("images", pixels_BNCHW.shape), embed, pixels_BNCHW)

    def forward(
        self,
        plan: Forward,
        ids: Sequence[Sequence[int]],
        starts: Sequence[int],
        lengths: Sequence[int],
        *,
        images_BID: Tensor | None = None,
        uniforms: Sequence[Sequence[float]] | None = None,
    ) -> Tensor:
        """Run new tokens through the model and into the cache.

        Args:
            plan: what is fixed. ``new`` may exceed a row's ids: the rest is filler that no row ever sees.
            ids: of each row, without those of the images; unused for ``slots``.
            starts: cache column of each row's first new token, which is the row's length.
            lengths: new tokens of each row, images included.
            images_BID: of a prefix.
            uniforms: numbers in [0, 1) per row and token; needed with a temperature.
        """
        width = plan.new - (0 if images_BID is None else images_BID.shape[1])
        pad = self.layout.vocabulary.pad_id
        rows = [[*own, *[pad] * (width - len(own))] for own in ids]
        rows = [[*own, start, length] for own, start, length in zip(rows, starts, lengths, strict=True)]
        inputs = [torch.tensor(rows)]
        if images_BID is not None:
            inputs.append(images_BID)
        if uniforms is not None:
            inputs.append(
                torch.tensor([[*own, *[0.0] * (plan.new - len(own))] for own in uniforms], dtype=torch.float64)
            )
        if self._graphs is not None:
            return self._graphs.run((plan, width), lambda *tensors: self._forward(plan, *tensors), *inputs)
        return self._forward(plan, *(tensor.to(self.device) for tensor in inputs))

    def thought_choices(self, hidden_BQD: Tensor, temperature: float, uniform_BQ: Tensor | None) -> Tensor:
        """Choose thought tokens: float64 (B, Q, 2) of id and log-probability.

        The action band is left out of the product, eos is banned, and log-probabilities are normalised over the rest.
        """
        first, count = self._bins.first_id, self._bins.count
        logits_BQV = torch.cat([_wide(self._low_head(hidden_BQD)), _wide(self._high_head(hidden_BQD))], dim=-1)
        eos = self.layout.vocabulary.eos_id
        logits_BQV[..., eos if eos < first else eos - count] = -torch.inf
        choices_BQ2 = choose(logits_BQV, temperature, uniform_BQ)
        choices_BQ2[..., 0] += count * (choices_BQ2[..., 0] >= first)
        return choices_BQ2

    def _forward(self, plan: Forward, numbers_BX: Tensor, *more: Tensor) -> Tensor:
        """The forward itself: tensors only, so that it can be captured."""
        images_BID = more[0] if plan.source == "prefix" else None
        uniform_BQ = more[-1] if plan.temperature > 0 else None
        ids_BT, start_B1, length_B1 = numbers_BX[:, :-2], numbers_BX[:, -2:-1], numbers_BX[:, -1:]
        column_BQ = start_B1 + self._offsets[: plan.new]
        limit = column_BQ + 1 if plan.source == "tokens" else start_B1 + length_B1
        rotation = (self._cos[column_BQ].unsqueeze(2), self._sin[column_BQ].unsqueeze(2))
        x_ND = self._embed(plan, ids_BT, images_BID).flatten(0, 1)
        if self._fused is not None and len(x_ND) <= self._fused.most_tokens:
            x_ND = self._fused(x_ND, rotation, (self.keys, self.values), column_BQ, limit)
        else:
            bias = _bias(limit, plan, self._group, self.keys.dtype)
            place_N = (column_BQ + torch.arange(plan.rows, device=self.device).unsqueeze(1) * self.columns).flatten()
            caches = zip(self.keys.unbind(0), self.values.unbind(0), strict=True)
            for layer, cache in zip(self._language.layers, caches, strict=True):
                x_ND = self._layer(layer, x_ND, rotation, cache, place_N, bias, plan.rows, plan.columns)
        hidden_BQD = rms_norm(self._language.norm, x_ND).unflatten(0, (plan.rows, plan.new))
        return self._head(plan, hidden_BQD, length_B1, uniform_BQ)

    def _embed(self, plan: Forward, ids_BT: Tensor, images_BID: Tensor | None) -> Tensor:
        if plan.source == "slots":
            block_BQ = self._block.expand(plan.rows, -1)
            return self._twin.embed_text(block_BQ, self._block_slots.expand(plan.rows, -1))
        text_BTD = self._twin.embed_text(ids_BT, None)
        return text_BTD if images_BID is None else torch.cat([images_BID.to(text_BTD.dtype), text_BTD], dim=1)

    def _head(self, plan: Forward, hidden_BQD: Tensor, length_B1: Tensor, uniform_BQ: Tensor | None) -> Tensor:
        if plan.head == "none":
            return hidden_BQD.new_empty(0)
        if plan.head == "last":
            index = (length_B1 - 1).unsqueeze(-1).expand(-1, -1, hidden_BQD.shape[-1])
            return hidden_BQD.gather(1, index)[:, 0]
        if plan.head == "thought":
            return self.thought_choices(hidden_BQD, plan.temperature, uniform_BQ)
        if plan.source == "slots":
            hidden_BQD = hidden_BQD[:, : self.layout.slots]
        logits_BAK = _wide(self._action_head(hidden_BQD)).flip(-1)
        return logits_BAK if plan.head == "logits" else choose_bins(logits_BAK, plan.temperature, uniform_BQ)

    def _start(self) -> None:
        """Set up everything that depends on where the weights lie."""
        text: Any = self.model.config.text_config
        weight_VD = self.model.lm_head.weight
        self.device = weight_VD.device
        self.mode = self._choose_mode()
        self._group = text.num_attention_heads // text.num_key_value_heads
        shape = (text.num_hidden_layers, 0, 0, text.num_key_value_heads, text.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=weight_VD.dtype, device=self.device) for _ in range(2))
        self._graphs = Graphs(self.device) if self.mode == "graph" else None
        self._layer: Callable[..., Tensor] = decoder_layer if self.mode == "eager" else compiled(self.device)
        block = self.layout.act_block()
        self._block = torch.tensor([block], device=self.device)
        self._block_slots = torch.zeros_like(self._block, dtype=torch.bool)
        self._block_slots[:, 1 : 1 + self.layout.slots] = True
        self._fused: fused.Fused | None = None
        self._twin: Any = self.model
        self._language: Any = self.model.model.language_model
        self._heads()

    def _pack(self) -> None:
        """Renew the CPU's fast copy of the weights."""
        plain = type(self.model.lm_head) is nn.Linear
        self._twin = packed.twin(self.model, keep=self.model.lm_head if plain else None)
        self._language = self._twin.model.language_model
        language: Any = self.model.model.language_model
        self._fused = fused.Fused(language) if self.mode == "eager" and fused.can_fuse(language) else None
        self._heads()

    def _heads(self) -> None:
        """Split the output layer in the ids below the action band, those above it, and the band.

        For a thought, an output layer with an adapter is computed whole.
        """
        first, last, head = self._bins.first_id, self._bins.last_id, self._twin.lm_head
        parts = (slice(0, first), slice(last + 1, None), slice(first, last + 1))
        products: list[Callable[[Tensor], Tensor]]
        if type(self.model.lm_head) is nn.Linear:
            products = [_Product(self.model.lm_head.weight[part]) for part in parts]
        else:
            products = [lambda x, part=part: head(x)[..., part] for part in parts[:2]]  # type: ignore[misc]
            products.append(lambda x: linear_rows(head, x, first, last))
        self._low_head, self._high_head, self._action_head = products

    def _choose_mode(self) -> str:
        on_gpu = self.device.type == "cuda"
        if self.asked_mode == "graph" and not on_gpu:
            raise UserError(f"engine: graph needs a GPU, the model is on {self.device}; use auto or compile")
        if self.asked_mode != "auto":
            return self.asked_mode
        floats = all(parameter.is_floating_point() for parameter in self.model.parameters())
        return "graph" if on_gpu and floats else "eager"  # quantised layers decide on the host


class _Product:
    """A product with rows of a weight that others own, the faster way for the number of vectors."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.detach()
        self._few = fused.most_tokens(weight.numel()) if fused.can_read(weight) else 0
        self._packed = packed.PackedLinear(self._weight) if packed.can_pack(weight) else None

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() <= self._few * x.shape[-1]:
            return fused.product(x, self._weight)
        return functional.linear(x, self._weight) if self._packed is None else self._packed(x)


def choose(logits_BQV: Tensor, temperature: float, uniform_BQ: Tensor | None) -> Tensor:
    """Choose a column per position, the most likely one or by inverting the cumulative distribution.

    Args:
        logits_BQV: of any type.
        temperature: of the distribution; 0 is greedy, with log-probabilities of temperature 1.
        uniform_BQ: numbers in [0, 1), float64; needed with a temperature.

    Returns:
        float64 (B, Q, 2): the column and its log-probability.
    """
    if temperature > 0 and uniform_BQ is None:
        raise ValueError("sampling needs a random number per token")
    scaled_BQV = logits_BQV / temperature if temperature > 0 else logits_BQV
    if temperature > 0 and uniform_BQ is not None:
        cumulative_BQV = scaled_BQV.double().softmax(-1).cumsum(-1)
        threshold_BQ1 = (uniform_BQ * cumulative_BQV[..., -1]).unsqueeze(-1)
        chosen_BQ1 = torch.searchsorted(cumulative_BQV, threshold_BQ1, right=True).clamp(max=scaled_BQV.shape[-1] - 1)
    else:
        chosen_BQ1 = scaled_BQV.argmax(-1, keepdim=True)
    log_prob_BQ1 = scaled_BQV.gather(-1, chosen_BQ1) - scaled_BQV.logsumexp(-1, keepdim=True)
    return torch.cat([chosen_BQ1.double(), log_prob_BQ1.double()], dim=-1)


def choose_bins(logits_BAK: Tensor, temperature: float, uniform_BA: Tensor | None) -> Tensor:
    """As :func:`choose`, for action bins: of equally likely ones the highest, as ``ActionBins.most_likely``."""
    choices_BA2 = choose(logits_BAK.flip(-1), temperature, uniform_BA)
    choices_BA2[..., 0] = logits_BAK.shape[-1] - 1 - choices_BA2[..., 0]
    return choices_BA2


def _bias(limit: Tensor, plan: Forward, group: int, dtype: torch.dtype) -> Tensor | None:
    """0 where a query sees a column and -inf elsewhere (B, 1, Q * group, T), from limits (B, Q) or (B, 1)."""
    if not plan.masked:
        return None
    seen = torch.arange(plan.columns, device=limit.device) < limit.unsqueeze(-1)
    bias = torch.zeros(seen.shape, dtype=dtype, device=limit.device).masked_fill(~seen, -torch.inf)
    return bias.expand(-1, plan.new, -1).repeat_interleave(group, dim=1).unsqueeze(1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << max(number - 1, 0).bit_length()
