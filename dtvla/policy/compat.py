"""Behaviour of the published system that is off by default, because it is a defect, and can be asked for.

Checkpoints do not depend on these settings; ``action_decode`` is remembered by a policy that is saved with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, get_args

from dtvla.errors import UserError, check_keys
from dtvla.policy.action_bins import DecodeMode

if TYPE_CHECKING:
    from dtvla.policy.policy import Policy


@dataclass(frozen=True)
class Compat:
    """The ``compat`` group of the configuration.

    Attributes:
        action_decode: how action ids become values, see :class:`~dtvla.policy.action_bins.ActionBins`; None keeps
            what the policy has.
        pads_visible: whether a batch's padding is seen and counted, see :class:`~dtvla.policy.attention.Rule`. It
            concerns whole sequences (training and scoring); decisions pad nothing and must be asked one by one.
    """

    action_decode: DecodeMode | None = None
    pads_visible: bool = False

    def __post_init__(self) -> None:
        """Refuse unknown values."""
        modes = get_args(DecodeMode)
        if self.action_decode is not None and self.action_decode not in modes:
            raise UserError(f"compat.action_decode: {self.action_decode!r} is unknown; use null, {' or '.join(modes)}")
        if not isinstance(self.pads_visible, bool):
            raise UserError(f"compat.pads_visible: {self.pads_visible!r} is neither true nor false; use one of them")

    @classmethod
    def from_config(cls, settings: Mapping[str, Any]) -> Compat:
        """From the ``compat`` group; :class:`UserError` for a key it does not have."""
        check_keys("compat", settings, [field.name for field in fields(cls)])
        return cls(**dict(settings))


def apply(policy: Policy, compat: Compat) -> None:
    """Set a policy's behaviour, in place."""
    if compat.action_decode is not None:
        layout = policy.processor.layout
        layout.bins = layout.vocabulary.bins(compat.action_decode)
    policy.model.pads_visible = compat.pads_visible
