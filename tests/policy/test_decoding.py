"""Cached thinking and acting against full forwards, in float64."""

import numpy as np
import pytest
import torch

from dtvla.policy import decoding
from dtvla.policy.layout import Batch, Example, Layout, Segment
from dtvla.policy.policy import Policy

from .conftest import make_batch, random_observation, sentence

pytestmark = pytest.mark.usefixtures("exact_norms")


def full_example(layout: Layout, prompt: list[int], thought: list[int]) -> Example:
    """The whole sequence that a decision amounts to, built from its parts."""
    act = layout.act_block()
    ids = torch.tensor(prompt + thought + act)
    segment = [Segment.PREFIX] * len(prompt) + [Segment.THINK] * len(thought) + [Segment.ACT] * len(act)
    slot = torch.zeros(len(ids), dtype=torch.bool)
    slot[len(prompt) + len(thought) + 1 : -2] = True
    return Example(ids, torch.tensor(segment), ids.clone(), slot)


def full_batch(policy: Policy, example: Example, pixels: torch.Tensor) -> Batch:
    layout = policy.processor.layout
    return make_batch(policy, [(example, pixels, torch.zeros(layout.chunk, layout.action_dim))])


def prompts_and_pixels(policy: Policy, rng: np.random.Generator, rows: int) -> tuple[list[list[int]], torch.Tensor]:
    layout = policy.processor.layout
    prompts = [layout.prompt(sentence(rng, 1, 9)) for _ in range(rows)]
    pixels = [policy.processor.pixels(random_observation(policy, rng)) for _ in range(rows)]
    return prompts, torch.stack(pixels)


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_cached_action_block_equals_the_full_forward(policy: Policy, seed: int) -> None:
    """Rows of mixed prompt and thought length, given thoughts: every logit of every action slot."""
    rng = np.random.default_rng(seed)
    layout, model = policy.processor.layout, policy.model
    prompts, pixels = prompts_and_pixels(policy, rng, 4)
    thoughts = [layout.thought(None if rng.random() < 0.3 else sentence(rng)) for _ in prompts]
    context = decoding.read(model, pixels, prompts, layout.vocabulary.pad_id)
    decoding.feed_thoughts(model, context, thoughts, layout.vocabulary.pad_id)
    cached = decoding.act_logits(model, context, layout)
    for row, (prompt, thought) in enumerate(zip(prompts, thoughts, strict=True)):
        hidden = model.encode(full_batch(policy, full_example(layout, prompt, thought), pixels[row]))[0]
        start = len(prompt) + len(thought)
        full = layout.bins.band(model.logits(hidden[start : start + layout.slots]))
        assert (cached[row] - full).abs().max() < 1e-9


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_greedy_thought_equals_recomputing_every_prefix(policy: Policy, seed: int) -> None:
    """Batched cached decoding against an uncached loop over single rows."""
    rng = np.random.default_rng(100 + seed)
    layout, model, words = policy.processor.layout, policy.model, policy.processor.layout.vocabulary
    prompts, pixels = prompts_and_pixels(policy, rng, 3)
    context = decoding.read(model, pixels, prompts, words.pad_id)
    thoughts = decoding.think(model, context, words, max_tokens=6)
    cached = decoding.act_logits(model, context, layout)
    for row, prompt in enumerate(prompts):
        ids: list[int] = []
        while ids[-2:] != [words.think_end_id, words.action_start_id]:
            sequence = torch.tensor([prompt + ids])
            segment = torch.tensor([[Segment.PREFIX] * len(prompt) + [Segment.THINK] * len(ids)])
            blank = torch.zeros_like(sequence, dtype=torch.bool)
            batch = Batch(pixels[row : row + 1], sequence, segment, sequence, blank, torch.zeros(1, 3, 7))
            scores = model.logits(model.encode(batch)[0, -1])
            scores[list(words.banned_in_thought)] = -torch.inf
            forced = words.action_start_id if ids[-1:] == [words.think_end_id] else words.think_end_id
            ids.append(forced if len(ids) >= 6 else int(scores.argmax()))
        assert thoughts[row].ids == ids
        hidden = model.encode(full_batch(policy, full_example(layout, prompt, ids[:-1]), pixels[row]))[0]
        start = len(prompt) + len(ids) - 1
        full = layout.bins.band(model.logits(hidden[start : start + layout.slots]))
        assert (cached[row] - full).abs().max() < 1e-9


