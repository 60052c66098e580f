"""Thoughts of the expert and the schema that guards the datasets."""

from itertools import product

import numpy as np
import pytest

from dtvla.cot.narrate import PHASES, narrate, place_words
from dtvla.cot.objects import spoken
from dtvla.cot.schema import Schema, SchemaSettings
from dtvla.sim.scene import Goal

GOALS = [
    Goal("in", "alphabet_soup_1", "basket_1_contain_region"),
    Goal("on", "akita_black_bowl_1", "plate_1"),
    Goal("on", "wine_bottle_1", "wine_rack_1_top_region"),
]
SCHEMA = Schema(SchemaSettings(min_words=20, max_words=60))


class At:
    def __init__(self, positions: dict[str, np.ndarray]):
        self.positions = positions

    def position(self, name: str) -> np.ndarray:
        return self.positions[name]


@pytest.mark.parametrize("goal", GOALS)
def test_every_thought_passes_the_schema_and_there_are_few(goal: Goal) -> None:
    rng = np.random.default_rng(0)
    texts = set()
    for phase, recovering in product(PHASES, (False, True)):
        for _ in range(200):
            scene = At({goal.item: rng.uniform(-0.5, 0.5, 3), goal.target: rng.uniform(-0.5, 0.5, 3)})
            text = narrate(phase, scene, goal, recovering=recovering)
            assert SCHEMA.violations(text, [spoken(goal.item), spoken(goal.target)]) == []
            assert 20 <= len(text.split()) <= 45
            assert text == text.lower()
            texts.add(text)
    places = {place_words(np.array([x, y, 0.0])) for x, y in product((-0.3, 0.0, 0.3), repeat=2)}
    assert len(places) == 9
    assert len(texts) <= (len(PHASES) + 1) * len(places) ** 2


def test_a_thought_stays_while_things_move_a_little() -> None:
    goal = GOALS[0]
    texts = set()
    for step in range(20):
        scene = At({goal.item: np.array([-0.1, -0.24 + 0.002 * step, 0.04]), goal.target: np.array([0.0, 0.25, 0.07])})
        texts.add(narrate("carry", scene, goal))
    assert len(texts) == 1


def test_objects_are_called_what_people_call_them() -> None:
    names = {
        "akita_black_bowl_1": "black bowl",
        "basket_1_contain_region": "basket",
        "flat_stove_1_cook_region": "stove",
        "wooden_cabinet_1_top_side": "cabinet",
        "wine_rack_1_top_region": "wine rack",
        "cream_cheese_1": "cream cheese",
        "glazed_rim_porcelain_ramekin_1": "ramekin",
        "alphabet_soup_1": "alphabet soup",
    }
    assert {name: spoken(name) for name in names} == names
