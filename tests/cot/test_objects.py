"""What a task is about: of LIBERO by its own files, otherwise by the words of the instruction."""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import run
from typing import Any

import numpy as np
import pytest
from expert_like import Places

from dtvla.cot.narrate import PHASES, narrate
from dtvla.cot.objects import strangers, task_objects
from dtvla.cot.schema import Schema, SchemaSettings
from dtvla.sim.suites import get_tasks

LIBERO = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")


@dataclass
class View:
    instruction: str
    source: dict[str, Any] = field(default_factory=dict)
    root: Path = Path()


def objects(instruction: str, **source: Any) -> tuple[str, ...]:
    return task_objects(View(instruction, source))  # type: ignore[arg-type]


def test_a_libero_task_is_known_by_where_its_episode_comes_from() -> None:
    assert objects("words of mine", suite="libero_goal", task_id=1) == ("black bowl", "stove")
    assert objects("words of mine", suite="libero_object", task_id=0) == ("alphabet soup", "basket")


def test_a_libero_task_is_known_by_its_instruction() -> None:
    assert objects("put the bowl on the stove") == ("black bowl", "stove")
    assert objects("Put the bowl on the stove.") == ("black bowl", "stove")
    assert objects("open the middle drawer of the cabinet") == ("cabinet", "drawer")
    assert set(objects("turn on the stove and put the frying pan on it")) == {"chefmate", "stove", "frying pan"}


@pytest.mark.parametrize("suite", LIBERO)
def test_every_libero_task_has_objects_that_its_instruction_does_not_take_for_strangers(suite: str) -> None:
    for task in get_tasks(suite, None):
        found = objects(task.instruction, suite=suite, task_id=task.task_id)
        assert found
        assert len(set(found)) == len(found)
        assert strangers(task.instruction, found) == []


@pytest.mark.parametrize(
    ("instruction", "found"),
    [
        ("put the red cup on the tray", ("red cup", "tray")),
        ("Pick up the carrot, and place it in the pot", ("carrot", "pot")),
        ("fold the towel", ("towel",)),
        ("move up", ()),
    ],
)
def test_other_tasks_are_about_what_their_instruction_names(instruction: str, found: tuple[str, ...]) -> None:
    assert objects(instruction) == found


def test_what_the_expert_would_say_of_any_libero_task_names_its_objects_and_no_strangers() -> None:
    from dtvla.sim.scene import Goal

    schema, tried = Schema(SchemaSettings()), 0
    for task in (task for suite in LIBERO for task in get_tasks(suite, None)):
        definition = task.bddl_file.read_text()
        found = objects(task.instruction, suite=task.suite, task_id=task.task_id)
        for predicate, item, target in re.findall(r"\((In|On) (\w+) (\w+)\)", definition[definition.index("(:goal") :]):
            scene = Places({item: np.zeros(3), target: np.full(3, 0.2)})
            for phase in PHASES:
                text = narrate(phase, scene, Goal(predicate.lower(), item, target))
                assert schema.read(f"<think>{text}</think>", found) == (text, [])
                tried += 1
    assert tried > 500


def test_an_unknown_suite_falls_back_on_the_instruction() -> None:
    assert objects("put the red cup on the tray", suite="my_suite", task_id=0) == ("red cup", "tray")


def test_strangers_are_other_things_that_are_acted_on() -> None:
    own = ("tomato sauce", "basket")
    assert strangers("carry the bbq sauce over to the basket", own) == ["bbq sauce"]
    assert strangers("carry the sauce over to the basket", own) == []
    assert strangers("carry the Milk past the butter to the plate", own) == ["milk", "plate"]
    assert strangers("move to the handle of the top drawer", ("white cabinet",)) == []
    assert strangers("move to the handle of the cabinet", ("drawer",)) == []
    assert strangers("go down to the bowls", ("black bowl",)) == []
    assert strangers("go down to the white bowl", ("black bowl",)) == ["white bowl"]


def test_a_tasks_objects_are_found_without_torch_or_the_simulator() -> None:
    code = (
        "import sys\nfrom types import SimpleNamespace as View\nfrom dtvla.cot.objects import task_objects\n"
        "assert task_objects(View(source={}, instruction='put the bowl on the stove')) == ('black bowl', 'stove')\n"
        "print(*({'torch', 'mujoco', 'robosuite', 'transformers'} & set(sys.modules)))"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
