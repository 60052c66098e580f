"""Group-relative policy optimisation (Shao et al., 2024) of a thinking policy, on the outcome of its episodes.

An iteration collects groups of episodes of the same task and init state, rates each episode against its group, lets a
frozen reference judge the tokens when there is a KL term, and then makes ``ppo_epochs * mini_batches`` optimiser steps
on the decisions that were really taken. Old log-probabilities are those of the tokens when they were sampled.

Everything random is a function of (seed, iteration, step), and episodes lie on disk until their iteration is over, so
a training that was killed in any phase continues as if nothing had happened.
"""

from __future__ import annotations

import functools
import math
import operator
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from dtvla.callbacks import stopping
from dtvla.callbacks.throughput import clock_stopped
from dtvla.errors import UserError
from dtvla.learning import rollout_metrics
from dtvla.learning.decisions import PolicyBatch
from dtvla.learning.iteration import Iteration, Recipe
from dtvla.learning.module import PolicyModule, weights_digest
from dtvla.learning.objective import Objective, ObjectiveSums, policy_loss
from dtvla.policy.gathering import gathered
from dtvla.policy.log_probs import Sampling, token_log_probs

if TYPE_CHECKING:
    from dtvla.data.grouping import Cut
    from dtvla.learning.group_data import GroupDataModule
    from dtvla.learning.optim import OptimizerSettings
    from dtvla.learning.reference import Reference
    from dtvla.policy.policy import Policy


KL_WEIGHT = "dtvla_kl_weight"


@dataclass(frozen=True)
class Stop:
    """When a training ends by itself.

    Attributes:
        log_ratio: largest |log-ratio| of a token between now and when it was sampled; None for no limit.
        folder: where the offending batch is saved.
    """

    log_ratio: float | None
    folder: Path


