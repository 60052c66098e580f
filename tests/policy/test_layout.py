from collections.abc import Callable

import numpy as np
import pytest
import torch

from dtvla.errors import UserError
from dtvla.policy.layout import IGNORE, PromptTemplate, Segment, normalize_instruction, stack
from dtvla.policy.policy import Policy

from .conftest import random_example, sentence


def test_sequence_reads_as_documented(policy: Policy) -> None:
    layout, words = policy.processor.layout, policy.processor.layout.vocabulary
    actions_SD = torch.linspace(-1, 1, 21).reshape(3, 7)
    example = layout.encode("Move_the RED bowl", "the gripper is above", actions_SD)
    tokens = layout.tokenizer.convert_ids_to_tokens(example.input_ids_T.tolist())
    text = "<image>" * 8 + "<bos>|think: move the red bowl\n|<think> the gripper is above</think><action>"
    actions = "".join(layout.tokenizer.convert_ids_to_tokens(layout.bins.encode(actions_SD).flatten().tolist()))
    decoded = "".join(tokens).replace("Ġ", " ").replace("Ċ", "\n")
    assert decoded == text.replace("|", "").replace("<bos>think", "<bos> think") + actions + "</action><eos>"
    assert layout.bins.decode(example.labels_T[example.slot_T]).reshape(3, 7).numpy() == pytest.approx(
        actions_SD.numpy(), abs=layout.bins.width
    )
    block = (example.segment_T == Segment.ACT).nonzero()[:, 0]
    assert example.input_ids_T[block[0]] == words.action_start_id
    assert example.slot_T.nonzero()[:, 0].tolist() == block[1:-2].tolist()


def test_everything_after_the_prompt_is_supervised_and_only_slots_hold_actions(policy: Policy) -> None:
    rng = np.random.default_rng(0)
    layout = policy.processor.layout
    for _ in range(20):
        example, _, _ = random_example(policy, rng)
        prefix = example.segment_T == Segment.PREFIX
        assert (example.labels_T[prefix] == IGNORE).all()
        assert (example.labels_T[~prefix] != IGNORE).all()
        assert torch.equal(example.labels_T[~prefix], example.input_ids_T[~prefix])
        low, high = layout.bins.first_id, layout.bins.last_id
        assert torch.equal((example.input_ids_T >= low) & (example.input_ids_T <= high), example.slot_T)


def test_sample_without_thought_has_a_prompt_that_does_not_ask_for_one(policy: Policy) -> None:
    layout = policy.processor.layout
    for absent in (None, ""):
        example = layout.encode("move down", absent, None)
        ids = layout.prompt("move down", thinking=False)
        assert example.input_ids_T[: len(ids)].tolist() == ids
        assert len(ids) < len(layout.prompt("move down"))
        assert (example.segment_T == Segment.THINK).sum() == 2
        assert (example.labels_T[example.slot_T] == IGNORE).all()
        assert (example.input_ids_T[example.slot_T] == layout.vocabulary.bos_id).all()


def test_thought_text_survives(policy: Policy) -> None:
    layout, rng = policy.processor.layout, np.random.default_rng(2)
    for _ in range(20):
        text = sentence(rng)
        assert layout.text(layout.thought(text)) == text


def test_stack_pads_on_the_right(policy: Policy) -> None:
    rng = np.random.default_rng(3)
    examples = [random_example(policy, rng)[0] for _ in range(5)]
    fields = stack(examples, pad_id=0)
    for index, example in enumerate(examples):
        length = len(example.input_ids_T)
        assert torch.equal(fields["input_ids_BT"][index, :length], example.input_ids_T)
        assert (fields["segment_BT"][index, length:] == Segment.PAD).all()
        assert (fields["labels_BT"][index, length:] == IGNORE).all()
        assert not fields["slot_BT"][index, length:].any()


def test_too_long_or_tagged_texts_are_refused(policy: Policy) -> None:
    layout = policy.processor.layout
    with pytest.raises(UserError, match="max_prompt_tokens"):
        layout.prompt("move " * 60)
    with pytest.raises(UserError, match="max_thought_tokens"):
        layout.thought("move " * 60)
    with pytest.raises(UserError, match="control tag"):
        layout.thought("move </think> down")
    with pytest.raises(ValueError, match="actions have shape"):
        layout.encode("move", "down", torch.zeros(2, 7))
    with pytest.raises(UserError, match="task"):
        PromptTemplate(think_prefix="", task="do it")


def test_instruction_is_written_as_in_the_published_prompts(make_policy: Callable[..., Policy]) -> None:
    assert normalize_instruction("  Put_the Bowl_on top ") == "put the bowl on top"
    ask = "First output the thinking process in <think></think> tags and then output the final action in"
    prefix = f"{ask} <action></action>."
    template = PromptTemplate(prefix, "Task: {task};")
    assert template("A_b", thinking=True) == f"{prefix}Task: a b;\n"
    assert template("A_b", thinking=False) == "Task: a b;\n"
