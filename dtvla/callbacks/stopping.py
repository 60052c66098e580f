"""SIGTERM (a preemption): raised where waiting would take long, and obeyed by all ranks at the same step.

Lightning notes the signal and ends a training behind its step. With several ranks its handler also runs a collective
operation wherever the signal finds a rank. When that is in its episodes and another rank waits for their results, two
different operations meet, and the training hangs. So with several ranks the handler here takes over.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from weakref import WeakSet

import torch
from lightning.pytorch import Trainer

_asked: WeakSet[Trainer] = WeakSet()


class Stopped(BaseException):
    """The training was asked to stop; like KeyboardInterrupt no ``except Exception`` holds it up."""


def listen(trainer: Trainer) -> None:
    """Take over SIGTERM from Lightning when there are several ranks; Lightning restores handlers after training."""
    if trainer.world_size > 1:
        _handle(lambda number, frame: _note(trainer, number))


def asked(trainer: Trainer) -> bool:
    """Whether this rank was asked to stop."""
    return trainer.received_sigterm or trainer in _asked


def agreed(trainer: Trainer) -> bool:
    """Whether any rank was asked to stop. All ranks must call it together."""
    if trainer.world_size == 1:
        return asked(trainer)
    flag = torch.tensor(float(asked(trainer)), device=trainer.strategy.root_device)
    return bool(trainer.strategy.reduce(flag, reduce_op="max"))


@contextmanager
def interruptible(trainer: Trainer) -> Iterator[None]:
    """Inside, the first SIGTERM is noted as usual and raises :class:`Stopped` at once; so does one from before."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        first = not asked(trainer)
        if callable(before):
            before(number, frame)
        if first:
            raise Stopped

    before: Any = signal.getsignal(signal.SIGTERM)
    _handle(interrupt)
    try:
        if asked(trainer):
            raise Stopped
        yield
    finally:
        _handle(before)


def _note(trainer: Trainer, number: int) -> None:
    launcher = trainer.strategy.launcher
    if trainer not in _asked and launcher is not None:
        launcher.kill(signal.Signals(number))  # ranks that this one started
    _asked.add(trainer)


def _handle(handler: Callable[[int, FrameType | None], Any] | signal.Handlers) -> None:
    if threading.current_thread() is threading.main_thread():  # signals reach no other
        signal.signal(signal.SIGTERM, handler)
