"""Thoughts of an episode against each other and the gripper: no false alarm, and the corruptions are caught."""

from collections import Counter

import numpy as np
import pytest
from corruptions import NAMES, corrupt, tagged
from expert_like import GOALS, episode, objects_of
from test_stages import MODELS

from dtvla.cot.narrate import PHASES
from dtvla.cot.schema import Schema, SchemaSettings
from dtvla.cot.stages import stage_of
from dtvla.cot.temporal import Temporal, TemporalSettings, similarity
from dtvla.errors import UserError
from dtvla.sim.scene import Goal

SCHEMA, TEMPORAL = Schema(SchemaSettings()), Temporal(TemporalSettings())
CLOSED = ("grasp", "lift", "carry", "place")


def some_goals(rng: np.random.Generator) -> tuple[list[Goal], tuple[str, ...], list[str]]:
    """One or two goals, the objects that they are about, and as many of another task with another item."""
    goals = [GOALS[i] for i in rng.choice(len(GOALS), size=1 if rng.random() < 0.7 else 2, replace=False)]
    objects = tuple(dict.fromkeys(name for goal in goals for name in objects_of(goal)))
    others = [objects_of(goal) for goal in GOALS if objects_of(goal)[0] not in objects]
    other = others[rng.integers(len(others))]
    return goals, objects, [other[place % 2] for place in range(len(objects))]


def staged(stages: str, lengths: int = 5) -> dict[int, str]:
    """A thought for every frame, of stages named by a letter or two."""
    names = dict(zip(("re", "lo", "gr", "li", "ca", "pl", "rl", "rt"), PHASES, strict=True))
    return dict(enumerate(MODELS[names[stage]][0] for stage in stages.split() for _ in range(lengths)))


def checks_of(thoughts: dict[int, str], closing_F: np.ndarray) -> dict[int, set[str]]:
    return {f: {v.check for v in found} for f, found in TEMPORAL.check(thoughts, closing_F).items()}


