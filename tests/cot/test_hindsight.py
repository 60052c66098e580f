"""Stages told in hindsight: never back within a gripper command, and at the frames where things really happen."""

from dataclasses import replace
from itertools import groupby, pairwise

import numpy as np
import pytest
from puppet import BASKET, BOWL, HOME, PLATE, SOUP, Puppet

from dtvla.cot.hindsight import Stage, Track, stages
from dtvla.cot.keyframes import gripper_events
from dtvla.cot.narrate import PHASES

CLOSED = {"grasp", "lift", "carry", "place"}
OPENED = ["release", "retreat", "reach", "lower", "grasp", "lift", "carry", "place"]


def runs(found: list[Stage]) -> list[tuple[str, int, bool, int]]:
    """Phase, goal, recovering and first frame of every stretch of equal stages."""
    grouped = groupby(enumerate(found), key=lambda pair: pair[1])
    return [(stage.phase, stage.goal, stage.recovering, next(frames)[0]) for stage, frames in grouped]


def phases(found: list[Stage]) -> list[str]:
    return [phase for phase, *_ in runs(found)]


def test_one_placement_goes_through_every_stage_once_and_changes_where_things_happen() -> None:
    puppet = Puppet()
    puppet.go(HOME + [0.05, 0.05, 0.0], closing=False)
    held = puppet.pick(0)
    closing = gripper_events(puppet.end()[0], 3)[0]
    puppet.put(0)
    opening = len(puppet.rows)
    apart = puppet.let_go()
    puppet.go(PLATE + [0.0, 0.0, 0.2], closing=False)
    closing_F, track = puppet.end()
    found = stages(closing_F, track)
    begins = {phase: frame for phase, _, _, frame in runs(found)}
    assert tuple(phases(found)) == PHASES
    assert (begins["grasp"], begins["lift"], begins["release"], begins["retreat"]) == (closing, held, opening, apart)
    rise_F = track.item_FG3[:, 0, 2] - BOWL[2]
    assert rise_F[begins["carry"] - 1] <= 0.04 < rise_F[begins["carry"]]
    over_F = np.linalg.norm(track.grip_F3[:, :2] - BOWL[:2], axis=1)
    assert over_F[begins["lower"]] < 0.035 <= over_F[begins["lower"] - 1]
    left_F = np.linalg.norm(track.grip_F3[:, :2] - PLATE[:2], axis=1)
    assert left_F[begins["place"]] < 0.03 <= left_F[begins["place"] - 1]
    assert {stage.goal for stage in found} == {0}
    assert not any(stage.recovering for stage in found)


@pytest.mark.parametrize("touched", [0, 3, 6, 8])
def test_an_item_is_held_when_the_fingers_touch_it_and_have_stopped(touched: int) -> None:
    puppet = Puppet()
    puppet.go(BOWL, closing=False)
    held = puppet.squeeze(0, touched=touched)
    puppet.put(0)
    begins = {phase: frame for phase, _, _, frame in runs(stages(*puppet.end()))}
    assert begins["lift"] == held


def test_a_hand_that_comes_over_the_item_and_leaves_again_is_still_reaching() -> None:
    puppet = Puppet()
    puppet.go(BOWL + [0.0, 0.0, 0.07], closing=False)
    puppet.go(BOWL + [0.1, 0.0, 0.07], closing=False)
    back = len(puppet.rows)
    puppet.pick(0)
    puppet.put(0)
    found = stages(*puppet.end())
    assert phases(found)[:2] == ["reach", "lower"]
    assert runs(found)[1][-1] > back


def test_an_item_that_moves_is_approached_where_it_goes() -> None:
    puppet = Puppet()
    puppet.go(BOWL + [0.0, 0.0, 0.07], closing=False)
    pushed = len(puppet.rows)
    puppet.items[0] += [0.1, 0.0, 0.0]
    puppet.pick(0)
    puppet.put(0)
    assert runs(stages(*puppet.end()))[1][-1] > pushed


