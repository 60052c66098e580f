"""The GRPO study: both sides learn alike, nothing dead is learned from, and every number follows from the rounds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policy.conftest import SETTINGS

from dtvla.benchmarks.grpo import Sides
from dtvla.benchmarks.grpo_agreement import agreement
from dtvla.benchmarks.grpo_published import Trajectory, real_and_dead
from dtvla.benchmarks.grpo_settings import Settings
from dtvla.benchmarks.record import run, settings_of
from dtvla.benchmarks.tables import tables
from dtvla.errors import UserError
from dtvla.policy.cot import CotMode
from dtvla.rollout.groups import Collection, Group, Prompt
from dtvla.rollout.results import EpisodeResult
from dtvla.rollout.runner import decision_seed
from dtvla.rollout.trajectories import TrajectoryWriter, read_trajectory
from dtvla.sim.pool import EpisodeSpec
from dtvla.sim.suites import get_task

MODEL: dict[str, Any] = SETTINGS | {
    "name": "tiny",
    "image_size": 32,
    "max_prompt_tokens": 48,
    "tokenizer_size": 500,
    "vocabulary_size": 6000,
    "vision": SETTINGS["vision"] | {"patch_size": 16},
}
ENV: dict[str, Any] = {
    "suite": "libero_object",
    "task_ids": None,
    "protocol": "published",
    "max_steps": None,
    "render": "draft",
    "image_size": 64,
    "settle_steps": 1,
    "stepping": "fast",
}
VALUES: dict[str, Any] = {
    "model": MODEL,
    "env": ENV,
    "device": "cpu",
    "threads": 1,
    "groups": 1,
    "group_size": 2,
    "horizon": 12,
    "episode_steps": 8,
    "thought_length": 9,
    "pool_workers": 1,
    "ppo_epochs": 2,
    "mini_batches": 2,
    "warmup": "of another study",
}
CHUNK = 3


def settings(**changes: Any) -> Settings:
    return settings_of("grpo", VALUES | changes)  # type: ignore[no-any-return]


def _observation(generator: np.random.Generator, instruction: str) -> dict[str, Any]:
    pictures = generator.integers(0, 256, size=(2, 64, 64, 3), dtype=np.uint8)
    return {"agentview": pictures[0], "wrist": pictures[1], "instruction": instruction}


def _collection(sides: Sides, folder: Path, steps: int) -> Collection:
    """Episodes of random pictures, decided on by the policy as the runner does it."""
    generator, writer, trajectories = np.random.default_rng(5), TrajectoryWriter(folder), []
    cot = CotMode(temperature=1.0, action_temperature=1.6)
    for seed in range(2):
        spec = EpisodeSpec("libero_object", 3, 0, seed)
        instruction = get_task(spec.suite, spec.task_id).instruction
        for number, step in enumerate(range(0, steps, CHUNK)):
            seen = [_observation(generator, instruction)]
            (decision,) = sides.policy.act(seen, cot, seeds=[decision_seed(spec, number)])
            writer.decided(spec, step, decision)
        result = EpisodeResult("libero_object", 3, instruction, 0, seed, False, steps, [], [])
        writer.finished(spec, result)
        trajectories.append(read_trajectory(next(p for p in folder.iterdir() if p.stem.endswith(f"seed{seed}"))))
    group = Group(Prompt("libero_object", 3, 0), 1, trajectories)
    return Collection([group], 2, 0, 1, 1, 1, 6, 2 * steps)


@pytest.fixture
def sides(tmp_path: Path) -> Sides:
    """Both schedules on one tiny model."""
    return Sides(settings(), tmp_path / "ours")


def test_both_sides_learn_the_same_from_the_same_episodes(sides: Sides, tmp_path: Path) -> None:
    """Sampled, recomputed and published log-probabilities are equal, and so are the gradients of one mini-batch."""
    found = agreement(sides.ours, sides.published, _collection(sides, tmp_path / "made", steps=8))
    # 3 decisions of 2 episodes: 7 free ids of 9, and the action tokens of 8 steps
    assert found["tokens"] == 2 * (3 * 7 + 8 * 7)
    assert found["recorded_apart"] < 1e-4
    assert found["computed_apart"] < 1e-4
    assert 0 < found["gradients_apart"] < 1e-4
    assert abs(found["our_objective"] - found["published_objective"]) < 1e-5


def _published_trajectories(sides: Sides, steps: int) -> list[Trajectory]:
    """Sampled the published way on random pictures, two prompts of unequal length, until the horizon."""
    published, generator = sides.published, np.random.default_rng(1)
    specs = [EpisodeSpec("libero_goal", task, 0, task) for task in (0, 4)]
    texts = [get_task(spec.suite, spec.task_id).instruction for spec in specs]
    prompts = [published.layout.prompt(text) for text in texts]
    assert len(prompts[0]) != len(prompts[1])
    made = []
    for _ in range(published.calls):
        seen = [_observation(generator, text) for text in texts]
        pixels = torch.stack([published.processor.pixels(observation) for observation in seen])
        values = published.model.pixel_values(pixels).view(pixels.shape)
        made.append((values, *published.decide(pixels, prompts)))
    return [
        published.trajectory(
            spec,
            steps,
            [values[row] for values, _, _ in made],
            [prompts[row]] * len(made),
            [thoughts[row] for _, thoughts, _ in made],
            [2] * len(made),
            [bins[row] for _, _, bins in made],
        )
        for row, spec in enumerate(specs)
    ]


def test_the_published_way_computes_dead_decisions_and_learns_nothing_from_them(sides: Sides) -> None:
    torch.manual_seed(0)
    trajectories = _published_trajectories(sides, steps=8)
    assert real_and_dead(trajectories) == (6, 2)
    assert all(len(one.ids_ST) == 4 and one.ids_ST.shape[1] == sides.published.length for one in trajectories)
    assert all(len(thought) == 9 for one in trajectories for thought in one.thoughts)
    assert len({tuple(thought) for one in trajectories for thought in one.thoughts}) > 1, "thoughts are sampled"
    old = [sides.published.log_probs(one) for one in trajectories]
    parts = list(zip(trajectories, old, (1.0, -1.0), strict=True))
    gradients = []
    for dead_pixels in (None, 0.5):
        if dead_pixels is not None:
            for one in trajectories:
                one.pixels_SNCHW[3:] = dead_pixels
        sides.published.gradient(parts)
        grads = [w.grad.flatten() for w in sides.published.model.parameters() if w.grad is not None]
        gradients.append(torch.cat(grads).clone())
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-6 * float(gradients[0].norm()))


def test_the_published_way_thinks_in_a_padded_batch_as_alone(sides: Sides) -> None:
    """Prompts of unequal length are padded on the left; sampling at a temperature near zero is greedy."""
    way, layout, generator = sides.published.way, sides.published.layout, np.random.default_rng(2)
    texts = [get_task("libero_goal", task).instruction for task in (0, 4, 7)]
    prompts = [layout.prompt(text) for text in texts]
    pixels = torch.stack([sides.policy.processor.pixels(_observation(generator, text)) for text in texts])
    sides.published.model.eval()
    with torch.no_grad():
        alone = [
            way.think(pixels[row : row + 1], [prompt], 12, lambda phase: None)[0] for row, prompt in enumerate(prompts)
        ]
        for temperature in (0.0, 1e-6):
            assert way.think(pixels, prompts, 12, lambda phase: None, temperature) == alone
        bins = [way.act(pixels, prompts, alone, lambda phase: None, temperature) for temperature in (0.0, 1e-6)]
    assert len({tuple(thought) for thought in alone}) > 1
    assert torch.equal(*(found_BA.clamp(min=1) for found_BA in bins)), "bins 0 and 1 have the same row"


@pytest.mark.sim
@pytest.mark.slow
def test_a_short_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run("grpo", settings(), tmp_path, "the command")
    document = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert path.name == "grpo-libero_object.json"
    measured = {m["side"]: m for m in document["measurements"]}
    assert set(measured["published"]["phases"]) == {"start", "collect", "log-probs", "update", "total"}
    assert set(measured["ours"]["phases"]) == {"collect", "update", "total"}
    for side, dead in (("ours", 0), ("published", 2)):
        assert measured[side]["iterations"] == [
            {"episodes": 2, "steps": 16, "real_decisions": 6, "dead_decisions": dead}
        ]
    medians = {side: {phase: t["median_s"] for phase, t in found["phases"].items()} for side, found in measured.items()}
    assert all(value > 0 for phases in medians.values() for value in phases.values())
    for phases in medians.values():
        assert phases["total"] == pytest.approx(sum(phases.values()) - phases["total"])
    ratio = document["ratios"]["iteration: published / ours"]["value"]
    assert ratio == pytest.approx(medians["published"]["total"] / medians["ours"]["total"])
    assert document["targets"][0]["met"] == (ratio >= 5)
    assert document["agreement"]["gradients_apart"] < 1e-4
    assert document["agreement"]["recorded_apart"] < 1e-4
    assert document["start_once_s"] > 0
    shown = capsys.readouterr().out
    assert shown.count("iteration: published / ours") == 3
    assert tables(document) in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 0}, "^groups: 0 is not a whole number from 1 on"),
        ({"group_size": 1}, "^group_size: 1 is not a whole number from 2 on"),
        ({"horizon": "48"}, "^horizon: '48' is not a whole number from 1 on"),
        ({"episode_steps": 13}, "^episode_steps: 13 is beyond horizon 12"),
        ({"thought_length": 4}, "^thought_length: 4 is not a whole number from 5 on"),
        ({"mini_batches": 3}, "^mini_batches: 3 of 2 episodes; give at most as many"),
        ({"env": ENV | {"render": "none"}}, "^env.render: none, but a policy has to see"),
        ({"iterations": None}, "^iterations: None is not a whole number"),
    ],
)
def test_a_wrong_setting_is_one_clear_message(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(**change)


def test_what_may_be_left_open() -> None:
    open_ = settings(episode_steps=None, thought_length=None, pool_workers=None)
    assert open_.steps == 12
    assert open_.workers >= 1
