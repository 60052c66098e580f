"""Whether the action does what the thought says: the gripper's commands beside the words.

The only part of an action that words of a thought name plainly is the gripper's. What a thought announces and what it
claims are read by :mod:`dtvla.cot.stages`; what the action does is recorded with every decision. Thoughts that leave
the gripper open to guess do not count, so that a policy is not blamed for a reader's mistake.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from dtvla.analysis.ablation import columns, need_columns
from dtvla.analysis.frames import KEY, say
from dtvla.analysis.intervals import clustered_wilson
from dtvla.cot.narrate import PHASES
from dtvla.cot.stages import gripper_claim, stage_of

if TYPE_CHECKING:
    import pandas as pd

CLOSE, OPEN = "c", "o"
_KEPT = {  # the command with which a chunk begins that is on its way to, or in, a stage
    "reach": OPEN,
    "lower": OPEN,
    "retreat": OPEN,
    "lift": CLOSE,
    "carry": CLOSE,
    "place": CLOSE,
}
_GIVEN = {"grasp": CLOSE, "release": OPEN}  # the command that a chunk of a stage gives, early or late
_COLUMNS = ["decisions", "spoken", "agree", "share", "low", "high", "chance", "kappa"]


def agreement(decisions: "pd.DataFrame", by: str | Sequence[str] = ("arm",), *, about: str = "next") -> "pd.DataFrame":
    """How often the gripper's command is the one that the thought speaks of.

    ``about="next"``: what the thought says comes next, against the chunk that follows. Reaching, lowering and
    retreating begin with an open gripper, lifting, carrying and placing with a closed one; a chunk of grasping closes
    it at some step and one of releasing opens it. ``about="state"``: whether the thought takes the gripper for closed,
    against the last command before it (open before the first decision). The state lags behind the command while the
    fingers move, so that this share is a lower bound.

    ``chance`` is the share expected if the same thoughts and chunks had been put together at random, and ``kappa``
    (J. Cohen, Educational and Psychological Measurement 20, 1960) is how far from it to full agreement the share is.
    The 95 % interval is Wilson's, in which the decisions of an init state are not taken for independent
    (:func:`dtvla.analysis.intervals.clustered_wilson`).

    Args:
        decisions: of :func:`dtvla.analysis.frames.decision_frame`, all or part of it, with all decisions of an episode.
        by: columns whose values make the groups.
        about: ``next`` or ``state``.

    Returns:
        The columns `by`, ``decisions`` (whose commands were recorded), ``spoken`` (of these, whose thought speaks of
        the gripper), ``agree``, ``share``, ``low``, ``high``, ``chance``, ``kappa``. Groups without a recorded command
        are said and left out; groups that never speak have NaN.

    Raises:
        UserError: no rows, or no such column.
        ValueError: unknown `about`.
    """
    import pandas as pd

    if about not in ("next", "state"):
        raise ValueError(f"about: found {about!r}; use next or state")
    groups = columns(by)
    need_columns(decisions, [*groups, "run", *KEY, "decision", "thought", "gripper"])
    told = decisions[decisions["gripper"].notna()]
    silent = decisions.loc[decisions["gripper"].isna(), groups].drop_duplicates()
    for names in silent.itertuples(index=False, name=None):
        say(f"{', '.join(map(str, names))}: gripper commands were not recorded (an older dtvla); left out of agreement")
    frame = _next(told) if about == "next" else _state(told)
    rows = [[*names, *_measure(part)] for names, part in frame.groupby(groups, sort=False, dropna=False)]
    return pd.DataFrame(rows, columns=[*groups, *_COLUMNS])


def _next(decisions: "pd.DataFrame") -> "pd.DataFrame":
    """With ``said``, what is expected of the chunk, and ``does``, all that can be said of the chunk."""
    return decisions.assign(
        said=decisions["thought"].map(lru_cache(None)(_expected)),
        does=decisions["gripper"].map(lru_cache(None)(_qualities)),
    )


def _expected(thought: str) -> str | None:
    """What a thought lets expect of its chunk: a quality, see :func:`_qualities`."""
    place = stage_of(thought)
    if place is None:
        return None
    stage = PHASES[place]
    return f"begins {_KEPT[stage]}" if stage in _KEPT else f"gives {_GIVEN[stage]}"


def _qualities(gripper: str) -> frozenset[str]:
    """``{"begins o", "gives o", "gives c"}`` for the commands ``ooocc``."""
    return frozenset({f"begins {gripper[0]}", *(f"gives {command}" for command in gripper)})


def _state(decisions: "pd.DataFrame") -> "pd.DataFrame":
    """With ``said``, the state that the thought claims, and ``does``, the last command before it."""
    ordered = decisions.sort_values(["run", *KEY, "decision"], kind="stable")
    before = ordered.groupby(["run", *KEY], sort=False)["gripper"].shift()
    last = before.map(lambda commands: commands[-1], na_action="ignore").fillna(OPEN)
    claims = {True: CLOSE, False: OPEN, None: None}
    return ordered.assign(
        said=ordered["thought"].map(lru_cache(None)(lambda thought: claims[gripper_claim(thought)])),
        does=last.map({CLOSE: frozenset(CLOSE), OPEN: frozenset(OPEN)}),
    )


def _measure(part: "pd.DataFrame") -> list[float]:
    """The numbers of a group, in the order of the columns."""
    spoken = part[part["said"].notna()]
    if spoken.empty:
        return [len(part), 0, 0, *[float("nan")] * 5]
    agrees = [said in does for said, does in zip(spoken["said"], spoken["does"], strict=True)]
    chance = sum(
        said_share * sum(does_share for does, does_share in _shares(spoken["does"]) if said in does)
        for said, said_share in _shares(spoken["said"])
    )
    states = spoken.assign(agrees=agrees).groupby(["suite", "task_id", "init_state"], sort=False)["agrees"]
    rate = clustered_wilson(states.agg(["sum", "count"]).to_numpy(int).tolist())
    kappa = (rate.share - chance) / (1.0 - chance) if chance < 1.0 else float("nan")
    return [len(part), len(spoken), rate.successes, rate.share, rate.low, rate.high, chance, kappa]


def _shares(values: "pd.Series") -> "list[tuple[str, float]]":
    return list(values.value_counts(normalize=True).items())
