"""What a GRPO training run is made of."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from omegaconf import DictConfig

from dtvla.errors import UserError
from dtvla.learning.composing import check, made, optimizer, passes, plain, say_size

if TYPE_CHECKING:
    from dtvla.learning.group_data import GroupDataModule
    from dtvla.learning.grpo import GRPOModule
    from dtvla.learning.iteration import Recipe
    from dtvla.learning.objective import Objective
    from dtvla.learning.reference import Reference
    from dtvla.policy.policy import Policy


def open_inputs(cfg: DictConfig) -> GroupDataModule:
    """Check the settings, and look for the weights that training starts from.

    Raises:
        UserError: naming everything that is absent or unfit at once.
    """
    from dtvla.learning.group_data import GroupDataModule
    from dtvla.learning.reference import ReferenceSettings

    data = made(cfg.data)
    if not isinstance(data, GroupDataModule):
        raise UserError("data: GRPO learns from its own episodes; use data=rollouts")
    check(
        cfg,
        lambda: _check_steps(cfg, data),
        lambda: _objective(cfg),
        lambda: ReferenceSettings.from_dict(plain(cfg.algorithm.reference)),
        lambda: _check_start(cfg),
    )
    return data


def module(cfg: DictConfig, data: GroupDataModule, start_step: int) -> GRPOModule:
    """The policy in training, its reference, and where its episodes come from."""
    from dtvla.data.grouping import Cut
    from dtvla.learning.grpo import GRPOModule, Stop
    from dtvla.policy import compat
    from dtvla.policy.policy import build_policy

    policy = build_policy(plain(cfg.model))
    compat.apply(policy, compat.Compat.from_config(plain(cfg.compat)))
    data.start_step = start_step
    limit = cfg.algorithm.stop_at_log_ratio
    result = GRPOModule(
        policy,
        optimizer(cfg),
        data,
        recipe=_recipe(cfg),
        objective=_objective(cfg),
        cut=Cut(**passes(cfg)),
        stop=Stop(None if limit is None else float(limit), Path(str(cfg.run.folder)) / "stopped"),
        reference=_reference(cfg, policy),
        seed=int(cfg.seed),
    )
    say_size(cfg.model.name, result.model)
    return result


def _recipe(cfg: DictConfig) -> Recipe:
    from dtvla.learning.iteration import Recipe

    algorithm = cfg.algorithm
    return Recipe(
        ppo_epochs=int(algorithm.ppo_epochs),
        mini_batches=int(algorithm.mini_batches),
        success_reward=float(algorithm.reward.success),
        format_reward=float(algorithm.reward.format),
        normalize=bool(algorithm.advantage.normalize),
        epsilon=float(algorithm.advantage.epsilon),
        weighting=str(algorithm.loss.weighting),
        constant=float(algorithm.loss.constant),
        kl_in_reward=float(algorithm.kl.weight) if algorithm.kl.place == "reward" else 0.0,
        kl_target=None if algorithm.kl.target is None else float(algorithm.kl.target),
        seed=int(cfg.seed),
    )


def _objective(cfg: DictConfig) -> Objective:
    from dtvla.learning.objective import Objective

    loss, kl = cfg.algorithm.loss, cfg.algorithm.kl
    if kl.place not in ("loss", "reward"):
        raise UserError(f"algorithm.kl.place: {kl.place!r} is unknown; use loss or reward")
    if kl.target is not None and (kl.place != "loss" or not kl.weight):
        raise UserError(
            "algorithm.kl.target: adapts the weight of a KL term in the loss; set place=loss and weight > 0"
        )
    return Objective(
        clip_low=float(loss.clip_low),
        clip_high=float(loss.clip_high),
        dual_clip=None if loss.dual_clip is None else float(loss.dual_clip),
        kl_weight=float(kl.weight) if kl.place == "loss" else 0.0,
        kl_estimator=str(kl.estimator),
        entropy_weight=float(loss.entropy),
    )


def _reference(cfg: DictConfig, policy: Policy) -> Reference | None:
    from dtvla.learning.reference import Reference, ReferenceSettings

    if not cfg.algorithm.kl.weight:
        return None
    return Reference(policy, ReferenceSettings.from_dict(plain(cfg.algorithm.reference)))


def _check_start(cfg: DictConfig) -> None:
    if not cfg.model.checkpoint:
        raise UserError(
            "model.checkpoint: null, but GRPO refines a trained policy; name its folder, such as that of "
            "dtvla train +experiment=libero_cot_sft"
        )


def _check_steps(cfg: DictConfig, data: GroupDataModule) -> None:
    """Refuse a training that would end within an iteration, and mini-batches without episodes."""
    from dtvla.learning.advantages import token_weights

    recipe, episodes = _recipe(cfg), data.settings.groups * data.settings.group_size
    token_weights(np.ones(episodes), recipe.weighting, recipe.constant)
    if recipe.mini_batches > episodes:
        raise UserError(
            f"algorithm.mini_batches: {recipe.mini_batches} of {episodes} episodes (data.groups x data.group_size); "
            "give at most as many"
        )
    steps = int(cfg.trainer.max_steps)
    if steps % recipe.steps:
        whole = steps // recipe.steps + 1
        raise UserError(
            f"trainer.max_steps: {steps} is not a multiple of the {recipe.steps} steps of an iteration "
            f"(algorithm.ppo_epochs x algorithm.mini_batches); use {whole * recipe.steps} for {whole} iterations"
        )