def test_a_failed_grasp_ends_at_the_opening_command_and_the_next_round_says_so() -> None:
    puppet = Puppet()
    puppet.go(BOWL, closing=False)
    puppet.squeeze(None)
    opening = len(puppet.rows)
    apart = puppet.let_go()
    puppet.pick(0)
    puppet.put(0)
    found = stages(*puppet.end())
    assert phases(found) == ["reach", "lower", "grasp", "reach", "lower", "grasp", "lift", "carry", "place"]
    _, _, recovering, begins = runs(found)[3]
    assert recovering
    assert begins == opening
    assert runs(found)[4][-1] >= apart
    assert not found[0].recovering


def test_a_lost_item_is_carried_until_the_fingers_open_and_never_placed() -> None:
    puppet = Puppet()
    puppet.pick(0)
    puppet.go(puppet.hand + [0.0, 0.0, 0.1], closing=True, speed=0.01)
    puppet.go(puppet.hand + [-0.1, 0.0, 0.0], closing=True)
    puppet.holds = None
    puppet.items[0, 2] = 0.02
    puppet.step(True)
    opening = len(puppet.rows)
    puppet.let_go()
    puppet.pick(0)
    puppet.put(0)
    found = stages(*puppet.end())
    expected = ["reach", "lower", "grasp", "lift", "carry", "reach", "lower", "grasp", "lift", "carry", "place"]
    assert phases(found) == expected
    assert runs(found)[5][2:] == (True, opening)


def test_one_placement_after_another_is_told_to_its_end_before_the_next_begins() -> None:
    puppet = Puppet()
    puppet.pick(1)
    puppet.put(1)
    opening = len(puppet.rows)
    puppet.let_go()
    puppet.go(BASKET + [0.0, 0.0, 0.2], closing=False)
    puppet.pick(0)
    puppet.put(0)
    puppet.let_go()
    found = stages(*puppet.end())
    assert tuple(phases(found)) == PHASES * 2
    second = runs(found)[8][-1]
    assert [stage.goal for stage in found] == [1] * second + [0] * (len(found) - second)
    assert not any(stage.recovering for stage in found)
    left_F = np.linalg.norm(puppet.end()[1].grip_F3 - puppet.end()[1].grip_F3[opening], axis=1)
    assert left_F[second] > 0.08 >= left_F[second - 1]


def test_the_next_item_beside_the_one_put_down_is_approached_once_the_fingers_are_apart() -> None:
    puppet = Puppet()
    puppet.items[1] = PLATE + [0.03, 0.03, 0.04]
    puppet.pick(0)
    puppet.put(0)
    apart = puppet.let_go()
    puppet.go(puppet.items[1], closing=False, speed=0.01)
    puppet.squeeze(1)
    begins = [(phase, goal, frame) for phase, goal, _, frame in runs(stages(*puppet.end()))]
    assert ("lower", 1, apart) in begins or ("reach", 1, apart) in begins
    assert [phase for phase, *_ in begins].count("release") == 1


def test_a_change_of_mind_approaches_the_other_item_at_once() -> None:
    puppet = Puppet()
    puppet.go(SOUP, closing=False)
    puppet.squeeze(None)
    opening = len(puppet.rows)
    puppet.let_go()
    puppet.pick(0)
    puppet.put(0)
    assert runs(stages(*puppet.end()))[3] == ("reach", 0, False, opening)


def test_a_grasp_that_misses_beside_what_is_placed_already_was_meant_for_the_other_item() -> None:
    puppet = Puppet()
    puppet.pick(0)
    puppet.put(0)
    puppet.let_go()
    puppet.go(PLATE + [0.0, 0.0, 0.2], closing=False)
    puppet.squeeze(None)
    missed = len(puppet.rows)
    puppet.let_go()
    puppet.pick(1)
    puppet.put(1)
    found = stages(*puppet.end())
    assert found[missed - 1] == Stage("grasp", 1)
    assert found[missed] == Stage("reach", 1, recovering=True)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_a_command_that_the_end_cuts_short_counts(frames: int) -> None:
    puppet = Puppet()
    puppet.pick(0)
    puppet.put(0)
    opening = len(puppet.rows)
    puppet.let_go(frames)
    assert runs(stages(*puppet.end()))[-1] == ("release", 0, False, opening)


