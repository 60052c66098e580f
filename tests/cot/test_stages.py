"""Stages and claims about the gripper, read from the words of the expert and of language models."""

import sys
from itertools import product
from subprocess import run

import numpy as np
import pytest
from expert_like import GOALS, Places

from dtvla.cot.narrate import PHASES, narrate
from dtvla.cot.stages import gripper_claim, next_step, stage_of

MODELS = {
    "reach": [
        "The black bowl sits left of the plate. The gripper is open. Next, I should move the gripper toward the bowl.",
        "The robot arm is at its start. I need to put the bowl on the plate. First, I will approach it from above.",
        "Nothing is done yet. The next step is to position the gripper directly above the bowl so it can be grasped.",
        "The grasp failed and the bowl has slipped. Next, open the gripper and move back to the bowl.",
    ],
    "lower": [
        "The open gripper hovers above the bowl. Next, lower the gripper to the rim of the bowl so it can close on it.",
        "The gripper is aligned with the soup can. Now I will descend to grasp it.",
        "The gripper is above the bowl and still open. Next step: move down until the fingers surround the rim.",
    ],
    "grasp": [
        "The fingers surround the bowl's rim. The next sub-goal is to close the gripper and secure the bowl.",
        "The gripper is around the bowl. Now, grasp the bowl firmly.",
    ],
    "lift": [
        "The bowl is grasped. Next, lift it off the table and then carry it to the plate.",
        "The gripper has closed on the bowl. The robot should now raise the bowl to clear the plate.",
        "The gripper is holding the bowl. Next, move up to clear the table.",
    ],
    "carry": [
        "The bowl is held by the gripper above the table. Next, move it toward the plate on the right.",
        "The gripper is holding the bowl. The next step is to move to the plate.",
        "The bowl has been lifted. Next, transport the bowl over the basket.",
        "The gripper is holding the soup can. Next, I will move the arm to a position above the basket.",
    ],
    "place": [
        "The gripper holds the bowl above the plate. Next, lower the bowl onto the plate.",
        "The bowl is held over the plate. Next, descend slowly to place it on the plate.",
        "The bowl is above the stove. Next, gently place the bowl on the stove.",
    ],
    "release": [
        "The bowl rests on the plate. Next, open the gripper to release the bowl.",
        "The bowl is in position. Now release it.",
        "The bowl is at the plate. Next, let go of the bowl and retreat.",
    ],
    "retreat": [
        "The bowl has been released onto the plate. Next, move the gripper up and away.",
        "The bowl is on the plate and the gripper is open. Next, retract the arm to its home position.",
        "The bowl was placed. The gripper is open. Next, lift the gripper away from the bowl.",
    ],
    None: [
        "",
        "The bowl is on the left and the plate is on the right. Next, pick up the bowl and place it on the plate.",
        "The drawer handle is in reach. Next, pull the drawer open.",
        "The stove knob is in front. Next, turn the knob clockwise.",
        "The bowl is on the plate. The task is complete.",
    ],
}


def test_every_sentence_of_the_expert_tells_its_phase() -> None:
    rng = np.random.default_rng(0)
    claims = {"reach": False, "lower": False, "grasp": False, "lift": True, "carry": True, "place": True}
    for goal, phase, _ in product(GOALS, PHASES, range(20)):
        scene = Places({name: rng.uniform(-0.5, 0.5, 3) for name in (goal.item, goal.target)})
        text = narrate(phase, scene, goal)
        assert stage_of(text) == PHASES.index(phase)
        assert gripper_claim(text) == (False if phase == "retreat" else claims.get(phase))
        recovering = narrate(phase, scene, goal, recovering=True)
        assert stage_of(recovering) == PHASES.index(phase)


@pytest.mark.parametrize(("stage", "text"), [(stage, text) for stage, texts in MODELS.items() for text in texts])
def test_a_language_models_wording_tells_its_stage_or_nothing(stage: str | None, text: str) -> None:
    found = stage_of(text)
    assert (None if found is None else PHASES[found]) == stage


@pytest.mark.parametrize(
    ("text", "claim"),
    [
        ("The gripper is open. Next, move.", False),
        ("The gripper is wide open. Next, move.", False),
        ("The bowl was released. Next, move up.", False),
        ("The robot is holding the bowl in the air. Next, move.", True),
        ("The gripper is fully closed around the bowl. Next, lift.", True),
        ("The bowl is in the gripper. Next, lift.", True),
        ("The gripper is not holding anything. Next, move.", None),
        ("The gripper is not open. Next, move.", None),
        ("The bowl is not yet grasped. Next, go down.", None),
        ("The bowl is to be held by its rim. Next, go down.", None),
        ("The bowl is no longer held. Next, go up.", None),
        ("The gripper is open, and the bowl is in the gripper. Next, go up.", None),
        ("The bowl is on the table. Next, with the gripper closed, hold the bowl.", None),
    ],
)
def test_claims_about_the_gripper_are_read_and_denials_and_plans_are_none(text: str, claim: bool | None) -> None:
    assert gripper_claim(text) is claim


def test_the_next_step_is_the_clause_behind_next_or_the_last_sentence() -> None:
    assert next_step("It is here. Next, go down to the cup.") == "go down to the cup"
    assert next_step("It is here.\nGo down to the Cup.") == "go down to the cup"
    assert next_step("") == ""


def test_checks_and_key_frames_load_neither_torch_nor_the_simulator() -> None:
    code = (
        "import sys\nfrom dtvla.cot import episode_picture, keyframes, objects, stages\n"
        "from dtvla.cot.schema import Schema, SchemaSettings\n"
        "from dtvla.cot.temporal import Temporal, TemporalSettings\n"
        "Schema(SchemaSettings()).read('<think>a</think>', ['cup'])\nTemporal(TemporalSettings())\n"
        "print(*({'torch', 'mujoco', 'robosuite', 'transformers'} & set(sys.modules)))"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
