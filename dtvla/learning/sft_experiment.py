"""What a supervised training run is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from dtvla.errors import UserError
from dtvla.kinds import check_kinds
from dtvla.learning.composing import check, made, optimizer, passes, plain, say, say_size

if TYPE_CHECKING:
    from dtvla.data.datamodule import DemonstrationDataModule
    from dtvla.learning.sft import SFTModule


def open_inputs(cfg: DictConfig) -> DemonstrationDataModule:
    """Check the settings, open the dataset, and look for the weights that training starts from.

    Raises:
        UserError: naming everything that is absent or unfit at once.
    """
    data: DemonstrationDataModule = made(cfg.data)
    check(cfg, lambda: _check_start(cfg), lambda: data.demonstrations)
    return data


def module(cfg: DictConfig, data: DemonstrationDataModule, start_step: int) -> SFTModule:
    """The policy in training, and the data made ready for it."""
    from dtvla.learning.sft import SFTModule
    from dtvla.policy import compat
    from dtvla.policy.policy import build_policy

    demonstrations, acts = data.demonstrations, cfg.algorithm.loss.actions
    say(f"data: {demonstrations.root}, {demonstrations.episodes} episodes, {len(demonstrations)} frames")
    policy = build_policy(plain(cfg.model), demonstrations.texts(), demonstrations.statistics)
    compat.apply(policy, compat.Compat.from_config(plain(cfg.compat)))
    for remark in data.attach(policy.processor, start_step, acts=acts, **passes(cfg)):
        say(remark)
    result = SFTModule(
        policy,
        optimizer(cfg),
        data_fingerprint=demonstrations.fingerprint,
        seed=int(cfg.seed),
        action_smoothing_bins=float(cfg.algorithm.loss.action_smoothing_bins),
        acts=acts,
    )
    say_size(cfg.model.name, result.model)
    return result


def _check_start(cfg: DictConfig) -> None:
    check_kinds("algorithm.loss", {"actions": bool, "action_smoothing_bins": float}, plain(cfg.algorithm.loss))
    if not cfg.algorithm.loss.actions and not cfg.data.thoughts:
        raise UserError(
            "algorithm.loss.actions: false leaves thoughts to learn, but data.thoughts is false; set one of them true"
        )
    if not cfg.algorithm.loss.actions and cfg.data.reasoning_dropout:
        raise UserError(
            f"data.reasoning_dropout: {cfg.data.reasoning_dropout} takes thoughts away, and "
            "algorithm.loss.actions=false leaves nothing else to learn; set it to 0"
        )
    if cfg.model.get("lora") and not cfg.model.checkpoint:
        raise UserError(
            "model.lora: adapts a trained model, but model.checkpoint is null; set it, or use model/lora=none"
        )
