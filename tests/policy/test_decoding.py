"""Cached thinking and acting against full forwards, in float64."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from dtvla.errors import UserError
from dtvla.policy.decoding import Context, Engine, Thought
from dtvla.policy.layout import Batch, Example, Layout, Segment
from dtvla.policy.policy import Policy
from dtvla.policy.runtime import choose
from dtvla.policy.writing import Writer

from .conftest import SETTINGS, make_batch, random_observation, sentence

pytestmark = pytest.mark.usefixtures("exact_norms")

SHAPES: list[dict[str, Any]] = [
    {"num_attention_heads": 2, "num_key_value_heads": 1},
    {"num_attention_heads": 4, "num_key_value_heads": 2},
    {"num_attention_heads": 3, "num_key_value_heads": 3},
]


@pytest.fixture(scope="module")
def autoregressive(make_policy: Callable[..., Policy]) -> Policy:
    return make_policy(decoder="autoregressive", slot_embedding=False)


def full_example(layout: Layout, prompt: list[int], thought: list[int], actions: list[int] | None = None) -> Example:
    """The whole sequence that a decision amounts to, built from its parts."""
    act = layout.act_block()
    if actions is not None:
        act = [act[0], *actions, *act[-2:]]
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


@torch.no_grad()
def action_logits(policy: Policy, prompt: list[int], thought: list[int], pixels: torch.Tensor) -> torch.Tensor:
    """(A, K) from one uncached forward."""
    layout, model = policy.processor.layout, policy.model
    hidden = model.encode(full_batch(policy, full_example(layout, prompt, thought), pixels))[0]
    start = len(prompt) + len(thought)
    return layout.bins.band(model.logits(hidden[start : start + layout.slots]))


@torch.no_grad()
def next_scores(policy: Policy, prompt: list[int], ids: list[int], pixels: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (V) of the next thought token from one uncached forward."""
    words = policy.processor.layout.vocabulary
    sequence = torch.tensor([prompt + ids])
    segment = torch.tensor([[Segment.PREFIX] * len(prompt) + [Segment.THINK] * len(ids)])
    blank = torch.zeros_like(sequence, dtype=torch.bool)
    batch = Batch(pixels[None], sequence, segment, sequence, blank, torch.zeros(1, 3, 7))
    scores = policy.model.logits(policy.model.encode(batch)[0, -1])
    scores[list(words.banned_in_thought)] = -torch.inf
    return scores.log_softmax(-1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_cached_action_block_equals_the_full_forward(
    make_policy: Callable[..., Policy], shape: dict[str, Any], seed: int
) -> None:
    """Rows of mixed prompt and thought length, given thoughts: every logit of every action slot."""
    policy = make_policy(text=SETTINGS["text"] | shape, slot_embedding=bool(seed % 2))
    rng = np.random.default_rng(seed)
    layout = policy.processor.layout
    prompts, pixels = prompts_and_pixels(policy, rng, int(rng.integers(1, 6)))
    thoughts = [layout.thought(None if rng.random() < 0.3 else sentence(rng)) for _ in prompts]
    context = policy.engine.read(pixels, prompts)
    policy.engine.feed(context, thoughts)
    cached = policy.engine.action_logits(context)
    for row, (prompt, thought) in enumerate(zip(prompts, thoughts, strict=True)):
        assert (cached[row] - action_logits(policy, prompt, thought, pixels[row])).abs().max() < 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_greedy_thought_equals_recomputing_every_prefix(policy: Policy, seed: int) -> None:
    """Batched cached decoding, where rows leave at different times, against an uncached loop over single rows."""
    rng = np.random.default_rng(100 + seed)
    words = policy.processor.layout.vocabulary
    prompts, pixels = prompts_and_pixels(policy, rng, 3)
    context = policy.engine.read(pixels, prompts)
    thoughts = policy.engine.think(context, max_tokens=6)
    cached = policy.engine.action_logits(context)
    for row, prompt in enumerate(prompts):
        ids: list[int] = []
        log_probs: list[float] = []
        while ids[-2:] != [words.think_end_id, words.action_start_id]:
            scores = next_scores(policy, prompt, ids, pixels[row])
            forced = words.action_start_id if ids[-1:] == [words.think_end_id] else words.think_end_id
            log_probs.append(0.0 if len(ids) >= 6 else float(scores.max()))
            ids.append(forced if len(ids) >= 6 else int(scores.argmax()))
        assert thoughts[row].ids == ids
        assert thoughts[row].forced == sum(p == 0 for p in log_probs)
        assert thoughts[row].forwards == len(ids)
        np.testing.assert_allclose(thoughts[row].log_probs, log_probs, atol=1e-9)
        assert (cached[row] - action_logits(policy, prompt, ids[:-1], pixels[row])).abs().max() < 1e-9


def test_a_context_can_be_rewound_and_is_refused_after_the_next_reading(policy: Policy) -> None:
    rng = np.random.default_rng(3)
    prompts, pixels = prompts_and_pixels(policy, rng, 2)
    engine, layout = policy.engine, policy.processor.layout
    context = engine.read(pixels, prompts)
    first = engine.think(context, max_tokens=9)
    with pytest.raises(ValueError, match="rewind"):
        engine.think(context, max_tokens=9)
    engine.rewind(context)
    engine.feed(context, [layout.thought("a red bowl"), layout.thought(None)])
    engine.rewind(context)
    assert [t.ids for t in engine.think(context, max_tokens=9)] == [t.ids for t in first]
    engine.read(pixels, prompts)
    with pytest.raises(ValueError, match="gone"):
        engine.act(context)


@pytest.mark.parametrize("decoder", ["hybrid", "autoregressive"])
def test_of_equally_likely_bins_the_highest_is_chosen_as_published(
    make_policy: Callable[..., Policy], decoder: str
) -> None:
    policy = make_policy(decoder=decoder, slot_embedding=False)
    bins, rng = policy.processor.layout.bins, np.random.default_rng(1)
    with torch.no_grad():
        policy.model.lm_head.weight[bins.first_id : bins.last_id + 1] = 0.0
    prompts, pixels = prompts_and_pixels(policy, rng, 2)
    context = policy.engine.read(pixels, prompts)
    policy.engine.feed(context, [policy.processor.layout.thought("bowl")] * 2)
    assert (policy.engine.act(context).bins_BA == bins.count - 1).all()


@pytest.mark.parametrize("seed", range(2))
@torch.no_grad()
def test_autoregressive_actions_equal_recomputing_every_prefix(autoregressive: Policy, seed: int) -> None:
    policy, rng = autoregressive, np.random.default_rng(seed)
    layout, model = policy.processor.layout, policy.model
    prompts, pixels = prompts_and_pixels(policy, rng, 3)
    thoughts = [layout.thought(None if rng.random() < 0.3 else sentence(rng)) for _ in prompts]
    context = policy.engine.read(pixels, prompts)
    policy.engine.feed(context, thoughts)
    actions = policy.engine.act(context)
    assert actions.forwards == layout.slots
    for row, (prompt, thought) in enumerate(zip(prompts, thoughts, strict=True)):
        ids = (layout.bins.last_id - actions.bins_BA[row]).tolist()
        hidden = model.encode(full_batch(policy, full_example(layout, prompt, thought, ids), pixels[row]))[0]
        start = len(prompt) + len(thought)
        expected = layout.bins.band(model.logits(hidden[start : start + layout.slots])).log_softmax(-1)
        assert torch.equal(expected.argmax(-1), actions.bins_BA[row])
        assert (expected.max(-1).values.float() - actions.log_probs_BA[row]).abs().max() < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_rows_that_end_at_different_times_do_not_disturb_each_other(policy: Policy, seed: int) -> None:
    """The stop pair is redefined as a pair that the model happens to write, so some rows stop early."""
    rng = np.random.default_rng(200 + seed)
    layout, words = policy.processor.layout, policy.processor.layout.vocabulary
    prompts, pixels = prompts_and_pixels(policy, rng, 5)

    def think(engine: Engine, rows: list[int]) -> tuple[Context, list[Thought]]:
        context = engine.read(pixels[rows], [prompts[row] for row in rows])
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return context, engine.think(context, max_tokens=14, temperature=2.0, generators=generators)

    plain = think(policy.engine, list(range(5)))[1]
    pairs = [pair for t in plain[1:4] for pair in pairwise(t.ids[1:9]) if len({*pair, *words.control_ids}) == 10]
    end, go = pairs[int(rng.integers(len(pairs)))]
    changed = replace(layout, vocabulary=replace(words, think_end_id=end, action_start_id=go))
    engine = Engine(policy.model, changed)
    context, together = think(engine, list(range(5)))
    assert len({len(t.ids) for t in together}) > 1
    together_BAK = engine.action_logits(context)
    for row in range(5):
        alone_context, (alone,) = think(engine, [row])
        assert together[row].ids == alone.ids
        assert together[row].ids[-2:] == [end, go]
        assert together[row].forwards == len(alone.ids)
        assert (together_BAK[row] - engine.action_logits(alone_context)[0]).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("ids", "length", "message"),
    [(-1, 3, "outside the vocabulary"), (10**6, 3, "outside the vocabulary"), (11, 900, "cache ends at 256")],
)
def test_ids_and_lengths_that_do_not_fit_are_named(policy: Policy, ids: int, length: int, message: str) -> None:
    rng = np.random.default_rng(8)
    (prompt,), pixels = prompts_and_pixels(policy, rng, 1)
    engine, text = policy.engine, [ids] * length
    with pytest.raises(UserError, match=f"prompt: .*{message}"):
        engine.read(pixels, [prompt + text])
    with pytest.raises(UserError, match=f"thought: .*{message}"):
        engine.feed(engine.read(pixels, [prompt]), [text])
    if length < 9:
        with pytest.raises(UserError, match=f"draft: .*{message}"):
            engine.think(engine.read(pixels, [prompt]), max_tokens=5, drafts=[text])
    else:
        with pytest.raises(UserError, match=f"thought: .*{message}"):
            engine.think(engine.read(pixels, [prompt]), max_tokens=length)


