"""Protects the policy as annotator: the thoughts of the right frames, whatever they are asked together with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from policy.conftest import SENTENCE, SETTINGS
from training_data import INSTRUCTION, PHASES, SIDE, TINY, write_demonstrations

from dtvla.cli import config_dir
from dtvla.cot.annotator import Answer, Job
from dtvla.cot.episodes import AnnotatedFrames, EpisodeView
from dtvla.cot.policy_annotator import PolicyAnnotator
from dtvla.data.normalization import Statistics
from dtvla.data.recording import write_dataset
from dtvla.data.staging import CAMERA_KEYS, EpisodeSource, StagedEpisode
from dtvla.errors import UserError
from dtvla.learning.composing import made as made_by
from dtvla.policy.cot import CotMode
from dtvla.policy.decoding import Engine
from dtvla.policy.policy import Policy, build_policy
from dtvla.policy.writing import Thought

FRAMES = 24


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> AnnotatedFrames:
    return AnnotatedFrames(write_demonstrations(tmp_path_factory.mktemp("squares") / "data", 2, FRAMES))


def save_policy(folder: Path, **changes: Any) -> str:
    rng = np.random.default_rng(0)
    statistics = Statistics.from_frames(rng.normal(size=(200, 8)), rng.uniform(-1, 1, size=(200, 7)))
    build_policy(SETTINGS | changes, [SENTENCE, INSTRUCTION], statistics).save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policies") / "random")


def texts(answers: list[Answer]) -> list[str]:
    return [answer.text for answer in answers]


def test_first_answers_are_the_thoughts_the_policy_would_act_on(dataset: AnnotatedFrames, checkpoint: str) -> None:
    """Its own way to decide, one frame after the other, beside a batch in no order."""
    episode, policy = dataset[1], Policy.load(checkpoint)
    frames = np.random.default_rng(0).permutation(FRAMES)[:9].tolist()
    found = texts(PolicyAnnotator(checkpoint=checkpoint).label(episode, [Job(frame) for frame in frames]))
    for frame, text in zip(frames, found, strict=True):
        seen = {camera: episode.picture(camera, frame) for camera in policy.processor.images.cameras}
        [decision] = policy.act([{**seen, "instruction": episode.instruction}], CotMode())
        own = decision.thought_ids[: len(decision.thought_ids) - decision.thought_forced]
        assert text == policy.processor.layout.tokenizer.decode(own, skip_special_tokens=False)
    assert len(set(found)) > 1, "the thoughts do not depend on the frames: this test sees nothing"


def test_further_attempts_differ_but_each_is_always_the_same(dataset: AnnotatedFrames, checkpoint: str) -> None:
    annotator, rng = PolicyAnnotator(checkpoint=checkpoint, temperature=1.0), np.random.default_rng(1)
    jobs = [Job(frame, attempt) for frame in (3, 4, 20) for attempt in (0, 1, 2)]
    by_job = dict(zip(jobs, texts(annotator.label(dataset[0], jobs)), strict=True))
    drawn = [job for job in jobs if job.attempt]
    assert len({by_job[job] for job in drawn}) == len(drawn)
    order = rng.permutation(len(jobs))
    again = PolicyAnnotator(checkpoint=checkpoint, temperature=1.0)
    for part in np.array_split(order, 4):
        chosen = [jobs[place] for place in part]
        assert texts(again.label(dataset[0], chosen)) == [by_job[job] for job in chosen]
    told = [Job(job.frame, job.attempt, ("has 3 words",)) for job in jobs]
    assert texts(again.label(dataset[0], told)) == list(by_job.values())
    other = PolicyAnnotator(checkpoint=checkpoint, temperature=1.0, seed=1)
    assert not set(texts(other.label(dataset[0], drawn))) & set(by_job.values())


def test_an_answer_is_what_the_model_wrote_between_its_tags(
    dataset: AnnotatedFrames, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Policy.load(checkpoint).processor.layout
    act, end = layout.vocabulary.action_start_id, layout.vocabulary.think_end_id
    whole = [*layout.thought("now move down"), act]
    cut = [*layout.thought("now move")[:-1], end, act]
    written = [Thought(whole), Thought(cut, truncated=True, forced=2), Thought(whole, truncated=True, forced=1)]
    monkeypatch.setattr(Engine, "think", lambda *_, **__: written)
    answers = PolicyAnnotator(checkpoint=checkpoint).label(dataset[0], [Job(frame) for frame in range(3)])
    assert [" ".join(text.split()) for text in texts(answers)] == [
        "<think> now move down</think>",
        "<think> now move",
        "<think> now move down</think>",
    ]
    assert [answer.facts["truncated"] for answer in answers] == [False, True, True]


def test_identity_tells_apart_what_writes_other_thoughts(checkpoint: str, tmp_path: Path) -> None:
    other = save_policy(tmp_path / "other", seed=8)
    worded = save_policy(tmp_path / "worded", prompt={"think_prefix": "think now: ", "task": "{task}"})
    made: list[dict[str, Any]] = [
        {"checkpoint": checkpoint},
        {"checkpoint": other},
        {"checkpoint": worded},
        {"checkpoint": checkpoint, "seed": 1},
        {"checkpoint": checkpoint, "temperature": 1.0},
        {"checkpoint": checkpoint, "max_tokens": 7},
        {"checkpoint": checkpoint, "dtype": "bfloat16"},
    ]
    found = [PolicyAnnotator(**settings).identity for settings in made]
    assert len({repr(identity) for identity in found}) == len(made)
    assert found[0] == PolicyAnnotator(checkpoint=checkpoint, batch_size=3).identity
    assert found[0]["prompt"] != found[2]["prompt"]
    assert PolicyAnnotator(checkpoint=checkpoint, batch_size=3).jobs_per_call == 3
    recipe = OmegaConf.load(config_dir() / "annotator/policy.yaml")
    assert made_by(OmegaConf.merge(recipe, {"checkpoint": checkpoint})).identity == found[0]


def test_what_is_absent_is_named(dataset: AnnotatedFrames, checkpoint: str, tmp_path: Path) -> None:
    for wrong in ({"batch_size": 0}, {"temperature": 0.0}, {"max_tokens": 0}, {"seed": -1}):
        with pytest.raises(UserError, match=rf"annotator: .*{next(iter(wrong))}"):
            PolicyAnnotator(checkpoint=checkpoint, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="checkpoint: no folder|nowhere"):
        PolicyAnnotator(checkpoint=str(tmp_path / "nowhere"))
    blind = PolicyAnnotator(checkpoint=save_policy(tmp_path / "ceiling", cameras=["agentview", "ceiling"]))
    with pytest.raises(UserError, match="no pictures 'ceiling'"):
        blind.label(dataset[0], [Job(0)])


def write_coloured(root: Path) -> Path:
    """The colour of the picture tells the phase; two frames of each have a thought."""
    rng, staged = np.random.default_rng(0), []
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
    phase_F = 3 * np.arange(FRAMES) // FRAMES
    for index in range(8):
        noise = rng.integers(-30, 30, (len(CAMERA_KEYS), FRAMES, SIDE, SIDE, 3))
        pictures = {
            camera: (colours[phase_F][:, None, None] + noise[number]).astype(np.uint8)
            for number, camera in enumerate(CAMERA_KEYS)
        }
        thoughts = [f"next, {PHASES[phase]}" if time % 8 in (2, 5) else "" for time, phase in enumerate(phase_F)]
        source = EpisodeSource(index, "libero_object", 0, "move the soup", index, index, FRAMES, 0)
        state, action = rng.normal(size=(FRAMES, 8)), rng.uniform(-1, 1, (FRAMES, 7))
        staged.append(StagedEpisode.encode(source, state, action, thoughts, pictures))
    write_dataset(root, staged, {"made": "for a test"})
    return root


@pytest.mark.slow
def test_a_policy_that_learned_the_thoughts_of_key_frames_writes_those_of_unseen_frames(tmp_path: Path) -> None:
    from dtvla.learning.experiment import train

    threads, root = torch.get_num_threads(), write_coloured(tmp_path / "coloured")
    overrides = [
        *TINY,
        *("data.num_workers=0", "data.cache=false", "data.augment=false", f"data.root={root}"),
        *("algorithm.loss.actions=false", "data.frames=thoughts", f"paths.root={tmp_path}", "name=stage2"),
        *("trainer.max_steps=200", "trainer.val_check_interval=200", "callbacks.samples.frames=0", "logger=none"),
    ]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        train(compose("train", overrides=overrides))
    torch.set_num_threads(threads)
    annotator = PolicyAnnotator(checkpoint=str(tmp_path / "runs/stage2/policy"))
    view: EpisodeView = AnnotatedFrames(root)[7]
    found = texts(annotator.label(view, [Job(frame) for frame in range(FRAMES)]))
    expected = [f"<think> next, {PHASES[3 * frame // FRAMES]}</think>" for frame in range(FRAMES)]
    assert np.mean([one == other for one, other in zip(found, expected, strict=True)]) > 0.9