def test_thoughts_of_the_expert_raise_no_alarm_on_all_frames_or_some() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        goals, objects, _ = some_goals(rng)
        thoughts, closing_F = episode(rng, goals)
        assert all(SCHEMA.read(tagged(text), objects) == (text, []) for text in set(thoughts.values()))
        assert TEMPORAL.check(thoughts, closing_F) == {}
        some = rng.choice(len(thoughts), size=len(thoughts) // 4, replace=False).tolist()
        assert TEMPORAL.check({frame: thoughts[frame] for frame in some}, closing_F) == {}
    assert TEMPORAL.check({}, closing_F) == {}


def test_flicker_of_the_gripper_and_an_early_or_late_eye_raise_no_alarm() -> None:
    rng = np.random.default_rng(1)
    some = TemporalSettings().hysteresis
    tried = 0
    for _ in range(100):
        thoughts, closing_F = episode(rng, some_goals(rng)[0])
        events = (np.flatnonzero(closing_F[1:] != closing_F[:-1]) + 1).tolist()
        for before, event, after in zip([0, *events], events, [*events[1:], len(thoughts)], strict=False):
            if min(event - before, after - event) < 3 * some:
                continue
            seen = int(rng.integers(event - some, event + some))
            span = range(seen, event) if seen < event else range(event, seen)
            changed = thoughts | dict.fromkeys(span, thoughts[event if seen < event else event - 1])
            flicker_F = closing_F.copy()
            flicker_F[event + 2 * some : event + 2 * some + 2] ^= True
            assert TEMPORAL.check(changed, flicker_F) == {}
            tried += 1
    assert tried > 50


def test_a_language_model_that_says_it_in_other_words_each_time_raises_no_alarm_but_for_its_words() -> None:
    rng = np.random.default_rng(2)
    lenient = Temporal(TemporalSettings(min_similarity=0))
    for _ in range(60):
        thoughts, closing_F = episode(rng, some_goals(rng)[0])
        said = {f: str(rng.choice(MODELS[PHASES[stage_of(t) or 0]])) for f, t in thoughts.items()}
        assert lenient.check(said, closing_F) == {}
        assert {v.check for found in TEMPORAL.check(said, closing_F).values() for v in found} <= {"similarity"}


@pytest.mark.parametrize(("share", "alarms"), [(0.05, 0.01), (0.2, 0.02)])
def test_corruptions_are_caught_and_the_untouched_are_not_blamed(share: float, alarms: float) -> None:
    rng = np.random.default_rng(3)
    counts: Counter[tuple[str, bool]] = Counter()
    for _ in range(150):
        goals, objects, others = some_goals(rng)
        thoughts, closing_F = episode(rng, goals)
        answers, how = corrupt(thoughts, objects, others, rng, share)
        read = {frame: SCHEMA.read(answer, objects) for frame, answer in answers.items()}
        blamed = {frame for frame, (_, found) in read.items() if found}
        blamed |= set(TEMPORAL.check({f: text for f, (text, found) in read.items() if not found}, closing_F))
        counts.update((how.get(frame, "none"), frame in blamed) for frame in thoughts)
    caught = {name: counts[name, True] / (counts[name, True] + counts[name, False]) for name in (*NAMES, "none")}
    assert min(caught[name] for name in NAMES) >= 0.95, caught
    assert caught["none"] <= alarms, caught


def test_a_stage_may_not_come_back_before_the_gripper_has_another_command() -> None:
    closing_F = np.repeat([False, True, False], [10, 20, 10])
    good = staged("re lo gr li ca pl rl rt")
    assert checks_of(good, closing_F) == {}
    for frame, stage in ((2, "lo"), (12, "li"), (27, "gr"), (37, "rl"), (22, "pl")):
        assert checks_of(good | {frame: staged(stage)[0]}, closing_F)[frame] >= {"order"}
        assert set(checks_of(good | {frame: staged(stage)[0]}, closing_F)) == {frame}
    again = np.repeat([False, True, False, True], [10, 5, 10, 15])
    assert checks_of(staged("re lo gr re lo gr li ca"), again) == {}


def test_at_the_start_nothing_can_be_let_go() -> None:
    closing_F = np.zeros(20, bool)
    assert checks_of({0: staged("rt")[0]} | {f: staged("re")[0] for f in range(1, 20)}, closing_F) == {0: {"order"}}


def test_a_command_that_the_episodes_end_cuts_short_begins_a_new_row() -> None:
    thoughts = staged("re lo gr li ca pl") | {30: staged("re")[0]}
    assert checks_of(thoughts, np.repeat([False, True, False], [10, 20, 1])) == {}
    assert checks_of(thoughts, np.repeat([False, True], [10, 21])) == {30: {"gripper", "order"}}


def test_of_two_orders_that_are_equally_likely_both_are_blamed() -> None:
    thoughts = {0: staged("lo")[0], 30: staged("re")[0]}
    assert checks_of(thoughts, np.zeros(40, bool)) == {0: {"order"}, 30: {"order"}}


def test_the_gripper_may_not_be_said_to_be_what_it_is_not() -> None:
    closing_F = np.repeat([False, True, False], 30)
    near, far = 28, 15
    holding = "The gripper is holding the bowl. It is red. Something is going on here."
    opened = "The gripper is open. It is red. Something is going on here."
    for text, start, told in ((holding, 0, False), (opened, 30, True)):
        assert bool(closing_F[start]) is told
        assert checks_of({start + far: text}, closing_F) == {start + far: {"gripper"}}
        assert checks_of({start + near: text}, closing_F) == {}
    assert checks_of({5: opened, 45: holding, 75: opened}, closing_F) == {}
    slow = "The open fingers are around the bowl. Next, close the gripper."
    assert checks_of({frame: slow for frame in range(30, 50)}, closing_F) == {}
    flicker_F = closing_F.copy()
    flicker_F[15:17] = True
    assert checks_of({14: holding, 15: holding, 17: holding}, flicker_F) == {14: {"gripper"}, 17: {"gripper"}}


def test_a_thought_must_change_where_the_gripper_gets_another_command() -> None:
    closing_F = np.repeat([False, True], [20, 40])
    same, other = "The cup is on the table and all is well.", "The cup is in the air and all is well."
    assert checks_of(dict.fromkeys(range(60), same), closing_F) == {f: {"change"} for f in range(20, 60)}
    late = {frame: same if frame < 23 else other for frame in range(60)}
    assert checks_of(late, closing_F) == {}
    too_late = {frame: same if frame < 30 else other for frame in range(60)}
    assert checks_of(too_late, closing_F) == {f: {"change"} for f in range(20, 30)}
    assert checks_of({0: same, 59: same}, closing_F) == {59: {"change"}}
    assert checks_of({0: same, 59: other}, closing_F) == {}


def test_a_thought_unlike_its_neighbours_is_blamed_and_they_are_not() -> None:
    rng = np.random.default_rng(0)
    words = [f"word{number}" for number in range(200)]
    for _ in range(50):
        base = rng.choice(words[:100], size=30, replace=False).tolist()
        thoughts = {}
        for frame in range(12):
            varied = [str(w) if rng.random() < 0.8 else str(rng.choice(words[:100])) for w in base]
            thoughts[frame] = " ".join(varied) + ". Next, move above the cup."
        assert checks_of(thoughts, np.zeros(12, bool)) == {}
        frame = int(rng.integers(1, 11))
        thoughts[frame] = " ".join(rng.choice(words[100:], size=30).tolist()) + ". Next, move above the cup."
        assert checks_of(thoughts, np.zeros(12, bool)) == {frame: {"similarity"}}


def test_the_beginning_of_another_thought_is_blamed() -> None:
    whole = "The gripper is open and above the bowl. The stove is on the left. Next, go down around the bowl."
    cut = "The gripper is open and above the bowl. The stove is on the left."
    assert checks_of({0: whole, 1: cut, 2: whole}, np.zeros(3, bool)) == {1: {"similarity"}}
    assert checks_of({0: whole, 1: whole}, np.zeros(3, bool)) == {}


def test_similarity_is_the_share_of_words_in_common() -> None:
    assert similarity("a b c d", "a b c d") == 1
    assert similarity("a b c d", "a b x y") == 0.5
    assert similarity("a b", "c d") == 0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"min_similarity": 1.5}, "temporal.min_similarity: found 1.5"),
        ({"debounce": 0}, "temporal.debounce, temporal.hysteresis: found 0 and 6"),
        ({"hysteresis": -1}, "temporal.debounce, temporal.hysteresis: found 3 and -1"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        TemporalSettings(**settings)  # type: ignore[arg-type]
