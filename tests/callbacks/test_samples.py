"""Protects the pictures of sample predictions: the right frames, in every logger, and training as without them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from ranks import ON_CPU, train_on
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_data import TINY, write_demonstrations

from dtvla.analysis import decision
from dtvla.analysis.decision import Sample, draw_decision
from dtvla.callbacks.samples import SamplePredictions
from dtvla.cli import config_dir
from dtvla.data.demonstrations import Demonstrations
from dtvla.errors import UserError
from dtvla.learning.experiment import train


def run(*overrides: str) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        train(compose("train", overrides=list(overrides)))


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demonstrations(tmp_path_factory.mktemp("demonstrations") / "squares")


def settings(demonstrations: Path, root: Path, *more: str) -> list[str]:
    return [
        *TINY,
        f"data.root={demonstrations}",
        f"paths.root={root}",
        "data.num_workers=0",
        "trainer.max_steps=5",
        "trainer.val_check_interval=2",
        "trainer.limit_val_batches=1",
        "trainer.log_every_n_steps=1",
        "+model.text.attention_dropout=0.1",
        *more,
    ]


def test_fixed_held_out_frames_are_drawn_at_each_validation_and_leave_training_alone(
    demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Sample] = []
    draw = decision.draw_decision
    monkeypatch.setattr(decision, "draw_decision", lambda sample, *rest: (drawn.append(sample), draw(sample, *rest))[1])
    run(*settings(demonstrations, tmp_path, "name=plain", "callbacks.samples.frames=0"))
    assert not drawn
    assert not (tmp_path / "runs/plain/samples").exists()
    run(*settings(demonstrations, tmp_path, "name=drawn", "callbacks.samples.frames=3"))

    folder = tmp_path / "runs" / "drawn"
    steps = sorted((folder / "samples").iterdir())
    assert [step.name for step in steps] == ["step-0000002", "step-0000004", "step-0000005"]
    names = [sorted(path.name for path in step.iterdir()) for step in steps]
    assert names[0] == names[1] == names[2]
    assert len(names[0]) == 3

    data = Demonstrations(demonstrations)
    held_out = set(data.split(0.2, 429)[1].tolist())
    for name, sample in zip(names[0], drawn, strict=False):
        episode, time = int(name[8:13]), int(name[20:24])
        frame = int(data.starts_E[episode]) + time
        assert frame in held_out
        assert sample.where == f"episode {episode}, frame {time + 1} of 24"
        assert (sample.instruction, sample.true_thought) == (data.instruction(frame), data.thought(frame))
        last = int(data.stops_E[episode]) - 1
        np.testing.assert_array_equal(sample.true_SD, data.action_FD[np.minimum(frame + np.arange(10), last)])
        assert [picture.shape for picture in sample.pictures.values()] == [(32, 32, 3)] * 2
        assert sample.actions_SD.shape == (10, 7)

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    for number in (1, 2, 3):
        shown = events.Images(f"samples/{number}")
        assert [image.step for image in shown] == [2, 4, 5]
        assert shown[0].encoded_image_string == (steps[0] / names[0][number - 1]).read_bytes()
        assert Image.open(io.BytesIO(shown[-1].encoded_image_string)).size == (1300, 660)

    plain, other = (load_file(tmp_path / "runs" / name / "policy/model.safetensors") for name in ("plain", "drawn"))
    assert all(torch.equal(weight, other[name]) for name, weight in plain.items())


@pytest.mark.slow
def test_one_of_two_processes_with_sharded_weights_draws(demonstrations: Path, tmp_path: Path) -> None:
    """Two real processes (FSDP2 on gloo); a collective operation that only one of them enters would hang."""
    more = (
        "trainer=fsdp",
        *ON_CPU,
        "trainer.max_steps=5",
        "trainer.val_check_interval=3",
        "callbacks.samples.frames=2",
    )
    train_on(2, settings(demonstrations, tmp_path, "name=sharded", *more))
    steps = sorted((tmp_path / "runs/sharded/samples").iterdir())
    assert [(step.name, len(list(step.iterdir()))) for step in steps] == [("step-0000003", 2), ("step-0000005", 2)]


def test_every_other_validation_and_the_last_are_drawn_and_a_policy_without_thoughts_says_so(
    demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Sample] = []
    monkeypatch.setattr(decision, "draw_decision", lambda sample, title, path: drawn.append(sample))
    more = ("callbacks.samples.frames=100", "callbacks.samples.every_n_validations=2", "logger=none", "cot=none")
    run(*settings(demonstrations, tmp_path, "data.thoughts=false", *more))
    assert len(drawn) == 2 * 24  # steps 4 and 5, all frames of the one episode that is held out
    assert {(sample.true_thought, sample.thought) for sample in drawn} == {("", "")}


def test_no_validation_draws_nothing(demonstrations: Path, tmp_path: Path) -> None:
    more = ("trainer.limit_val_batches=0", "optimized_metric=null", "name=blind", "trainer.max_steps=5")
    run(*settings(demonstrations, tmp_path, *more))
    assert not (tmp_path / "runs/blind/samples").exists()


def test_a_full_disk_does_not_end_the_training(
    demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(decision, "draw_decision", fail)
    run(*settings(demonstrations, tmp_path, "name=full"))
    assert (tmp_path / "runs/full/policy").is_dir()
    assert "No space left" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"frames": -1}, {"every_n_validations": 0}])
def test_impossible_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplePredictions({"mode": "think"}, "nowhere", **wrong)


def test_any_text_and_any_number_of_cameras_can_be_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)
    texts = ["", None, "a $5 thought \x00\ufffd 思考 " * 3, "word " * 2000, "w" * 3000]
    for number, text in enumerate(texts):
        actions_SD = rng.normal(size=(4, 7)) * 3
        cameras = {f"camera {index}": picture for index in range(1 + number % 3)}
        sample = Sample("do " * 100, "episode 1", cameras, text, text, actions_SD, actions_SD)
        path = draw_decision(sample, "step 1", tmp_path / f"{number}.png")
        assert Image.open(path).size == (1300, 660)
    assert len(list(tmp_path.iterdir())) == len(texts)
