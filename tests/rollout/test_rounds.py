"""Which groups are kept and how many more are run: a pure function of outcomes, against counting by hand."""

from fractions import Fraction

import numpy as np
import pytest

from dtvla.errors import UserError
from dtvla.rollout.rounds import GroupOutcome, Rounds, is_kept


def outcome(number: int, size: int, successes: int) -> GroupOutcome:
    return GroupOutcome(number, size, successes, decisions=3 * size, steps=30 * size)


def test_thousands_of_iterations_end_with_enough_groups_and_waste_little() -> None:
    rng = np.random.default_rng(0)
    for case in range(2000):
        size, needed = int(rng.integers(2, 9)), int(rng.integers(1, 30))
        surplus = int(rng.integers(0, needed))
        low, high = sorted(int(k) for k in rng.integers(0, size + 1, 2))
        keep = None if case % 5 == 0 else (low / size, high / size)
        rate = rng.uniform(0, 1)
        rounds = Rounds(needed, needed, keep, max_rounds=10**6, surplus=surplus)
        seen: list[GroupOutcome] = []
        by_hand = 0
        while (numbers := rounds.next_prompts()) and len(seen) < 500:
            assert by_hand < needed - surplus, "no round when there are enough"
            assert list(numbers) == list(range(len(seen), len(seen) + len(numbers))), "every prompt once, in order"
            missing = needed - surplus - by_hand
            assert len(numbers) <= needed
            assert len(numbers) >= missing or len(numbers) == needed
            if not seen or by_hand == len(seen):
                assert len(numbers) == missing, "nothing is wasted while all groups are kept"
            new = [outcome(number, size, int(rng.binomial(size, rate))) for number in numbers]
            seen += new
            by_hand += sum(keep is None or low <= one.successes <= high for one in new)
            rounds.add([new[i] for i in rng.permutation(len(new))])  # ranks answer in any order
            assert rounds.outcomes == seen
        assert len(rounds.kept) == by_hand
        assert len(seen) >= 500 or needed <= surplus + by_hand < 2 * needed


def test_bounds_belong_to_the_shares_that_are_kept() -> None:
    for size in range(2, 33):
        for successes in range(size + 1):
            for tenth in range(11):
                share, bound = Fraction(successes, size), Fraction(tenth, 10)
                assert is_kept(successes, size, (tenth / 10, 1.0)) == (share >= bound)
                assert is_kept(successes, size, (0.0, tenth / 10)) == (share <= bound)
            assert is_kept(successes, size, None)
    assert [k for k in range(9) if is_kept(k, 8, (0.1, 0.9))] == [1, 2, 3, 4, 5, 6, 7], "the published filter"


def test_too_few_groups_are_an_error_that_says_what_was_found() -> None:
    rounds = Rounds(needed=4, most=4, keep_success=(0.3, 0.9), max_rounds=2)
    for successes in ([0, 0, 4, 1], [0, 4, 2, 1]):
        rounds.add(outcome(number, 4, count) for number, count in zip(rounds.next_prompts(), successes, strict=True))
    message = (
        "data.max_rounds: after 2 rounds 1 of 4 groups are within .*of 8 groups 3 failed in all episodes, "
        "2 succeeded in all, 3 are mixed"
    )
    with pytest.raises(UserError, match=message):
        rounds.next_prompts()


def test_the_last_allowed_round_may_still_fill_the_iteration() -> None:
    rounds = Rounds(needed=2, most=2, keep_success=(0.3, 0.9), max_rounds=1)
    rounds.add([outcome(0, 2, 1), outcome(1, 2, 1)])
    assert not rounds.next_prompts()


def test_a_third_of_groups_kept_needs_few_rounds_and_leaves_little_over() -> None:
    """About the survival that the published success rates give; as many as are missing would take a dozen rounds."""
    rng, counts, surplus = np.random.default_rng(1), [], []
    for _ in range(200):
        rounds = Rounds(needed=64, most=64, keep_success=(0.1, 0.9), max_rounds=100)
        while numbers := rounds.next_prompts():
            rounds.add(outcome(number, 8, 4 * int(rng.random() < 0.35)) for number in numbers)
        counts.append(rounds.count)
        surplus.append(len(rounds.kept) - 64)
    assert np.mean(counts) < 4.5
    assert max(counts) <= 8
    assert np.mean(surplus) < 3
