"""Processes that share episodes: those that ``torchrun`` starts for an evaluation, and the ranks of a training."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

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


class Abandoned(RuntimeError):
    """Another rank could not go on; ``stopped``: it was asked to stop, which is no failure."""

    def __init__(self, message: str, stopped: bool) -> None:
        """Say which rank and why."""
        super().__init__(message)
        self.stopped = stopped


@dataclass(frozen=True)
class _Told:
    """What a rank tells the others: an answer, or why it has none."""

    answer: Any = None
    failure: str | None = None
    stopped: bool = False


def agree[T](exchange: Callable[[Any], list[Any]], act: Callable[[], T]) -> list[T]:
    """Do something on every rank and tell all of them; when one can't, none goes on.

    Args:
        exchange: gives every rank what each of them gave, in their order.
        act: this rank's part. What it raises this rank raises, but tells the others first, who would wait in vain;
            other than ``Exception`` means that it was asked to stop. Ctrl-C reaches all ranks by itself.

    Returns:
        What ``act`` returned on each rank.

    Raises:
        Abandoned: another rank could not.
    """
    error: BaseException | None = None
    try:
        own = _Told(act())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as caught:
        error = caught
        own = _Told(None, f"{type(caught).__name__}: {caught}", not isinstance(caught, Exception))
    told = exchange(own)
    if error is not None:
        raise error
    failed = [(rank, one) for rank, one in enumerate(told) if one.failure is not None]
    if failed:
        reasons = "; ".join(f"rank {rank}: {one.failure}" for rank, one in failed)
        raise Abandoned(reasons, stopped=any(one.stopped for _, one in failed))
    return [cast(T, one.answer) for one in told]