class GRPOModule(PolicyModule):
    """The policy in training; a batch is the number of an optimiser step, which makes its own data.

    Attributes:
        iteration: the current one.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: OptimizerSettings,
        data: GroupDataModule,
        *,
        recipe: Recipe,
        objective: Objective,
        cut: Cut,
        stop: Stop,
        reference: Reference | None = None,
        seed: int = 0,
    ) -> None:
        """Take the policy's model for training.

        Args:
            policy: to start from.
            optimizer: settings of AdamW and its schedule.
            data: collects episodes.
            recipe: how episodes become batches.
            objective: of a token.
            cut: of batches into forward passes.
            stop: when to give up.
            reference: frozen; needed for a KL term, in the loss or in the reward.
            seed: of dropout.

        Raises:
            UserError: a setting is out of range, nothing is left to train, or dropout would make log-probabilities
                differ from those of sampling.
        """
        start = weights_digest(policy.model.named_parameters())
        super().__init__(policy, optimizer, start=start, seed=seed)
        self.data, self.recipe, self.objective, self.cut, self.stop = data, recipe, objective, cut, stop
        self.sampling = Sampling(data.settings.temperature, data.settings.action_temperature)
        self.reference = reference
        self.iteration: Iteration | None = None
        self._seconds = dict[str, float]()
        drops = [m.p for m in policy.model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
        if drops:
            raise UserError(
                f"model.lora.dropout: {drops[0]}, but GRPO compares log-probabilities with those of sampling, which "
                "has none; set it 0"
            )

    def configure_model(self) -> None:
        """Share out the weights, and those of the reference."""
        super().configure_model()
        if self.device_mesh is not None and self.reference is not None:
            self.reference.share_out(self.device_mesh["data_parallel"], str(self.trainer.precision))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> list[PolicyBatch]:
        """Make the batch of an optimiser step; at the first one of an iteration, collect its episodes before."""
        number, place = divmod(int(batch), self.recipe.steps)
        if self.iteration is None or self.iteration.number != number:
            if place:
                self.data.require(number)
            with clock_stopped(self.trainer):
                self.iteration = self._begin(number)
            self._seconds["update"] = 0.0
        return self.iteration.mini_batch(place, self._cut)

    def training_step(self, batch: list[PolicyBatch], batch_idx: int) -> None:
        """One optimiser step."""
        assert self.iteration is not None
        began, place = time.monotonic(), self.global_step % self.recipe.steps
        found: list[ObjectiveSums] = []

        def loss(part: PolicyBatch) -> Tensor:
            sums = policy_loss(self.model, part, self.policy.processor.layout, self.sampling, self.objective)
            found.append(replace(sums, objective=sums.objective.detach()))
            return sums.objective

        metrics: dict[str, float] = {}

        def check() -> None:
            metrics.update(self._metrics(found))
            self._check(metrics)

        try:
            norm, rates = self.update(batch, loss, check)
        except UserError as error:
            raise UserError(f"{error} (the batch is in {self._save(batch)})") from error
        self._seconds["update"] += time.monotonic() - began
        values = {f"train/{name}": value for name, value in metrics.items()} | {"train/grad_norm": float(norm)} | rates
        values["train/kl_weight"] = self.objective.kl_weight
        if place == 0:
            rolled = rollout_metrics.of(self.iteration)
            if "sampled/success" in rolled:
                self.log("success", rolled["sampled/success"], prog_bar=True, logger=False)
            values |= rolled
            if self.iteration.fresh:  # the weights are still those of sampling
                values["sampled/log_prob_gap"] = metrics["log_ratio"]
                values["sampled/log_prob_gap_max"] = metrics["log_ratio_max"]
        if place == self.recipe.steps - 1:
            values |= {f"time/{phase}_s": seconds for phase, seconds in self._seconds.items()}
        self._log(values)
        if self.recipe.kl_target is not None:
            self.objective = self.objective.towards(self.recipe.kl_target, metrics["kl"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the KL weight, which may have been adapted."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[KL_WEIGHT] = self.objective.kl_weight

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the KL weight."""
        super().on_load_checkpoint(checkpoint)
        self.objective = replace(self.objective, kl_weight=checkpoint[KL_WEIGHT])

    @property
    def _cut(self) -> Cut:
        return replace(self.cut, ranks=self.trainer.world_size, rank=self.trainer.global_rank)

    def _begin(self, number: int) -> Iteration:
        """Collect an iteration's episodes, and ask the reference about them."""
        with self._timed("collect"):
            try:
                with torch.no_grad(), gathered(self.policy) as policy:
                    collection = self.data.collect(policy, number, weights_digest(policy.model.named_parameters()))
            except stopping.Stopped:
                raise SIGTERMException from None  # the checkpoint of the step before is there
        iteration = Iteration(number, collection, self.policy.processor.layout, self.recipe)
        if self.reference is not None:
            with self._timed("reference"):
                self._ask_reference(iteration)
        return iteration

    def _ask_reference(self, iteration: Iteration) -> None:
        assert self.reference is not None
        layout = self.policy.processor.layout
        was_training = self.model.training
        self.model.eval()  # which it shares with a reference that is the model without its adapter
        try:
            with torch.no_grad(), self.trainer.precision_plugin.forward_context(), self.reference.lent() as model:
                iteration.ask_reference(
                    lambda batch: token_log_probs(model, batch, layout, self.sampling), self._cut, self.device
                )
        finally:
            self.model.train(was_training)

    def _metrics(self, found: list[ObjectiveSums]) -> dict[str, float]:
        """Of a step, over all ranks: means over tokens, and the largest log-ratio."""
        joint = functools.reduce(operator.add, found)
        values = {field.name: getattr(joint, field.name).detach().double() for field in fields(joint)}
        reduce = self.trainer.strategy.reduce
        largest = float(reduce(values.pop("log_ratio_max"), reduce_op="max"))
        total = dict(zip(values, reduce(torch.stack([*values.values()]), reduce_op="sum").tolist(), strict=True))
        tokens = {name: total.pop(name) for name in ("tokens", "thought_tokens", "action_tokens")}
        loss = total.pop("objective")
        means = {name: value / tokens["tokens"] for name, value in total.items()}
        return {"loss": loss, **means, "log_ratio_max": largest, **tokens}

    def _log(self, values: dict[str, float]) -> None:
        """Log what was measured in this step; Lightning's own log would repeat what belongs to earlier ones."""
        self.log_dict(values, logger=False)
        self.log("loss", values["train/loss"], prog_bar=True, logger=False)
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                logger.log_metrics(values, step=self.global_step)

    def _check(self, metrics: dict[str, float]) -> None:
        """Raise before the weights are spoilt; all ranks see the same metrics."""
        limit = self.stop.log_ratio
        if not all(map(math.isfinite, metrics.values())):
            names = ", ".join(name for name, value in metrics.items() if not math.isfinite(value))
            raise UserError(f"training: step {self.global_step + 1}: {names} not finite; lower algorithm.optimizer.lr")
        if limit is not None and metrics["log_ratio_max"] > limit:
            raise UserError(
                f"algorithm.stop_at_log_ratio: in step {self.global_step + 1} a token's log-ratio is "
                f"{metrics['log_ratio_max']:.1f}, the limit {limit}: the policy has moved too far from the one that "
                "made the episodes; lower algorithm.optimizer.lr or algorithm.ppo_epochs, or give algorithm.kl a weight"
            )

    def _save(self, batch: list[PolicyBatch]) -> Path:
        """Write this rank's parts of a batch for a look at them."""
        from safetensors.torch import save_file

        path = self.stop.folder / f"step-{self.global_step + 1:07d}-rank{self.global_rank}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"part{index}/{name}": value.detach().cpu().contiguous()
            for index, part in enumerate(batch)
            for name, value in vars(part).items()
            if isinstance(value, Tensor)
        }
        save_file(tensors, path)
        return path

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._seconds[phase] = time.monotonic() - began