def test_pictures_that_do_not_fit_are_named(policy: Policy) -> None:
    (prompt,), pixels = prompts_and_pixels(policy, np.random.default_rng(9), 1)
    images = policy.processor.layout.image_tokens
    for wrong in (pixels[:, :1], pixels[..., :8], pixels.float(), pixels.expand(2, -1, -1, -1, -1)):
        with pytest.raises(UserError, match="pixels: "):
            policy.engine.read(wrong, [prompt])
    for other in (prompt[1:], [prompt[0], *prompt], prompt[:images], [*prompt, prompt[0]]):
        with pytest.raises(UserError, match="image tokens"):
            policy.engine.read(pixels, [other])


def test_choices_follow_the_softmax() -> None:
    rng = np.random.default_rng(6)
    logits = torch.from_numpy(rng.normal(size=(1, 1, 9)) * 2).expand(1, 20000, -1).contiguous()
    uniform = torch.from_numpy((np.arange(20000) + 0.5) / 20000)[None]
    for temperature in (0.5, 1.0, 1.6):
        expected = (logits[0, 0] / temperature).log_softmax(-1)
        drawn = choose(logits, temperature, uniform)[0]
        share = torch.bincount(drawn[:, 0].long(), minlength=9) / 20000
        assert torch.allclose(share.double(), expected.exp(), atol=2e-4)
        assert torch.allclose(drawn[:, 1], expected[drawn[:, 0].long()])
    greedy = choose(logits, 0.0, None)[0, 0]
    assert int(greedy[0]) == int(logits[0, 0].argmax())
    assert float(greedy[1]) == pytest.approx(float(logits[0, 0].log_softmax(-1).max()))
    logits[..., 3:] = -torch.inf
    assert choose(logits, 1.0, uniform)[..., 0].max() < 3


