"""What the policy thinks and does on a few held-out frames, as pictures to leaf through over a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from dtvla.callbacks.progress import PhaseProgressBar
from dtvla.callbacks.throughput import clock_stopped
from dtvla.errors import UserError

if TYPE_CHECKING:
    from dtvla.data.datamodule import DemonstrationDataModule
    from dtvla.policy.policy import Decision, Policy


class SamplePredictions(Callback):
    """Draws, at validations, the policy's thought and actions on fixed held-out frames beside the demonstration's.

    The pictures go to ``<folder>/step-<n>/`` and to every logger with a method ``log_image``, under the same names at
    each validation. The first rank decides and draws; sharded weights are gathered for it.

    Training throughput does not count the time. Weights and their training are not affected: nothing random is drawn
    but from seeds of its own.
    """

    def __init__(
        self, cot: Mapping[str, Any], folder: str, *, frames: int = 4, every_n_validations: int = 1, seed: int = 0
    ) -> None:
        """Check the settings.

        Args:
            cot: the ``cot`` group.
            folder: of the pictures.
            frames: how many; 0 for none.
            every_n_validations: validations between two sets of pictures, counted from the first step of the training;
                the one after the last step always has them.
            seed: of the choice of frames, and of decisions that draw random numbers.

        Raises:
            UserError: a number is out of range.
        """
        super().__init__()
        if frames < 0 or every_n_validations < 1:
            raise UserError(
                f"callbacks.samples.frames, every_n_validations: found {frames}, {every_n_validations}; "
                "use at least 0 (none) and 1"
            )
        self.cot, self.folder = cot, Path(folder)
        self.frames, self.every_n_validations, self.seed = frames, every_n_validations, seed
        self._cases: list[_Case] | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide and draw when it is time."""
        if not self.frames or trainer.sanity_checking or not self._due(trainer):
            return
        from dtvla.policy.gathering import gathered

        with clock_stopped(trainer), torch.no_grad(), gathered(cast("Policy", pl_module.policy)) as policy:
            if not trainer.is_global_zero:
                return
            data = cast("DemonstrationDataModule", trainer.datamodule)  # type: ignore[attr-defined]
            if self._cases is None:
                self._cases = _choose(data, self.frames, self.seed)
            if self._cases:
                self._report(trainer, self._cases, self._decide(trainer, policy, self._cases))

    def _due(self, trainer: Trainer) -> bool:
        if trainer.state.fn == TrainerFn.VALIDATING:  # after the last step
            return True
        interval = trainer.val_check_batch
        return interval is None or int(trainer.global_step // interval) % self.every_n_validations == 0

    def _decide(self, trainer: Trainer, policy: Policy, cases: list[_Case]) -> list[Decision]:
        from dtvla.policy.cot import CotMode
        from dtvla.policy.policy import Policy

        # An engine for this once: nothing is compiled for a handful of decisions, and no cache stays behind.
        once = Policy(policy.model, policy.processor)
        once.engine_mode = "eager"
        mode, decisions = CotMode.from_config(self.cot), []
        progress = trainer.progress_bar_callback
        bar = progress.open_phase("samples", len(cases)) if isinstance(progress, PhaseProgressBar) else None
        try:
            for number, case in enumerate(cases):  # one by one: more at a time is not for every model
                decisions += once.act([case.observation], mode, seeds=[self.seed + number])
                if bar:
                    bar.update(1)
        finally:
            if bar:
                bar.close()
        return decisions

    def _report(self, trainer: Trainer, cases: list[_Case], decisions: list[Decision]) -> None:
        from dtvla.analysis.decision import Sample, draw_decision

        step = trainer.global_step
        for number, (case, decision) in enumerate(zip(cases, decisions, strict=True)):
            sample = Sample(
                instruction=case.observation["instruction"],
                where=case.where,
                pictures={camera: case.observation[camera] for camera in case.cameras},
                true_thought=case.observation["thought"],
                thought=decision.thought + (" … (cut at the limit)" if decision.truncated else ""),
                true_SD=case.true_SD,
                actions_SD=decision.actions_SD,
            )
            path = self.folder / f"step-{step:07d}" / f"{case.name}.png"
            try:
                draw_decision(sample, f"step {step}", path)
            except OSError as error:  # no reason to end a training
                print(f"samples: {path} is not written ({error.strerror})")
                return
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image(f"samples/{number + 1}", [str(path)], step=step)


@dataclass(frozen=True)
class _Case:
    """A held-out frame.

    Attributes:
        name: for files.
        where: for readers.
        observation: what the policy sees, with the demonstration's thought ("" for none) under ``thought``.
        cameras: the pictures among it.
        true_SD: the demonstration's actions in robot units.
    """

    name: str
    where: str
    observation: dict[str, Any]
    cameras: tuple[str, ...]
    true_SD: np.ndarray


def _choose(data: DemonstrationDataModule, count: int, seed: int) -> list[_Case]:
    """Frames of the held-out episodes by lot, in their order; fewer where there are not as many."""
    held_out_F, demonstrations, processor = data.val_frames, data.demonstrations, data.processor
    rng = np.random.default_rng([seed, len(held_out_F)])
    frames_K = np.sort(rng.choice(held_out_F, min(count, len(held_out_F)), replace=False))
    pixels_KNCHW = data.pictures[frames_K]
    chunks_KS = demonstrations.chunk_indices(frames_K, processor.layout.chunk)
    cameras, cases = processor.images.cameras, []
    for frame, pixels_NCHW, chunk_S in zip(frames_K.tolist(), pixels_KNCHW, chunks_KS, strict=True):
        episode = int(np.searchsorted(demonstrations.stops_E, frame, side="right"))
        start, stop = int(demonstrations.starts_E[episode]), int(demonstrations.stops_E[episode])
        pictures = {
            camera: pixels_CHW.permute(1, 2, 0).numpy() for camera, pixels_CHW in zip(cameras, pixels_NCHW, strict=True)
        }
        words = {"instruction": demonstrations.instruction(frame), "thought": demonstrations.thought(frame) or ""}
        cases.append(
            _Case(
                name=f"episode-{episode:05d}-frame-{frame - start:04d}",
                where=f"episode {episode}, frame {frame - start + 1} of {stop - start}",
                observation={**pictures, **words},
                cameras=cameras,
                true_SD=demonstrations.action_FD[chunk_S],
            )
        )
    return cases
