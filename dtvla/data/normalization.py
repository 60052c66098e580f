"""Statistics of a dataset and the map between robot units and the policy's [-1, 1]."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from dtvla.data.summaries import describe
from dtvla.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

FIELDS = ("mean", "std", "min", "max", "q01", "q99")
REQUIRED_FIELDS = ("mean", "std", "q01", "q99")  # what the published norm_stats.json holds
EPSILON = 1e-8
OUTSIDE_AT_MOST = 0.2  # share of a dimension's values; of data that the statistics belong to it is 0.02 or 0
LIBERO_MASK_D = (True, True, True, True, True, True, False)

Method = Literal["quantile", "min_max", "mean_std"]
BOUNDS = {"quantile": ("q01", "q99"), "min_max": ("min", "max"), "mean_std": ("mean", "std")}


@dataclass(frozen=True)
class Statistics:
    """Per-dimension statistics of ``state`` and ``action`` in robot units, as float64 tuples.

    ``min`` and ``max`` may be absent in files from elsewhere.
    """

    state: Mapping[str, tuple[float, ...]]
    action: Mapping[str, tuple[float, ...]]

    @classmethod
    def from_frames(cls, state_FD: np.ndarray, action_FD: np.ndarray) -> Statistics:
        """Exact statistics over all frames F (quantiles by linear interpolation, as numpy computes them)."""
        return cls(state=_describe(state_FD), action=_describe(action_FD))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "statistics") -> Statistics:
        """Read the published layout, or openpi's (nested under ``norm_stats``, key ``actions``).

        Args:
            values: parsed JSON.
            source: what to name in an error.

        Raises:
            UserError: a group or field is missing, lengths differ, a value is not finite, a lower bound lies above
                its upper one, or a standard deviation is negative.
        """
        nested = values.get("norm_stats", values)
        groups = {"state": nested.get("state"), "action": nested.get("action", nested.get("actions"))}
        read: dict[str, dict[str, tuple[float, ...]]] = {}
        for group, fields in groups.items():
            if not isinstance(fields, Mapping) or any(name not in fields for name in REQUIRED_FIELDS):
                wanted = ", ".join(REQUIRED_FIELDS)
                raise UserError(f"{source}: no complete {group!r} statistics; it needs the lists {wanted}")
            present = [name for name in FIELDS if name in fields]
            read[group] = {name: _vector(fields[name], f"{source}: {group}.{name}") for name in present}
            if len({len(vector) for vector in read[group].values()}) != 1:
                raise UserError(f"{source}: the lists under {group!r} differ in length; compute the statistics anew")
            _check_bounds(read[group], f"{source}: {group}")
        return cls(state=read["state"], action=read["action"])

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read a ``norm_stats.json``; :class:`UserError` when it is absent or malformed."""
        try:
            values = json.loads(Path(path).read_text())
        except FileNotFoundError:
            raise UserError(f"{path}: not found; collect the dataset again or copy the file from its source") from None
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}); copy the file anew") from None
        return cls.from_dict(values, source=str(path))

    def save(self, path: Path) -> None:
        """Write the published JSON layout, atomically."""
        temporary = Path(f"{path}.tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        os.replace(temporary, path)

    def to_dict(self) -> dict[str, dict[str, list[float]]]:
        """``{"state": {"mean": [...], ...}, "action": {...}}``."""
        groups = {"state": self.state, "action": self.action}
        return {key: {name: list(vector) for name, vector in group.items()} for key, group in groups.items()}

    def digest(self) -> str:
        """sha256 over the values: equal for equal statistics, whatever file they came from."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


class ActionNormalizer:
    """Maps actions between robot units and the policy's range (``reference``: QUANTILE for LIBERO).

    ``quantile``: y = clamp(2 (x - q01) / (q99 - q01 + 1e-8) - 1, -1, 1), inverse
    x = 0.5 (y + 1)(q99 - q01 + 1e-8) + q01; ``min_max`` the same with min and max; ``mean_std``:
    y = (x - mean) / (std + 1e-8), without a clamp. Dimensions whose mask is False (LIBERO's gripper) pass through
    untouched.
    """

    def __init__(
        self, statistics: Statistics, method: Method = "quantile", mask_D: Sequence[bool] = LIBERO_MASK_D
    ) -> None:
        """Precompute scale and offset.

        Args:
            statistics: of the training data.
            method: see the class.
            mask_D: which action dimensions are normalised.

        Raises:
            UserError: unknown method, statistics without the needed fields, or another number of dimensions.
        """
        self.statistics, self.method, self.mask_D = statistics, method, tuple(bool(flag) for flag in mask_D)
        if method not in BOUNDS:
            raise UserError(f"normalizer: unknown method {method!r}; use one of {', '.join(BOUNDS)}")
        if any(name not in statistics.action for name in BOUNDS[method]):
            raise UserError(f"normalizer: {method} needs {' and '.join(BOUNDS[method])}, absent from the statistics")
        first, second = (np.asarray(statistics.action[name], dtype=np.float64) for name in BOUNDS[method])
        mask = np.asarray(self.mask_D)
        if len(first) != len(mask):
            raise UserError(f"normalizer: statistics have {len(first)} action dimensions, the mask {len(mask)}")
        if method == "mean_std":
            offset, scale = first, second + EPSILON
        else:
            scale = (second - first + EPSILON) / 2
            offset = first + scale
        self._offset_D = np.where(mask, offset, 0.0)
        self._scale_D = np.where(mask, scale, 1.0)
        self._limit_D = np.where(mask & (method != "mean_std"), 1.0, np.inf)

    @property
    def action_dim(self) -> int:
        """Number of action dimensions D."""
        return len(self.mask_D)

    @overload
    def normalize(self, actions: np.ndarray) -> np.ndarray: ...
    @overload
    def normalize(self, actions: Tensor) -> Tensor: ...
    def normalize(self, actions: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Robot units (..., D) to the policy's range, float32 (a tensor keeps its device)."""
        if not isinstance(actions, np.ndarray):
            offset, scale, limit = (self._constant(c, actions) for c in (self._offset_D, self._scale_D, self._limit_D))
            return ((actions.double() - offset) / scale).clamp(-limit, limit).float()
        scaled = (np.asarray(actions, dtype=np.float64) - self._offset_D) / self._scale_D
        return np.clip(scaled, -self._limit_D, self._limit_D).astype(np.float32)

    @overload
    def unnormalize(self, actions: np.ndarray) -> np.ndarray: ...
    @overload
    def unnormalize(self, actions: Tensor) -> Tensor: ...
    def unnormalize(self, actions: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """The policy's range (..., D) to robot units, float32 (a tensor keeps its device)."""
        if not isinstance(actions, np.ndarray):
            offset, scale = (self._constant(c, actions) for c in (self._offset_D, self._scale_D))
            return (actions.double() * scale + offset).float()
        return (np.asarray(actions, dtype=np.float64) * self._scale_D + self._offset_D).astype(np.float32)

    def check_fit(self, action_FD: np.ndarray, source: str) -> list[str]:
        """Refuse statistics of other data: the policy would learn actions that are cut off.

        Args:
            action_FD: all actions, robot units.
            source: what to name in messages: where the statistics are from, and the data.

        Returns:
            Remarks for the user on normalised dimensions that never move, or so rarely that their motion is lost.

        Raises:
            UserError: another number of dimensions, or more than a fifth of a normalised dimension out of range.
        """
        if action_FD.shape[1] != self.action_dim:
            raise UserError(f"{source}: {action_FD.shape[1]} action dimensions, the statistics have {self.action_dim}")
        limit = 3.0 if self.method == "mean_std" else 1.0
        still_D = self._scale_D <= EPSILON
        rounding_D = 1e-6 * (1 + np.abs(self._offset_D))  # of single precision, which counts where a range is narrow
        beyond_FD = np.abs(action_FD - self._offset_D) > limit * self._scale_D + rounding_D
        outside_D = beyond_FD.mean(0)
        few = 2 / len(action_FD)  # frames outside of their own quantiles, at least
        remarks = []
        for dim in np.flatnonzero(self.mask_D).tolist():
            share = outside_D[dim]
            if share > OUTSIDE_AT_MOST + few:
                raise UserError(
                    f"{source}: {share:.0%} of action dimension {dim} lies outside the range of the statistics "
                    f"({self._bounds(dim)}), so they belong to other data or other units; use this dataset's own "
                    "(delete its meta/norm_stats.json to have them computed), or the dataset that they were made from"
                )
            if still_D[dim]:
                value = f"{float(self.statistics.action['mean'][dim]):.4g}"
                moving = f"in {share:.2%} of the frames it moves, and these motions are cut off" if share else ""
                note = f"; {moving}: model.normalizer=min_max keeps them" if moving else ", and so will the policy's"
                remarks.append(f"{source}: action dimension {dim} stays at {value}{note}")
        return remarks

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint, statistics and their digest included."""
        return {
            "method": self.method,
            "mask": list(self.mask_D),
            "statistics": self.statistics.to_dict(),
            "digest": self.statistics.digest(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "normalizer") -> ActionNormalizer:
        """Inverse of :meth:`to_dict`; :class:`UserError` when the digest does not belong to the statistics."""
        statistics = Statistics.from_dict(values["statistics"], source=source)
        if statistics.digest() != values["digest"]:
            raise UserError(f"{source}: the statistics do not match their digest; the file was edited, restore it")
        return cls(statistics, values["method"], values["mask"])

    def _bounds(self, dim: int) -> str:
        """What the range of a dimension is made of, in words."""
        names = BOUNDS[self.method]
        return ", ".join(f"{name} {self.statistics.action[name][dim]:.4g}" for name in names)

    @staticmethod
    def _constant(values_D: np.ndarray, like: Tensor) -> Tensor:
        import torch

        return torch.from_numpy(values_D).to(like.device)


def _describe(frames_FD: np.ndarray) -> dict[str, tuple[float, ...]]:
    return {name: tuple(row) for name, row in describe(frames_FD, published=True).items()}


def _check_bounds(group: Mapping[str, tuple[float, ...]], source: str) -> None:
    for low, high in (("q01", "q99"), ("min", "max")):
        for dim, (a, b) in enumerate(zip(group.get(low, ()), group.get(high, ()), strict=False)):
            if a > b:
                raise UserError(f"{source}: {low} {a:.4g} above {high} {b:.4g} in dimension {dim}; compute them anew")
    for dim, value in enumerate(group["std"]):
        if value < 0:
            raise UserError(f"{source}: negative std {value:.4g} in dimension {dim}; compute the statistics anew")


def _vector(values: Any, source: str) -> tuple[float, ...]:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{source}: not a list of numbers; compute the statistics anew") from None
    if array.ndim != 1 or not np.isfinite(array).all():
        raise UserError(f"{source}: not a list of finite numbers; compute the statistics anew")
    return tuple(array.tolist())
