"""Drafts change how often the model runs, never what it writes."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from dtvla.policy.decoding import Thought
from dtvla.policy.policy import Policy
from dtvla.policy.vocabulary import Vocabulary
from dtvla.policy.writing import Draft, Writer

from .conftest import random_observation, sentence

Model = Callable[[Sequence[int], float], tuple[int, float]]

WORDS = Vocabulary(
    size=24,
    pad_id=0,
    eos_id=1,
    bos_id=2,
    image_id=3,
    think_start_id=4,
    think_end_id=5,
    action_start_id=6,
    action_end_id=7,
    action_first_id=20,
    action_count=4,
)


class Chain:
    """A random model whose next token depends on the last ``order`` tokens."""

    def __init__(self, seed: int, order: int) -> None:
        self.table, self.order = np.random.default_rng(seed).normal(size=(97, 20)) * 1.5, order

    def probabilities(self, ids: Sequence[int]) -> np.ndarray:
        scores = self.table[hash(tuple(ids[len(ids) - self.order :])) % 97].copy()
        scores[5] += 2.0 * (len(ids) > 8)
        scores[6] += 9.0 * (list(ids[-1:]) == [5])
        return np.exp(scores) / np.exp(scores).sum()

    def __call__(self, ids: Sequence[int], uniform: float) -> tuple[int, float]:
        """A token and its probability; the most likely one for a negative ``uniform``."""
        p = self.probabilities(ids)
        token = int(p.argmax()) if uniform < 0 else min(int(np.searchsorted(p.cumsum(), uniform, "right")), 19)
        return token, float(p[token])


def write(model: Model, max_tokens: int, seed: int | None, draft: Sequence[int] = (), block: int = 1) -> Thought:
    """Drive the real writer: a forward chooses behind the last token and behind each proposed one."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    writer = Writer(WORDS, max_tokens, draft, generator)
    while not writer.done:
        proposal = writer.propose(block - 1) if writer.thought.ids else []
        uniforms = writer.uniforms(len(proposal) + 1) or [-1.0] * (len(proposal) + 1)
        behind = [[*writer.thought.ids, *proposal[:i]] for i in range(len(proposal) + 1)]
        writer.take(proposal, [model(ids, uniform) for ids, uniform in zip(behind, uniforms, strict=True)])
    return writer.thought


def changed(ids: Sequence[int], rng: np.random.Generator, share: float) -> list[int]:
    """Some tokens replaced, dropped or doubled."""
    result: list[int] = []
    for token in ids:
        action = rng.choice(4, p=[1 - share, share / 3, share / 3, share / 3])
        result += [[token], [int(rng.integers(8, 20))], [], [token, token]][action]
    return result


def test_thousands_of_drafts_leave_the_thought_as_it_is() -> None:
    rng = np.random.default_rng(0)
    saved = 0
    for case in range(2000):
        model, limit = Chain(case % 40, order=int(rng.integers(1, 4))), int(rng.integers(1, 40))
        seed = None if case % 2 else case
        plain = write(model, limit, seed)
        draft = changed(plain.ids, rng, float(rng.choice([0.0, 0.05, 0.3, 1.0])))
        if case % 7 == 0:
            draft = rng.integers(0, 24, size=int(rng.integers(0, 30))).tolist()
        quick = write(model, limit, seed, draft, block=int(rng.integers(1, 20)))
        assert (quick.ids, quick.log_probs) == (plain.ids, plain.log_probs)
        assert (quick.truncated, quick.forced) == (plain.truncated, plain.forced)
        assert quick.forwards <= plain.forwards == len(plain.ids)
        saved += plain.forwards - quick.forwards
    assert saved > 6000