class Script:
    """Stands for the model's head: each row writes its scripted tokens."""

    def __init__(self, policy: Policy, monkeypatch: pytest.MonkeyPatch, scripts: list[list[int]]) -> None:
        size, self.step = policy.processor.layout.vocabulary.size, 0

        def logits(hidden: torch.Tensor) -> torch.Tensor:
            scores = torch.zeros(len(scripts), size, dtype=torch.float64)
            for row, script in enumerate(scripts):
                scores[row, script[min(self.step, len(script) - 1)]] = 50.0
            self.step += 1
            return scores

        monkeypatch.setattr(policy.model, "logits", logits)


@torch.no_grad()
def test_stop_rule_cap_and_bans(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    words = policy.processor.layout.vocabulary
    open_, end, go, text = words.think_start_id, words.think_end_id, words.action_start_id, words.pad_id + 10
    scripts = [
        [open_, text, end, go],  # ordinary
        [open_, text, end, text, go, end, go],  # a lone </think> or <action> does not stop it
        [open_, text, text, text, text, text, text, text, text],  # never ends: closed at the cap
        [open_, *[words.eos_id] * 9],  # wants to write a banned id
        [open_, text, text, text, text, text, end, end],  # closes at the cap but does not act
        [open_, text, text, text, text, text, text, end, go],  # ends by itself exactly at the cap
    ]
    prompts, pixels = prompts_and_pixels(policy, rng, len(scripts))
    context = decoding.read(policy.model, pixels, prompts, words.pad_id)
    columns = context.segment_BT.shape[1]
    Script(policy, monkeypatch, scripts)
    thoughts = decoding.think(policy.model, context, words, max_tokens=7)
    assert [t.ids for t in thoughts[:3]] == [scripts[0], scripts[1], [open_, *[text] * 6, end, go]]
    assert [t.truncated for t in thoughts] == [False, False, True, True, True, False]
    assert not set(thoughts[3].ids) & set(words.banned_in_thought)
    assert thoughts[4].ids == [*scripts[4][:7], go]
    assert thoughts[5].ids == [open_, *[text] * 6, end, go]
    fed = (context.segment_BT[:, columns:] == Segment.THINK).sum(1).tolist()
    assert fed == [len(t.ids) - 1 for t in thoughts]  # all but <action>, which opens the action block


@torch.no_grad()
def test_sampling_follows_the_softmax_and_the_rows_own_seed(policy: Policy) -> None:
    rng = np.random.default_rng(6)
    words = policy.processor.layout.vocabulary
    prompts, pixels = prompts_and_pixels(policy, rng, 1)
    scores = torch.from_numpy(rng.normal(size=(1, 9)) * 2)
    uniform = torch.from_numpy((np.arange(20000) + 0.5) / 20000)
    drawn = decoding._sample(scores.expand(20000, -1), uniform)
    share = torch.bincount(drawn, minlength=9) / 20000
    assert torch.allclose(share.double(), scores[0].softmax(-1), atol=2e-4)
    scores[0, 3:] = -torch.inf
    assert decoding._sample(scores.expand(20000, -1), uniform).max() < 3

    def sample(rows: int, seed: int) -> list[int]:
        context = decoding.read(policy.model, pixels.expand(rows, -1, -1, -1, -1), prompts * rows, words.pad_id)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(rows)]
        thoughts = decoding.think(policy.model, context, words, max_tokens=12, temperature=1.0, generators=generators)
        return thoughts[0].ids

    assert sample(1, 3) == sample(4, 3)
    assert len({tuple(sample(1, seed)) for seed in range(5)}) > 1
