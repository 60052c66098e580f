"""The schema of annotators' answers: what passes, what each check finds, and the settings."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from corruptions import empty, tagged, truncated, two_blocks, wrong_object
from expert_like import GOALS, Places, objects_of

from dtvla.cot.narrate import PHASES, narrate
from dtvla.cot.schema import Schema, SchemaSettings
from dtvla.errors import UserError

GOOD = "The black bowl is on the left. The gripper is open. Next, move above the bowl."
OBJECTS = ("black bowl", "stove")


def checks(answer: str, objects: tuple[str, ...] = OBJECTS, **settings: object) -> list[str]:
    _, found = Schema(SchemaSettings(**settings)).read(answer, objects)  # type: ignore[arg-type]
    assert all(v.message and "\n" not in v.message for v in found)
    return [violation.check for violation in found]


def test_a_good_answer_gives_its_thought_without_the_space_around_it() -> None:
    assert Schema(SchemaSettings()).read(f" \n<think>\n {GOOD} </think>\n", OBJECTS) == (GOOD, [])


def test_every_thought_of_the_expert_passes() -> None:
    rng = np.random.default_rng(0)
    schema = Schema(SchemaSettings())
    for goal, phase, recovering in product(GOALS, PHASES, (False, True)):
        scene = Places({name: rng.uniform(-0.5, 0.5, 3) for name in (goal.item, goal.target)})
        text = narrate(phase, scene, goal, recovering=recovering)
        assert schema.read(tagged(text), objects_of(goal)) == (text, [])


@pytest.mark.parametrize(
    ("answer", "check"),
    [
        ("", "one_block"),
        (GOOD, "one_block"),
        (f"<think>{GOOD}", "one_block"),
        (f"{GOOD}</think>", "one_block"),
        (f"<think>{GOOD}</think><think>{GOOD}</think>", "one_block"),
        (f"<think><think>{GOOD}</think></think>", "one_block"),
        (f"<think>{GOOD}</think> and then some", "one_block"),
        (f"Sure: <think>{GOOD}</think>", "one_block"),
        (f"<THINK>{GOOD}</THINK>", "one_block"),
        ("<think></think>", "length"),
        ("<think> \n </think>", "length"),
        ("<think>Next, move above the bowl.</think>", "length"),
        (f"<think>{GOOD * 10}</think>", "length"),
        (f"<think>{GOOD.replace('left', 'l\u00e9ft')}</think>", "charset"),
        (f"<think>{GOOD.replace('left', 'l\u200bft')}</think>", "charset"),
        (f"<think>{GOOD.replace('. The', '.\nThe')}</think>", "paragraph"),
        (f"<think>{GOOD[:-1]}</think>", "paragraph"),
        (f"<think>{GOOD} <loc0012>.</think>", "control"),
        (f"<think>{GOOD} </action>.</think>", "control"),
        (f"<think>{GOOD} <|im_end|>.</think>", "control"),
        (f"<think>{GOOD} <unused7>.</think>", "control"),
        (f"<think>{GOOD} <eos>.</think>", "control"),
        ("<think>The gripper is open and far away. Next, move down and close the gripper.</think>", "objects"),
        (f"<think>{GOOD} {GOOD}</think>", "repetition"),
        ("<think>The bowl. The bowl. The bowl. The bowl. The bowl.</think>", "repetition"),
        ("<think>The black bowl is on the left. Next, carry the wine bottle over to the stove.</think>", "objects"),
        ("<think>The black bowl is on the left. Next, move above the white bowl on the table.</think>", "objects"),
        ("<think>The bowls and the bowling are next. Next, go on and go on and on.</think>", "objects"),
    ],
)
def test_each_check_finds_what_it_is_for(answer: str, check: str) -> None:
    assert check in checks(answer)


@pytest.mark.parametrize(
    "thought",
    [
        "The bowl is next to the ramekin and the plate is empty. Next, move above the bowl.",
        "The wine bottle is in the way of the stove. Next, move past the wine bottle to the stove.",
        "The black bowls are in the middle. Next, lower the open gripper around one of them.",
        "The pan is hot but the gripper is open. Next, put the bowl down on the stove!",
    ],
)
def test_other_things_of_the_scene_may_be_named(thought: str) -> None:
    assert checks(tagged(thought)) == []


def test_names_are_known_by_their_last_words_too() -> None:
    text = "The gripper is open and above the table. Next, move the gripper above {}."
    for objects, said in (
        (("white yellow mug", "microwave"), "the yellow and white mug"),
        (("red coffee mug", "plate"), "the red mug"),
        (("desk caddy",), "the caddy"),
        (("moka pot", "stove"), "both moka pots"),
        (("tomato sauce", "basket"), "the sauce"),
    ):
        assert checks(tagged(text.format(said)), objects) == []
    assert checks(tagged(text.format("the bbq sauce")), ("tomato sauce", "basket")) == ["objects"]


def test_without_known_objects_mentions_are_not_checked() -> None:
    assert checks("<think>The gripper is open and far away. Next, move down and close it.</think>", ()) == []


def test_characters_outside_ascii_can_be_allowed() -> None:
    text = f"<think>{GOOD.replace('left', 'l\u00e9ft')}</think>"
    assert checks(text, ascii=False) == []
    assert checks(text.replace("open", "op\x07en"), ascii=False) == ["charset"]


def test_tokens_are_counted_by_the_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    count = len(GOOD.split()) + 4  # words, full stops and the comma
    assert checks(tagged(GOOD), max_tokens=count, tokenizer=str(tmp_path)) == []
    assert checks(tagged(GOOD), max_tokens=count - 1, tokenizer=str(tmp_path)) == ["tokens"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"min_words": 0}, "schema.min_words"),
        ({"min_words": 90}, "schema.min_words, schema.max_words: found 90 and 80"),
        ({"max_tokens": 0, "tokenizer": "x"}, "schema.max_tokens: found 0"),
        ({"max_tokens": 9}, "schema.max_tokens, schema.tokenizer: found 9 and None"),
        ({"tokenizer": "x"}, "schema.max_tokens, schema.tokenizer: found None and x"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        SchemaSettings(**settings)  # type: ignore[arg-type]


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"schema.tokenizer: .* has no tokenizer.json"):
        Schema(SchemaSettings(max_tokens=9, tokenizer=str(tmp_path)))


def test_corruptions_that_one_thought_shows_are_found() -> None:
    rng = np.random.default_rng(0)
    for goal, phase in product(GOALS, PHASES):
        scene = Places({name: rng.uniform(-0.5, 0.5, 3) for name in (goal.item, goal.target)})
        thought, objects = narrate(phase, scene, goal), objects_of(goal)
        assert checks(two_blocks(thought, thought), objects) == ["one_block"]
        assert "length" in checks(empty(), objects)
        cut = truncated(thought, rng)
        assert checks(cut, objects) or cut.endswith(".</think>")
        for other in GOALS:
            if not set(objects) & set(objects_of(other)[:1]):
                assert checks(wrong_object(thought, objects, objects_of(other)), objects) == ["objects"]
                assert checks(wrong_object(thought, objects[:1], objects_of(other)), objects) == ["objects"]
