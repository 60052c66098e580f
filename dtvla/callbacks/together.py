"""Work that the ranks of a training do each at its own pace, such as a share of episodes, with an end they agree on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer

from dtvla.callbacks import stopping
from dtvla.rollout.ranks import Abandoned, agree


def together[T](trainer: Trainer, share: Callable[[], T]) -> list[T]:
    """Do a share of the work on every rank; all ranks call it together.

    Args:
        trainer: of the training.
        share: this rank's work, without any collective operation. SIGTERM interrupts it at once.

    Returns:
        The results of all ranks, in order.

    Raises:
        stopping.Stopped: a rank was asked to stop.
        RuntimeError: another rank's work failed; what fails on this one comes through as it was raised.
    """

    def act() -> T:
        with stopping.interruptible(trainer):
            return share()

    with stopped_by_others():
        return agree(exchange, act)


@contextmanager
def stopped_by_others() -> Iterator[None]:
    """Work that ranks agree on: when another rank was asked to stop, so was this one.

    Raises:
        stopping.Stopped: a rank was asked to stop.
        RuntimeError: another rank's work failed.
    """
    try:
        yield
    except Abandoned as error:
        if error.stopped:
            raise stopping.Stopped from None
        raise


def exchange(own: Any) -> list[Any]:
    """What each rank gave, in order; this one's alone where training is not distributed."""
    if not torch.distributed.is_initialized():
        return [own]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    return gathered
