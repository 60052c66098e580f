"""The frozen policy that reinforcement learning must not stray from.

An adapted model is its own reference with the adapter switched off, at no cost. Otherwise a copy is kept, which is
shared out over ranks as the trained weights are. A reference is no part of the module in training: no optimiser and no
checkpoint knows it, and a resumed run makes it anew of the same starting policy.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dtvla.errors import UserError, check_keys
from dtvla.learning.sharding import shard
from dtvla.policy import adapters, quantization

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from dtvla.policy.model import HybridVLA
    from dtvla.policy.policy import Policy


@dataclass(frozen=True)
class ReferenceSettings:
    """How the reference is kept.

    Attributes:
        checkpoint: folder or hub id of another policy than the one that training starts from; None for that one.
        offload: keep a copy in main memory, and on the device only while it is asked.
        quantize: keep a copy's weights in fewer bits: None, "8bit", "4bit".
    """

    checkpoint: str | None = None
    offload: bool = False
    quantize: str | None = None

    def __post_init__(self) -> None:
        """Check the values; :class:`UserError`."""
        quantization.check_bits(self.quantize, "algorithm.reference.quantize")
        if self.quantize is not None and self.offload:
            raise UserError("algorithm.reference: quantize and offload are both set; choose one")

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ReferenceSettings:
        """Read the ``algorithm.reference`` mapping; :class:`UserError` for unknown settings."""
        check_keys("algorithm.reference", values, list(ReferenceSettings.__dataclass_fields__))
        return ReferenceSettings(**values)


class Reference:
    """A frozen policy. Make it before the trained weights are shared out or changed."""

    def __init__(self, policy: Policy, settings: ReferenceSettings) -> None:
        """Remember the policy as it is now, or read the one that the settings name.

        Args:
            policy: whose model is about to be trained.
            settings: of the reference.

        Raises:
            UserError: the other policy reads or writes other tokens, or settings do not suit the device.
        """
        self.settings = settings
        self._trained = policy.model
        self._sharded = False
        self._copy: HybridVLA | None = None
        if settings.checkpoint is not None:
            self._copy = _other(policy, settings.checkpoint)
        elif not adapters.has_adapter(policy.model):
            self._copy = copy.deepcopy(policy.model)
        elif settings.offload or settings.quantize:
            raise UserError(
                "algorithm.reference: with an adapter the reference is the model without it, which takes no memory; "
                "set offload=false and quantize=null"
            )
        if self._copy is not None:
            self._copy.requires_grad_(False).eval()
            if settings.quantize is not None:
                quantization.quantize(self._copy, settings.quantize)

    def share_out(self, mesh: DeviceMesh, precision: str) -> None:
        """Shard a copy's weights over ranks; see :func:`dtvla.learning.sharding.shard`."""
        if self._copy is not None:
            shard(self._copy, mesh, precision, offload=self.settings.offload)
            self._sharded = True

    @contextmanager
    def lent(self) -> Iterator[HybridVLA]:
        """The reference model on the device of the trained one, for forwards without gradients."""
        if self._copy is None:
            with adapters.disabled(self._trained):
                yield self._trained
            return
        if not self._sharded:  # else each layer moves by itself
            nn.Module.to(self._copy, self._trained.device)
        try:
            yield self._copy
        finally:
            if self.settings.offload and not self._sharded:
                nn.Module.to(self._copy, "cpu")


def _other(policy: Policy, checkpoint: str) -> HybridVLA:
    """The model of another policy that reads and writes the same tokens.

    Raises:
        UserError: it does not; the message says in what they differ.
    """
    from dtvla.policy.policy import Policy

    other = Policy.load(checkpoint, dtype=torch.float32)
    own, found = (_language(p) for p in (policy, other))
    differing = [f"{name} ({found[name]}, trained: {own[name]})" for name in own if own[name] != found[name]]
    if differing:
        raise UserError(
            f"algorithm.reference.checkpoint: {checkpoint} is not comparable with the trained policy: other "
            f"{', '.join(differing)}; use a policy with the same tokens and pictures, or null"
        )
    return other.model


def _language(policy: Policy) -> dict[str, Any]:
    """What two policies must share for the log-probabilities of one's tokens under the other to mean anything."""
    layout, images = policy.processor.layout, policy.processor.images
    return {
        "image tokens": layout.image_tokens,
        "picture size": images.image_size,
        "cameras": ", ".join(images.cameras),
        "chunk": layout.chunk,
        "action dimensions": layout.action_dim,
        "vocabulary": f"{layout.vocabulary.size} tokens, {_digest(repr(layout.vocabulary))}",
        "tokenizer": _digest(layout.tokenizer.backend_tokenizer.to_str()),
        "decoder": policy.model.decoder,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