def test_an_item_that_is_put_down_and_taken_again_was_not_placed() -> None:
    puppet = Puppet()
    for _ in range(2):
        puppet.pick(0)
        puppet.put(0)
        puppet.let_go()
    found = phases(stages(*puppet.end()))
    assert found.count("place") == 1
    assert found[-3:] == ["place", "release", "retreat"]


def test_an_episode_that_ends_beside_the_target_does_not_claim_success() -> None:
    puppet = Puppet()
    puppet.pick(0)
    puppet.put(0)
    puppet.let_go()
    closing_F, track = puppet.end()
    found = stages(closing_F, replace(track, solved_FG=np.zeros_like(track.solved_FG)))
    assert phases(found) == ["reach", "lower", "grasp", "lift", "carry", "reach"]
    assert found[-1].recovering


def test_success_in_the_hand_ends_with_placing() -> None:
    puppet = Puppet()
    puppet.pick(0)
    puppet.put(0)
    closing_F, track = puppet.end()
    solved_FG = track.solved_FG.copy()
    solved_FG[-1, 0] = True
    assert phases(stages(closing_F, replace(track, solved_FG=solved_FG)))[-2:] == ["carry", "place"]
    solved_FG[-1, 0] = False
    assert phases(stages(closing_F, replace(track, solved_FG=solved_FG)))[-1] == "carry"


def test_fingers_that_are_shut_at_first_grasp_nothing() -> None:
    puppet = Puppet(gap=0.0)
    for _ in range(5):
        puppet.step(True)
    opening = len(puppet.rows)
    puppet.let_go()
    puppet.pick(0)
    puppet.put(0)
    found = runs(stages(*puppet.end()))
    assert [(phase, recovering) for phase, _, recovering, _ in found[:3]] == [
        ("reach", True),
        ("reach", False),
        ("lower", False),
    ]
    assert found[1][-1] == opening


@pytest.mark.parametrize("at", [4, 30, 45])
def test_a_command_that_does_not_hold_changes_nothing(at: int) -> None:
    puppet = Puppet()
    puppet.pick(0)
    puppet.put(0)
    puppet.let_go()
    closing_F, track = puppet.end()
    flicker_F = closing_F.copy()
    flicker_F[at : at + 2] ^= True
    assert gripper_events(flicker_F, 3) == gripper_events(closing_F, 3)
    assert stages(flicker_F, track) == stages(closing_F, track)
    assert stages(flicker_F, track, debounce=1) != stages(closing_F, track)


@pytest.mark.parametrize("seed", range(200))
def test_whatever_happens_stages_fit_the_command_and_never_go_back_within_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames, count = int(rng.integers(1, 120)), int(rng.integers(1, 4))
    switches_F = rng.random(frames) < rng.choice([0.03, 0.3])
    closing_F = (np.cumsum(switches_F) + rng.integers(2)) % 2 == 1
    walk_F3 = np.cumsum(rng.normal(0, 0.02, (frames, 3)), axis=0)
    track = Track(
        gap_F=rng.uniform(0, 0.08, frames),
        grip_F3=walk_F3,
        item_FG3=walk_F3[:, None] + rng.normal(0, 0.05, (frames, count, 3)),
        target_FG3=rng.normal(size=(frames, count, 3)),
        held_FG=rng.random((frames, count)) < rng.choice([0.0, 0.1, 0.7]),
        solved_FG=rng.random((frames, count)) < 0.5,
    )
    found = stages(closing_F, track)
    assert len(found) == frames
    events = gripper_events(np.pad(closing_F, (0, 2), mode="edge"), 3)
    bounds = [0, *events, frames]
    for start, stop in pairwise(bounds):
        order = [(stage.goal, OPENED.index(stage.phase)) for stage in found[start:stop]]
        goals = list(dict.fromkeys(goal for goal, _ in order))
        assert len(goals) <= 2, "one goal is finished, another begun"
        assert order == sorted(order, key=lambda pair: (goals.index(pair[0]), pair[1]))
        grasping = CLOSED & {stage.phase for stage in found[start:stop]}
        if events and start:
            assert bool(grasping) == closing_F[start]
    for before, after in pairwise(bounds[:-1]):
        assert found[after - 1] != found[after], before
