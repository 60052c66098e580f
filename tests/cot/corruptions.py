"""Five ways in which an answer can be wrong; each takes the true thought and returns the answer of a bad annotator.

Answers are tagged, as annotators give them: ``<think>...</think>``.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from dtvla.cot.stages import stage_of

NAMES = ("wrong_object", "wrong_order", "truncated", "two_blocks", "empty")


def tagged(thought: str) -> str:
    """The answer of an annotator that thinks this."""
    return f"<think>{thought}</think>"


def wrong_object(thought: str, objects: Sequence[str], others: Sequence[str]) -> str:
    """Put the objects of another task in place of the task's own, one by one; names that both share stay."""
    exchanged = dict(zip(objects, others, strict=False))
    pattern = "|".join(re.escape(name) for name in sorted(objects, key=len, reverse=True))
    changed = re.sub(rf"\b(?:{pattern})\b", lambda found: exchanged.get(found[0], found[0]), thought)
    assert changed != thought, (thought, objects, others)
    return tagged(changed)


def wrong_order(thoughts: Mapping[int, str], frame: int, rng: np.random.Generator) -> str | None:
    """The thought of another stage of the episode, other than those of both neighbours; None where there is none."""
    stages = {text: stage_of(text) for text in set(thoughts.values())}
    near = {stages[thoughts[f]] for f in (frame - 1, frame, frame + 1) if f in thoughts}
    choice = sorted(text for text, stage in stages.items() if stage not in near)
    return tagged(str(rng.choice(choice))) if choice else None


def truncated(thought: str, rng: np.random.Generator) -> str:
    """Cut a thought off after a tenth to nine tenths of its words; the block is closed."""
    words = thought.split()
    return tagged(" ".join(words[: int(rng.integers(len(words) // 10, 9 * len(words) // 10 + 1))]))


def two_blocks(thought: str, other: str) -> str:
    """Think twice."""
    return f"{tagged(thought)}\n{tagged(other)}"


def empty() -> str:
    """Think nothing."""
    return tagged("")


def corrupt(
    thoughts: Mapping[int, str],
    objects: Sequence[str],
    others: Sequence[str],
    rng: np.random.Generator,
    share: float = 0.2,
) -> tuple[dict[int, str], dict[int, str]]:
    """Corrupt a share of an episode's thoughts, each in one of the five ways.

    Returns:
        The answers of all frames, and for each corrupted frame how.
    """
    answers = {frame: tagged(text) for frame, text in thoughts.items()}
    how = {}
    for frame in sorted(rng.choice(sorted(thoughts), size=round(share * len(thoughts)), replace=False).tolist()):
        name = str(rng.choice(NAMES))
        out_of_order = wrong_order(thoughts, frame, rng)
        if name == "wrong_order" and out_of_order is not None:
            answers[frame] = out_of_order
        elif name == "wrong_object":
            answers[frame] = wrong_object(thoughts[frame], objects, others)
        elif name == "truncated":
            answers[frame] = truncated(thoughts[frame], rng)
        elif name == "two_blocks":
            answers[frame] = two_blocks(thoughts[frame], str(rng.choice(sorted(thoughts.values()))))
        else:
            name, answers[frame] = "empty", empty()
        how[frame] = name
    return answers, how
