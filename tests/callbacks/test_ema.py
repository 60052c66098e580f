"""Protects averaged weights: they are the average, a resume continues it, and the trained policy has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import interrupted, run
from safetensors.torch import load_file
from training_data import TINY, write_demonstrations

from dtvla.callbacks.ema import EMA
from dtvla.errors import UserError

DECAY, STEPS = 0.6, 4


@pytest.mark.slow
def test_the_policy_is_the_average_also_after_a_resume(tmp_path: Path) -> None:
    settings = [
        *TINY,
        f"data.root={write_demonstrations(tmp_path / 'squares', episodes=3, frames=12)}",
        f"paths.root={tmp_path}",
        "data.num_workers=0",
        "algorithm.optimizer.warmup_steps=1",
        f"trainer.max_steps={STEPS}",
        "trainer.limit_val_batches=1",
        "callbacks=checkpoint",
        "callbacks.checkpoint.keep_every_n_steps=1",
        "logger=csv",
    ]
    ema = ["+callbacks.ema._target_=dtvla.callbacks.ema.EMA", f"+callbacks.ema.decay={DECAY}"]
    run(*settings, "name=plain")
    run(*settings, *ema, "name=averaged")
    folder = tmp_path / "runs"
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, STEPS + 1):
        path = folder / "plain" / "checkpoints" / f"step-{step:07d}.ckpt"
        for name, weight in torch.load(path, weights_only=True)["state_dict"].items():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * weight if step > 1 else weight
    for step in (2, STEPS):
        interrupted(folder / "averaged", step, f"resumed-{step}")
        run(*settings, *ema, f"name=resumed-{step}", "resume=true")
    first, *others = (
        load_file(folder / name / "policy" / "model.safetensors")
        for name in ("averaged", "resumed-2", f"resumed-{STEPS}")
    )
    norm = "model.language_model.norm.weight"
    found = next(weight for name, weight in first.items() if name.endswith("language_model.model.norm.weight"))
    torch.testing.assert_close(found, expected[f"model.{norm}"])
    for other in others:
        assert all(torch.equal(weight, other[name]) for name, weight in first.items())


@pytest.mark.parametrize("wrong", [{"decay": 1.0}, {"every_n_steps": 0}, {"start_step": -1}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"callbacks\.ema"):
        EMA(**wrong)  # type: ignore[arg-type]
