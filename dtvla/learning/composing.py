"""Small tools for composing a training run of its configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dtvla.errors import UserError

if TYPE_CHECKING:
    from dtvla.learning.optim import OptimizerSettings
    from dtvla.policy.model import HybridVLA


def made(cfg: DictConfig, **options: Any) -> Any:
    """What a node with a ``_target_`` describes; a :class:`UserError` comes through as it was raised."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(cfg, **options)
    except InstantiationException as error:
        raise (error.__cause__ if isinstance(error.__cause__, UserError) else error) from None


def plain(cfg: Any) -> Any:
    """The values of a node, with all references resolved; what is no node stays as it is."""
    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg


def check(cfg: DictConfig, *checks: Callable[[], object]) -> None:
    """Check what every training needs, and last of all whether the weights are there that it starts from.

    Args:
        cfg: the whole configuration.
        checks: what this kind of training needs besides; each raises :class:`UserError`.

    Raises:
        UserError: naming everything that is absent or unfit at once.
    """
    from dtvla.data.grouping import Cut
    from dtvla.policy.hub import locate
    from dtvla.policy.quantization import check_bits

    problems: list[str] = []

    def ask(one: Callable[[], object]) -> None:
        try:
            one()
        except UserError as error:
            problems.append(str(error))

    for one in (lambda: optimizer(cfg), lambda: Cut(**passes(cfg)), lambda: check_bits(cfg.model.quantize), *checks):
        ask(one)
    if cfg.model.checkpoint:  # nothing is downloaded for a run that can't begin
        ask(lambda: locate(str(cfg.model.checkpoint), not problems, "model.checkpoint"))
    if problems:
        raise UserError("; and ".join(problems))


def optimizer(cfg: DictConfig) -> OptimizerSettings:
    """Settings of the optimiser; :class:`UserError` when they are impossible."""
    from dtvla.learning.optim import OptimizerSettings

    values = plain(cfg.algorithm.optimizer)
    return OptimizerSettings(**{**values, "betas": tuple(values["betas"])})


def passes(cfg: DictConfig) -> dict[str, Any]:
    """How a batch is cut into forward passes."""
    return {key: cfg.algorithm[key] for key in ("micro_batch_size", "pack_tokens")}


def say(text: str) -> None:
    """Print on one rank."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    if not rank_zero_only.rank:  # type: ignore[attr-defined]
        print(text)


def say_size(name: str, model: HybridVLA) -> None:
    """Print what is trained."""
    from dtvla.policy.quantization import count

    sizes = f"{count(model) / 1e6:.1f} M parameters, {count(model, trainable=True) / 1e6:.1f} M trained"
    say(f"model: {name}, {sizes}")
