"""Where a GRPO training gets its data: groups of episodes that the policy itself makes, iteration after iteration."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from dtvla.callbacks import stopping
from dtvla.callbacks.progress import PhaseProgressBar
from dtvla.callbacks.together import exchange, stopped_by_others
from dtvla.errors import UserError, check_keys
from dtvla.rollout.group_files import folder_of, read_collected
from dtvla.rollout.group_settings import GroupSettings
from dtvla.rollout.groups import Collection, GroupCollector

if TYPE_CHECKING:
    from dtvla.policy.policy import Policy

PROTOCOLS = ("disjoint", "published")


class GroupDataModule(LightningDataModule):
    """Loads nothing but the numbers of optimiser steps: episodes depend on weights, so the module asks for them itself.

    Attributes:
        settings: of the groups.
        start_step: number of the first optimiser step.
    """

    def __init__(
        self,
        *,
        env: Mapping[str, Any],
        folder: str,
        held_out: Sequence[int],
        protocol: str = "disjoint",
        batch_size: int | str | None = "auto",
        **groups: Any,
    ) -> None:
        """Check the settings; nothing starts yet.

        Args:
            env: the ``env`` group.
            folder: of the groups; all ranks see it.
            held_out: init states that success is measured in.
            protocol: of :data:`PROTOCOLS`; only ``published`` trains in init states that are held out.
            batch_size: most decisions of a forward; ``auto``: one on a CPU, else as many as environments wait.
            groups: see :class:`~dtvla.rollout.group_settings.GroupSettings`.

        Raises:
            UserError: a setting is out of range, or training meets held-out init states.
        """
        super().__init__()
        check_keys("data", groups, [field.name for field in fields(GroupSettings)])
        if protocol not in PROTOCOLS:
            raise UserError(f"data.protocol: {protocol!r} is unknown; use {' or '.join(PROTOCOLS)}")
        shared = sorted(set(groups["init_states"]) & set(held_out))
        if shared and protocol != "published":
            raise UserError(
                f"data.init_states: {', '.join(map(str, shared))} are held out to measure success (data.held_out); "
                "train in others, or choose protocol=published, which does as the published system"
            )
        self.env, self.folder, self.batch_size = env, Path(folder), batch_size
        self.settings = GroupSettings(**{**groups, "batch_size": None if batch_size == "auto" else batch_size})
        self.start_step = 0
        self._collector: GroupCollector | None = None

    def train_dataloader(self) -> DataLoader[int]:
        """The numbers of optimiser steps, from ``start_step`` on."""
        return DataLoader(_Steps(self.start_step), batch_size=None)

    def collect(self, policy: Policy, iteration: int, weights: str) -> Collection:
        """The groups of an iteration; all ranks call it together.

        Args:
            policy: with whole weights.
            iteration: its number.
            weights: digest of the policy's weights.

        Raises:
            stopping.Stopped: a rank was asked to stop; finished episodes are kept for the resumed training.
            UserError, RuntimeError: see :meth:`GroupCollector.collect`.
        """
        trainer = self.trainer
        assert trainer is not None
        if self._collector is None:
            self._collector = self._make(policy)
        progress = trainer.progress_bar_callback
        episodes = -(-self.settings.groups // trainer.world_size) * self.settings.group_size  # of one round
        bar = progress.open_phase("episodes", episodes) if isinstance(progress, PhaseProgressBar) else None
        try:
            with stopped_by_others():
                return self._collector.collect(policy, iteration, weights, lambda _: bar.update(1) if bar else None)
        finally:
            if bar:
                bar.close()

    def require(self, iteration: int) -> None:
        """Refuse to collect in the middle of an iteration: its episodes were made by weights that are gone.

        Raises:
            UserError: they are not on disk.
        """
        folder = folder_of(self.folder, iteration)
        if read_collected(folder) is None:
            raise UserError(
                f"resume: the episodes of iteration {iteration} are not in {folder}, which its last updates need; "
                "restore the folder, or train anew under another name=..."
            )

    def teardown(self, stage: str | None = None) -> None:
        """Close the simulators."""
        if self._collector is not None:
            self._collector.close()
            self._collector = None

    def _make(self, policy: Policy) -> GroupCollector:
        trainer = self.trainer
        assert trainer is not None
        settings = self.settings
        if self.batch_size == "auto" and policy.model.device.type == "cpu":
            settings = replace(settings, batch_size=1)
        return GroupCollector(
            settings,
            self.env,
            self.folder,
            rank=trainer.global_rank,
            ranks=trainer.world_size,
            exchange=exchange,
            guard=lambda: stopping.interruptible(trainer),
        )


class _Steps(IterableDataset[int]):
    """Whole numbers from the first one on, without end."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.first)
