"""Episodes in LIBERO while training: does the policy solve the task yet?"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dtvla.analysis.intervals import Rate
from dtvla.callbacks import stopping
from dtvla.callbacks.best_policy import BestPolicy
from dtvla.callbacks.progress import PhaseProgressBar
from dtvla.callbacks.throughput import clock_stopped
from dtvla.callbacks.together import together
from dtvla.errors import UserError
from dtvla.sim.pool import pool_settings
from dtvla.sim.suites import get_tasks

if TYPE_CHECKING:
    from dtvla.data.datamodule import DemonstrationDataModule
    from dtvla.policy.policy import Policy
    from dtvla.rollout.results import EpisodeResult
    from dtvla.sim.pool import EnvPool, EpisodeSpec


class LiberoRollouts(Callback):
    """Runs episodes every k steps or epochs and after the last; logs success with its interval, length, and a film.

    Every rank runs its share with simulators of its own, which start with the first rollout and live as long as the
    training. Sharded weights are gathered once for each rollout. The policy with the best success so far is kept.

    Training throughput does not count the time. Weights and their training are not affected: rollouts draw from seeds
    of their own. SIGTERM during a rollout abandons it at once; the step's checkpoint is then saved as usual, and a
    resumed training begins with that rollout.
    """

    def __init__(
        self,
        env: Mapping[str, Any],
        cot: Mapping[str, Any],
        folder: str,
        *,
        every_n_steps: int = 0,
        every_n_epochs: float = 0,
        at_end: bool = False,
        init_states: Sequence[int] = (),
        record: int = 1,
        workers: int = 1,
        seed: int = 0,
        best: str | None = None,
    ) -> None:
        """Check the settings; nothing starts yet.

        Args:
            env: the ``env`` group: suite, task_ids, max_steps and what :func:`dtvla.sim.pool.pool_settings` takes.
            cot: the ``cot`` group.
            folder: films go to ``<folder>/step-<n>/``.
            every_n_steps: steps between two rollouts; 0 for none.
            every_n_epochs: passes over the training data between two rollouts; 0 for none.
            at_end: whether to run after the last step.
            init_states: of every task.
            record: episodes of each task to film.
            workers: simulator processes of each rank.
            seed: of environments and sampled thoughts.
            best: folder of the best policy, see :class:`~dtvla.callbacks.best_policy.BestPolicy`; None keeps none.

        Raises:
            UserError: unknown suite or task, no usable init states, or a negative interval.
        """
        super().__init__()
        self.env, self.cot, self.folder = env, cot, Path(folder)
        self.every_n_steps, self.every_n_epochs, self.at_end = every_n_steps, every_n_epochs, at_end
        self.init_states, self.record, self.workers, self.seed = list(init_states), record, workers, seed
        over = {"env": dict(env), "cot": dict(cot), "init_states": self.init_states, "seed": seed}
        self.best = None if best is None else BestPolicy(Path(best), over)
        self.owed = self._make_up = False
        self._pool: EnvPool | None = None
        for name, interval in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)):
            if interval < 0:
                raise UserError(f"callbacks.libero_rollouts.{name}: {interval} is negative; use 0 for no rollouts")
        if every_n_steps or every_n_epochs or at_end:
            self._check()

    def state_dict(self) -> dict[str, Any]:
        """Whether the rollout of the checkpoint's step was abandoned."""
        return {"owed": self.owed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over from a checkpoint."""
        self._make_up = bool(state_dict["owed"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Expect SIGTERM."""
        stopping.listen(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Make up for the rollout that an interrupted training did not finish."""
        if self._make_up:
            self._make_up = False
            self._roll_out(trainer, pl_module)
            if self.owed:
                raise SIGTERMException  # nothing is lost: the checkpoint that was resumed says so, too

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Run the episodes when it is time."""
        if self._due(trainer):
            self._roll_out(trainer, pl_module)

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

    def _due(self, trainer: Trainer) -> bool:
        step, due = trainer.global_step, False
        if self.every_n_steps:
            due = step % self.every_n_steps == 0
        if self.every_n_epochs:
            data = cast("DemonstrationDataModule", trainer.datamodule)  # type: ignore[attr-defined]
            batch, frames = data.batch_size, len(data.train_frames) * self.every_n_epochs
            due = due or step * batch // frames > (step - 1) * batch // frames
        return due or (self.at_end and step == trainer.max_steps)

    def _roll_out(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run all episodes with the current weights and report them; owe it when the training was asked to stop."""
        from dtvla.policy.gathering import gathered
        from dtvla.rollout.results import rate_of

        with clock_stopped(trainer), torch.no_grad(), gathered(cast("Policy", pl_module.policy)) as policy:
            episodes = self._run(trainer, policy)
            self.owed = episodes is None
            if episodes is None:
                return
            rate, best = rate_of(episodes), False
            if self.best is not None and trainer.is_global_zero:
                best = self.best.offer(policy, trainer.global_step, rate)
        self._log(trainer, pl_module, episodes, rate, best)

    def _run(self, trainer: Trainer, policy: Policy) -> list[EpisodeResult] | None:
        """Run this rank's share and return the episodes of all ranks; None when a rank was asked to stop."""
        specs = self._specs()
        try:
            shares = together(
                trainer, lambda: self._run_share(trainer, policy, specs[trainer.global_rank :: trainer.world_size])
            )
        except stopping.Stopped:
            self.close()  # its simulators may be in the middle of something
            return None
        return [shares[index % len(shares)][index // len(shares)] for index in range(len(specs))]

    def _run_share(self, trainer: Trainer, policy: Policy, specs: list[EpisodeSpec]) -> list[EpisodeResult]:
        from dtvla.policy.cot import CotMode
        from dtvla.rollout.runner import run_episodes
        from dtvla.sim.pool import EnvPool

        if not specs:
            return []
        if self._pool is None:
            self._pool = EnvPool(min(self.workers, len(specs)), **pool_settings(self.env))
            self._pool.__enter__()  # left by close
        progress = trainer.progress_bar_callback
        bar = progress.open_phase("rollouts", len(specs)) if isinstance(progress, PhaseProgressBar) else None
        try:
            return run_episodes(
                policy,
                specs,
                self._pool,
                CotMode.from_config(self.cot),
                batch_size=1 if policy.model.pads_visible else None,
                on_result=lambda _: bar.update(1) if bar else None,
                video_dir=self.folder / f"step-{trainer.global_step:07d}",
            )
        finally:
            if bar:
                bar.close()

    def _specs(self) -> list[EpisodeSpec]:
        from dtvla.rollout.runner import episode_specs

        env = self.env
        tasks = get_tasks(env["suite"], env["task_ids"])
        return episode_specs(tasks, self.init_states, seed=self.seed, max_steps=env["max_steps"], record=self.record)

    def _log(
        self, trainer: Trainer, pl_module: LightningModule, episodes: list[EpisodeResult], rate: Rate, best: bool
    ) -> None:
        values = {
            "rollout/success": rate.share,
            "rollout/success_low": rate.low,
            "rollout/success_high": rate.high,
            "rollout/episode_length": statistics.fmean(episode.steps for episode in episodes),
        }
        pl_module.log_dict(values, logger=False)  # the same on all ranks
        if not trainer.is_global_zero:
            return
        films = [self.folder / episode.video for episode in episodes if episode.video]
        films = [film for film in films if film.is_file()]  # of other machines they may not be in reach
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
            if films and hasattr(logger, "log_gif"):
                logger.log_gif("rollout/episode", films[0], step=trainer.global_step)
        if trainer.progress_bar_callback is not None:
            note = ", the best so far" if best else ""
            trainer.progress_bar_callback.print(f"step {trainer.global_step}: LIBERO success {rate}{note}")

    def _check(self) -> None:
        pool_settings(self.env)
        tasks = get_tasks(self.env["suite"], self.env["task_ids"])
        most = min(task.init_state_count for task in tasks)
        if not self.init_states or not all(0 <= i < most for i in self.init_states):
            found = f"callbacks.libero_rollouts.init_states: {self.init_states}"
            raise UserError(f"{found} is not a list of numbers from 0 to {most - 1}")
        if self.workers < 1:
            raise UserError(f"callbacks.libero_rollouts.workers: {self.workers} is below 1")
