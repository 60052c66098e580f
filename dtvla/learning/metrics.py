"""Metrics of supervised training, as exact sums over tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from dtvla.data.normalization import ActionNormalizer
from dtvla.policy.loss import LossSums

POSITION, ROTATION, GRIPPER = slice(0, 3), slice(3, 6), slice(6, 7)


class TokenMetrics(Metric):
    """Loss, token accuracies and action error over everything seen since the last reset.

    The sums add over micro-batches, batches and ranks, so the result does not depend on how samples were grouped.
    Action errors are mean absolute differences between the most likely bin and the true one in the robot's units, as
    LIBERO's controller takes them: one unit is 0.05 m of translation, 0.5 rad of rotation, half the gripper's range.
    """

    full_state_update = False
    scale_D: Tensor
    cross_entropy: Tensor
    tokens: Tensor
    action_cross_entropy: Tensor
    action_correct: Tensor
    action_tokens: Tensor
    thought_cross_entropy: Tensor
    thought_correct: Tensor
    thought_tokens: Tensor
    action_l1_D: Tensor
    action_count: Tensor

    def __init__(self, normalizer: ActionNormalizer) -> None:
        """Start at zero.

        Args:
            normalizer: its scale takes errors from normalised to robot units.
        """
        super().__init__()
        zeros_D, ones_D = torch.zeros(normalizer.action_dim), torch.ones(normalizer.action_dim)
        scale_D = normalizer.unnormalize(ones_D) - normalizer.unnormalize(zeros_D)
        self.register_buffer("scale_D", scale_D.double(), persistent=False)
        for name in LossSums.__dataclass_fields__:
            shape = (normalizer.action_dim,) if name == "action_l1_D" else ()
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: LossSums) -> None:
        """Add the sums of a batch."""
        for name in LossSums.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(sums, name).detach().double())

    def compute(self) -> dict[str, Tensor]:
        """Return loss, accuracies and action errors as float32 scalars."""
        error_D = self.action_l1_D * self.scale_D / self.action_count
        values = {
            "loss": self.cross_entropy / self.tokens,
            "action_loss": self.action_cross_entropy / self.action_tokens,
            "action_accuracy": self.action_correct / self.action_tokens,
            "thought_loss": self.thought_cross_entropy / self.thought_tokens,
            "thought_accuracy": self.thought_correct / self.thought_tokens,
            "action_l1": error_D.mean(),
            "action_l1_position": error_D[POSITION].mean(),
            "action_l1_rotation": error_D[ROTATION].mean(),
            "action_l1_gripper": error_D[GRIPPER].mean(),
        }
        return {name: value.float() for name, value in values.items()}
