"""Protects preemption during a rollout: SIGTERM ends the waiting at once and is not forgotten."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
from lightning.pytorch import Trainer

from dtvla.callbacks import stopping


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    """A trainer that listens to signals as during a fit."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    before = signal.getsignal(signal.SIGTERM)
    trainer._signal_connector.register_signal_handlers()
    yield trainer
    signal.signal(signal.SIGTERM, before)


def wait_and_clean_up(trainer: Trainer) -> None:
    with stopping.interruptible(trainer):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
            pytest.fail("it was not interrupted")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # another one must not disturb the cleaning up


def test_sigterm_interrupts_once_and_is_remembered(trainer: Trainer) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(stopping.Stopped):
        wait_and_clean_up(trainer)
    assert stopping.asked(trainer)
    assert stopping.agreed(trainer)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_sigterm_before_a_rollout_is_noted_and_none_begins(trainer: Trainer) -> None:
    with stopping.interruptible(trainer):
        assert not stopping.asked(trainer)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stopping.asked(trainer)
    with pytest.raises(stopping.Stopped), stopping.interruptible(trainer):
        pytest.fail("a rollout began although the training was asked to stop")
