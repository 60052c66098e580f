"""What the scripted expert thinks: its phase and the scene, in a few plain words.

After figure 5 of DeepThinkVLA: where gripper and objects are, what has been done, what comes next. Places are coarse
words and a sentence depends on the phase alone, so a thought stays the same until the phase changes.
"""

from typing import TYPE_CHECKING, Protocol

from dtvla.cot.objects import spoken

if TYPE_CHECKING:
    import numpy as np


class _Goal(Protocol):
    @property
    def item(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def predicate(self) -> str: ...


class _Scene(Protocol):
    def position(self, name: str) -> "np.ndarray": ...


_TEMPLATES = {
    "reach": "the {item} is {where} and the {target} is {there}. the gripper is open and still away from the {item}. "
    "next, move above the {item}.",
    "lower": "the gripper is open and above the {item}, which is {where}. the {target} is {there}. "
    "next, go straight down around the {item}.",
    "grasp": "the open fingers are around the {item}, which is {where}. the {target} is {there}. "
    "next, close the gripper to hold the {item}.",
    "lift": "the gripper is closed and holds the {item}. the {target} is {there}. "
    "the grasp is done. next, lift the {item} straight up.",
    "carry": "the gripper holds the {item} in the air. the {target} is {there}. "
    "picking up is done. next, carry the {item} over to the {target}.",
    "place": "the {item} is in the gripper right above the {target}, which is {there}. "
    "carrying is done. next, lower the {item} {onto} the {target}.",
    "release": "the {item} is at the {target}, which is {there}. lowering is done. "
    "next, open the gripper and let go of the {item}.",
    "retreat": "the {item} is let go at the {target}, which is {there}. the gripper is open. "
    "next, move the gripper up and away from the {item}.",
}
PHASES = tuple(_TEMPLATES)
"""Phases of the expert that have a thought."""

_RECOVERY = (
    "the {item} is not in the gripper and is now {where}. the {target} is {there}. the grasp failed. "
    "next, open the gripper and move above the {item} again."
)


def narrate(phase: str, scene: _Scene, goal: _Goal, *, recovering: bool = False) -> str:
    """The thought of a phase of the scripted expert, 20 to 60 words of lower-case ASCII.

    Args:
        phase: a phase of :class:`dtvla.sim.expert.Expert`.
        scene: where things are.
        goal: the item, the target and the relation between them.
        recovering: whether a grasp has failed before.
    """
    item, target = spoken(goal.item), spoken(goal.target)
    template = _RECOVERY if recovering and phase == "reach" else _TEMPLATES[phase]
    return template.format(
        item=item,
        target=target,
        where=place_words(scene.position(goal.item)),
        there=place_words(scene.position(goal.target)),
        onto="into" if goal.predicate == "in" else "onto",
    )


def place_words(position_3: "np.ndarray") -> str:
    """Coarse place on the table as seen from the robot, such as ``far left`` or ``in the middle``.

    Both coordinates are cut into three, at 0.1 m to the sides and at -0.15 m and 0.05 m in depth.
    """
    x, y = float(position_3[0]), float(position_3[1])
    side = "left" if y > 0.1 else "right" if y < -0.1 else ""
    depth = "far" if x > 0.05 else "near" if x < -0.15 else ""
    if depth and side:
        return f"at the {depth} {side}"
    if side:
        return f"on the {side}"
    return f"at the {depth} side" if depth else "in the middle"
