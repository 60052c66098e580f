"""Thought beside action: the scripted expert's words with commands that fit or do not, and chance by permutation."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluations import FREE, HOLDS, episode, evaluation

from dtvla.analysis.agreement import agreement
from dtvla.analysis.frames import Run, decision_frame
from dtvla.cot.narrate import PHASES, narrate
from dtvla.rollout.results import Thought


class Goal:
    item, target, predicate = "black_bowl_1", "flat_stove_1", "on"


class Scene:
    def position(self, name: str) -> np.ndarray:
        return np.zeros(3)


THOUGHT = {phase: narrate(phase, Scene(), Goal()) for phase in PHASES}
FITS = {
    **{phase: ["ooooo", "ooocc"] for phase in ("reach", "lower", "retreat")},
    **{phase: ["ccccc", "cccoo"] for phase in ("lift", "carry", "place")},
    **{"grasp": ["ccccc", "ooocc"], "release": ["ooooo", "ccccoo"]},
}
CONTRADICTS = {"grasp": ["ooooo"], "release": ["ccccc"]}
for open_phase in ("reach", "lower", "retreat"):
    CONTRADICTS[open_phase] = ["ccccc", "ccoo"]
for closed_phase in ("lift", "carry", "place"):
    CONTRADICTS[closed_phase] = ["ooooo", "oocc"]


def decided(*pairs: tuple[str, str | None], mode: str = "think") -> pd.DataFrame:
    """Decisions of one episode: (thought, commands of its chunk)."""
    thoughts = [Thought(5 * k, text, gripper=commands) for k, (text, commands) in enumerate(pairs)]
    return decision_frame([Run("r", Path(), evaluation([episode(0, 0, True, thoughts=thoughts)], mode))])


@pytest.mark.parametrize("phase", PHASES)
def test_each_stage_has_its_command(phase: str) -> None:
    for table, expected in ((FITS, 1.0), (CONTRADICTS, 0.0)):
        for commands in table[phase]:
            (row,) = agreement(decided((THOUGHT[phase], commands))).to_dict("records")
            assert (row["decisions"], row["spoken"], row["share"]) == (1, 1, expected), (phase, commands)


def test_claims_are_held_against_the_command_before() -> None:
    frame = decided((FREE, "ooocc"), (HOLDS, "ccccc"), (HOLDS, "ccooo"), (HOLDS, "ooooo"), (FREE, "ccccc"), ("hm", "o"))
    (row,) = agreement(frame, about="state").to_dict("records")
    assert (row["decisions"], row["spoken"], row["agree"]) == (6, 5, 4)
    shuffled = frame.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(agreement(shuffled, about="state"), agreement(frame, about="state"))


def test_first_decisions_begin_with_an_open_gripper() -> None:
    one, other = decided((HOLDS, "c")), decided((FREE, "c"))
    assert agreement(one, about="state")["share"].tolist() == [0.0]
    assert agreement(other, about="state")["share"].tolist() == [1.0]


def test_chance_is_what_a_permutation_gives_and_the_interval_holds_the_share() -> None:
    rng = np.random.default_rng(0)
    episodes = []
    for state in range(30):
        phases = rng.choice(PHASES, 20)
        commands = [rng.choice(FITS[p] if rng.random() < 0.8 else CONTRADICTS[p]) for p in phases]
        texts = [THOUGHT[p] if rng.random() < 0.9 else "something else entirely" for p in phases]
        thoughts = [Thought(5 * k, t, gripper=str(c)) for k, (t, c) in enumerate(zip(texts, commands, strict=True))]
        episodes.append(episode(0, state, True, thoughts=thoughts))
    frame = decision_frame([Run("r", Path(), evaluation(episodes))])
    (row,) = agreement(frame).to_dict("records")
    spoken = frame[frame["thought"] != "something else entirely"].copy()
    assert (row["decisions"], row["spoken"]) == (600, len(spoken))
    assert 0.75 < row["share"] < 0.85
    assert row["low"] < row["share"] < row["high"] < row["low"] + 0.15
    shares = []
    for _ in range(60):
        spoken["gripper"] = rng.permutation(spoken["gripper"].to_numpy())
        shares.append(agreement(spoken)["share"].iloc[0])
    assert row["chance"] == pytest.approx(np.mean(shares), abs=4 * np.std(shares) / np.sqrt(60))
    assert row["kappa"] == pytest.approx((row["share"] - row["chance"]) / (1 - row["chance"]))


def test_what_was_not_recorded_is_said_and_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    old, new = decided((HOLDS, None), mode="mask"), decided((HOLDS, "ccc"))
    table = agreement(pd.concat([old, new], ignore_index=True))
    assert table["arm"].tolist() == ["think"]
    assert capsys.readouterr().err == (
        "warning: mask: gripper commands were not recorded (an older dtvla); left out of agreement\n"
    )
    assert agreement(old).empty


def test_thoughts_that_say_nothing_have_no_share() -> None:
    (row,) = agreement(decided(("", "ooo"), ("", "ccc"))).to_dict("records")
    assert (row["decisions"], row["spoken"], row["agree"]) == (2, 0, 0)
    assert np.isnan(row["share"])
    with pytest.raises(ValueError, match="about"):
        agreement(decided(("", "o")), about="mood")
