"""Made-up episodes as the state annotator labels the expert's: stages that never go back, and failed grasps."""

from dataclasses import dataclass

import numpy as np

from dtvla.cot.narrate import PHASES, narrate
from dtvla.cot.objects import spoken
from dtvla.sim.scene import Goal

GOALS = [
    Goal("in", "alphabet_soup_1", "basket_1_contain_region"),
    Goal("in", "tomato_sauce_1", "basket_1_contain_region"),
    Goal("in", "milk_1", "basket_1_contain_region"),
    Goal("on", "akita_black_bowl_1", "plate_1"),
    Goal("on", "akita_black_bowl_1", "flat_stove_1_cook_region"),
    Goal("on", "wine_bottle_1", "wooden_cabinet_1_top_side"),
    Goal("on", "cream_cheese_1", "akita_black_bowl_1"),
    Goal("on", "moka_pot_1", "flat_stove_1_cook_region"),
]
_LONGEST = {"reach": 16, "lower": 18, "grasp": 13, "lift": 9, "carry": 20, "place": 12, "release": 4, "retreat": 6}
_CLOSED = ("grasp", "lift", "carry", "place")


@dataclass
class Places:
    """Positions of a scene, the item's to be moved."""

    at: dict[str, np.ndarray]

    def position(self, name: str) -> np.ndarray:
        return self.at[name]


def objects_of(goal: Goal) -> tuple[str, str]:
    return spoken(goal.item), spoken(goal.target)


def episode(rng: np.random.Generator, goals: list[Goal]) -> tuple[dict[int, str], np.ndarray]:
    """Thoughts of every frame, and bool (F,), whether the gripper is told to close."""
    thoughts: list[str] = []
    closing: list[bool] = []
    names = {name for goal in goals for name in (goal.item, goal.target)}
    scene = Places({name: rng.uniform(-0.3, 0.3, 3) for name in sorted(names)})
    for goal in goals:
        rounds = [list(PHASES)]
        while rng.random() < 0.25:  # a grasp that fails, or an item that is dropped on the way
            rounds.insert(0, list(PHASES[: int(rng.integers(3, 6))]))
        for number, phases in enumerate(rounds):
            for phase in phases:
                frames = int(rng.integers(1 if phase == "release" else 3, _LONGEST[phase] + 1))
                for frame in range(frames):
                    if phase == "carry":
                        scene.at[goal.item] = scene.at[goal.item] + (scene.at[goal.target] - scene.at[goal.item]) / (
                            frames - frame
                        )
                    thoughts.append(narrate(phase, scene, goal, recovering=number > 0))
                    closing.append(phase in _CLOSED)
            scene.at[goal.item] = scene.at[goal.item] + rng.uniform(-0.02, 0.02, 3)
    end = len(thoughts) - int(rng.integers(0, 6))  # success ends an episode before all is said
    return dict(enumerate(thoughts[:end])), np.array(closing[:end])