def test_banned_ids_have_no_probability(policy: Policy) -> None:
    """The whole table is cut to what a thought may contain, and ids keep their numbers."""
    words = policy.processor.layout.vocabulary
    policy.engine.runtime.refresh()
    hidden = torch.randn(1, 1, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    uniform = torch.from_numpy((np.arange(5000) + 0.5) / 5000)[None]
    with torch.inference_mode():
        drawn = policy.engine.runtime.thought_choices(hidden.expand(1, 5000, -1), 1.0, uniform)[0]
        scores = policy.model.logits(hidden[0, 0])
        scores[list(words.banned_in_thought)] = -torch.inf
    assert set(drawn[:, 0].long().tolist()) & set(words.control_ids) - {words.eos_id}
    assert torch.allclose(drawn[:, 1], scores.log_softmax(-1)[drawn[:, 0].long()])
    assert torch.isfinite(drawn).all()


def test_stop_rule_and_cap(policy: Policy) -> None:
    words = policy.processor.layout.vocabulary
    open_, end, go, text = words.think_start_id, words.think_end_id, words.action_start_id, words.pad_id + 10
    scripts = [
        [open_, *[text] * 6, text, text],  # never ends: closed at the cap
        [open_, text, end, text, go, end, go],  # a lone </think> or <action> does not stop it
        [open_, text, text, text, text, text, end, end],  # closes at the cap but does not act
        [open_, text, text, text, text, text, text, end, go],  # ends by itself exactly at the cap
    ]
    thoughts = []
    for script in scripts:
        writer = Writer(words, max_tokens=7)
        for token in script:
            assert not writer.done
            writer.take([], [(token, -0.5)])
        assert writer.done
        thoughts.append(writer.thought)
    assert [t.ids for t in thoughts] == [[open_, *[text] * 6, end, go], scripts[1], [*scripts[2][:7], go], scripts[3]]
    assert [t.truncated for t in thoughts] == [True, False, True, False]
    assert [t.forced for t in thoughts] == [2, 0, 1, 2]
    assert [t.log_probs[-3:] for t in thoughts[:2]] == [[-0.5, 0.0, 0.0], [-0.5] * 3]
