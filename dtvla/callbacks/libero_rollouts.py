"""Episodes in LIBERO while training: does the policy solve the task yet?"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dtvla.analysis.intervals import wilson
from dtvla.callbacks.progress import PhaseProgressBar
from dtvla.callbacks.throughput import clock_stopped
from dtvla.errors import UserError
from dtvla.sim.suites import get_tasks, step_limit

if TYPE_CHECKING:
    from dtvla.policy.cot import CotMode
    from dtvla.policy.policy import Decision, Policy
    from dtvla.rollout.results import EpisodeResult
    from dtvla.sim.pool import EnvPool


class LiberoRollouts(Callback):
    """Runs episodes every k steps and after the last, and logs success with its interval, length, and a film.

    The simulators start with the first rollout and live as long as the training. Training throughput does not count the
    time. SIGTERM during a rollout abandons it at the next decision; the step's checkpoint is then saved as usual.
    Weights and their training are not affected: rollouts draw from seeds of their own.
    """

    def __init__(
        self,
        env: Mapping[str, Any],
        cot: Mapping[str, Any],
        folder: str,
        *,
        every_n_steps: int = 0,
        at_end: bool = False,
        init_states: Sequence[int] = (),
        record: int = 1,
        workers: int = 1,
        seed: int = 0,
    ) -> None:
        """Check the settings; nothing starts yet.

        Args:
            env: the ``env`` group: suite, task_ids, protocol, render, image_size, max_steps, settle_steps.
            cot: the ``cot`` group.
            folder: films go to ``<folder>/step-<n>/``.
            every_n_steps: steps between two rollouts; 0 for none.
            at_end: whether to run after the last step.
            init_states: of every task.
            record: episodes of each task to film.
            workers: simulator processes.
            seed: of environments and sampled thoughts.

        Raises:
            UserError: unknown suite or task, or no usable init states.
        """
        super().__init__()
        self.env, self.cot, self.folder = env, cot, Path(folder)
        self.every_n_steps, self.at_end, self.record, self.seed = every_n_steps, at_end, record, seed
        self.init_states, self.workers = list(init_states), workers
        self._pool: EnvPool | None = None
        if every_n_steps or at_end:
            self._check()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Run the episodes when it is time."""
        step = trainer.global_step
        last = step == trainer.max_steps
        if (self.every_n_steps and step % self.every_n_steps == 0) or (last and self.at_end):
            with clock_stopped(trainer):
                episodes = self.run(trainer, pl_module)
            if episodes is not None:
                self._log(trainer, pl_module, episodes)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the simulators."""
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the simulators."""
        self.close()

    def close(self) -> None:
        """Close the simulators if they run."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def run(self, trainer: Trainer, pl_module: LightningModule) -> list[EpisodeResult] | None:
        """Run all episodes with the current weights; None when the training was asked to stop meanwhile."""
        from dtvla.policy.cot import CotMode
        from dtvla.rollout.runner import episode_specs, run_episodes
        from dtvla.sim.pool import EnvPool

        env = self.env
        tasks = get_tasks(env["suite"], env["task_ids"])
        limit = step_limit(env["suite"], env["protocol"]) if env["max_steps"] is None else env["max_steps"]
        specs = episode_specs(tasks, self.init_states, seed=self.seed, max_steps=limit, record=self.record)
        if self._pool is None:
            settings = {key: env[key] for key in ("image_size", "render", "protocol", "settle_steps")}
            self._pool = EnvPool(min(self.workers, len(specs)), **settings).__enter__()  # left by close
        progress = trainer.progress_bar_callback
        bar = progress.open_phase("rollouts", len(specs)) if isinstance(progress, PhaseProgressBar) else None
        policy = cast("Policy", pl_module.policy)
        was_training = pl_module.training
        pl_module.eval()
        try:
            with torch.no_grad():
                return run_episodes(
                    _Interruptible(policy, trainer),
                    specs,
                    self._pool,
                    CotMode.from_config(self.cot),
                    batch_size=1 if policy.model.pads_visible else None,
                    on_result=lambda _: bar.update(1) if bar else None,
                    video_dir=self.folder / f"step-{trainer.global_step:07d}",
                )
        except (_Stopped, RuntimeError):  # the signal may have ended a simulator, too
            self.close()
            if not trainer.received_sigterm:
                raise
            return None
        finally:
            pl_module.train(was_training)
            if bar:
                bar.close()

    def _log(self, trainer: Trainer, pl_module: LightningModule, episodes: list[EpisodeResult]) -> None:
        rate = wilson(sum(episode.success for episode in episodes), len(episodes))
        values = {
            "rollout/success": rate.share,
            "rollout/success_low": rate.low,
            "rollout/success_high": rate.high,
            "rollout/episode_length": statistics.fmean(episode.steps for episode in episodes),
        }
        pl_module.log_dict(values, logger=False)
        films = [self.folder / episode.video for episode in episodes if episode.video]
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
            if films and hasattr(logger, "log_gif"):
                logger.log_gif("rollout/episode", films[0], step=trainer.global_step)
        if trainer.progress_bar_callback is not None:
            trainer.progress_bar_callback.print(f"step {trainer.global_step}: LIBERO success {rate}")

    def _check(self) -> None:
        tasks = get_tasks(self.env["suite"], self.env["task_ids"])
        most = min(task.init_state_count for task in tasks)
        if not self.init_states or not all(0 <= i < most for i in self.init_states):
            found = f"callbacks.libero_rollouts.init_states: {self.init_states}"
            raise UserError(f"{found} is not a list of numbers from 0 to {most - 1}")
        if self.workers < 1:
            raise UserError(f"callbacks.libero_rollouts.workers: {self.workers} is below 1")


class _Stopped(Exception):
    """The training was asked to stop during a rollout."""


class _Interruptible:
    """The policy, until the process receives SIGTERM."""

    def __init__(self, policy: Policy, trainer: Trainer) -> None:
        self.policy, self.trainer = policy, trainer

    def act(
        self,
        observations: Sequence[Mapping[str, Any]],
        cot: CotMode,
        *,
        seeds: Sequence[int],
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> list[Decision]:
        if self.trainer.received_sigterm:
            raise _Stopped
        return self.policy.act(observations, cot, seeds=seeds, drafts=drafts)