def test_sampled_thoughts_with_a_draft_follow_the_model_exactly() -> None:
    """Chi-square of whole thoughts over their exact probabilities."""
    model = Chain(3, order=1)

    draft = write(model, 3, seed=12345).ids
    counts: dict[tuple[int, ...], int] = {}
    draws = 5000
    for seed in range(draws):
        ids = write(model, 3, seed, draft, block=4).ids
        counts[tuple(ids[:3])] = counts.get(tuple(ids[:3]), 0) + 1
    exact = {ids: np.prod([model.probabilities(ids[:i])[own] for i, own in enumerate(ids)]) for ids in counts}
    common = {ids: float(exact[ids]) for ids, count in counts.items() if count >= 25}
    rest, rest_count = 1 - sum(common.values()), draws - sum(counts[ids] for ids in common)
    pairs = [(counts[ids], p * draws) for ids, p in common.items()] + [(rest_count, rest * draws)]
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in pairs)
    freedom = len(pairs) - 1
    assert freedom > 10
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("kind", ["replaced", "inserted", "dropped"])
def test_a_changed_word_does_not_end_the_speculation(kind: str) -> None:
    """A distinct-word thought of 60 tokens with one change costs a few forwards, not sixty."""
    true = [4, *np.random.default_rng(2).permutation(np.arange(8, 68)).tolist(), 5, 6]
    change = {"replaced": [99], "inserted": [99, true[30]], "dropped": []}[kind]
    draft = true[:30] + change + true[31:]
    place = {token: i for i, token in enumerate(true)}

    def model(ids: Sequence[int], uniform: float) -> tuple[int, float]:
        return true[min(len(ids), len(true) - 1)] if not ids or ids[-1] in place else 8, 1.0

    thought = write(model, 100, None, draft, block=16)
    assert thought.ids == true
    assert thought.forwards <= 8


def test_a_draft_takes_one_surprise_for_a_replaced_word_and_looks_around_after_two() -> None:
    draft = Draft([1, 2, 3, 9, 2, 3, 7, 5])
    written: list[int] = []
    for token, expected in [
        (1, [2, 3, 9]),
        (8, [3, 9, 2]),  # 2 was replaced
        (3, [9, 2, 3]),
        (9, [2, 3, 7]),
        (3, [3, 7, 5]),  # a surprise: taken for a replaced 2
        (7, [5]),  # another: 2 was dropped, "3 7" is the longest match
    ]:
        written.append(token)
        draft.follow(written)
        assert draft.propose(3) == expected


@pytest.mark.usefixtures("exact_norms")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_engine_writes_the_same_with_drafts_in_a_batch(policy: Policy, temperature: float) -> None:
    rng = np.random.default_rng(4)
    layout, engine = policy.processor.layout, policy.engine
    forwards = np.zeros(2)
    for case in range(8):
        rows = int(rng.integers(1, 5))
        prompts = [layout.prompt(sentence(rng, 1, 9)) for _ in range(rows)]
        pixels = torch.stack([policy.processor.pixels(random_observation(policy, rng)) for _ in range(rows)])
        results = []
        drafts: list[list[int]] | None = None
        for block in (None, None, 3):
            context = engine.read(pixels, prompts)
            generators = [torch.Generator().manual_seed(100 * case + row) for row in range(rows)]
            thoughts = engine.think(
                context,
                max_tokens=20,
                temperature=temperature,
                generators=generators,
                drafts=drafts,
                block=block,
            )
            results.append((thoughts, engine.act(context).bins_BA, engine.action_logits(context)))
            drafts = [changed(t.ids, rng, 0.05) if row % 3 < 2 else [] for row, t in enumerate(thoughts)]
            drafts = [[min(i, layout.vocabulary.size - 1) for i in draft] for draft in drafts]
        plain, bins, logits = results[0]
        for thoughts, other_bins, other_logits in results[1:]:
            assert [t.ids for t in thoughts] == [t.ids for t in plain]
            assert [t.truncated for t in thoughts] == [t.truncated for t in plain]
            np.testing.assert_allclose(
                [p for t in thoughts for p in t.log_probs], [p for t in plain for p in t.log_probs], atol=1e-9
            )
            assert torch.equal(bins, other_bins)
            assert (logits - other_logits).abs().max() < 1e-9
        assert all(t.forwards <= p.forwards for t, p in zip(results[1][0], plain, strict=True))
        forwards += np.array([plain[0].forwards, results[1][0][0].forwards])
    assert forwards[1] < forwards[0] / 2
