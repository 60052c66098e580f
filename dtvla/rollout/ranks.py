"""The processes that ``torchrun`` starts for one evaluation, each with a share of the episodes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from dtvla.errors import UserError

PATIENCE = timedelta(days=30)  # the first process may wait that long for the slowest; torchrun notices dead ones


@dataclass(frozen=True)
class Ranks:
    """Who this process is among those of a run.

    Attributes:
        index: its number, 0 .. count - 1.
        count: number of processes.
        local_index: its number among those of this machine.
        local_count: number of processes on this machine.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0
    local_count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.index == 0

    def share[T](self, items: Sequence[T]) -> Sequence[T]:
        """The items of this process: every `count`-th, so that each gets some of every task."""
        return items[self.index :: self.count]

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.barrier()


def join_ranks() -> Ranks:
    """Find the other processes by the variables that torchrun sets; without them, this one is alone.

    Raises:
        UserError: some of the variables are missing or no numbers.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if found.get("WORLD_SIZE", "1") == "1":
        return Ranks()
    if len(found) < len(names) or not all(value.isdecimal() for value in found.values()):
        raise UserError(
            f"WORLD_SIZE={found['WORLD_SIZE']}: of torchrun's variables only {found} are set; "
            "start with torchrun --nproc-per-node=N -m dtvla.evaluate, or unset them"
        )
    index, count, local_index, local_count = (int(found[name]) for name in names)
    import torch.distributed

    if not torch.distributed.is_initialized():  # a multirun evaluates several times in one process
        torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    return Ranks(index, count, local_index, local_count)
