"""Wilson's interval against published numbers, its defining equation, and its coverage."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from dtvla.analysis.intervals import clustered_wilson, design_effect, wilson

Z95 = 1.959963984540054


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [
        (1936, 2000, 95.9, 97.5),  # published SFT
        (1941, 2000, 96.2, 97.7),  # published RL
        (1929, 2000, 95.5, 97.2),  # masked thought
        (1701, 2000, 83.4, 86.5),  # random thought
        (471, 500, 91.8, 95.9),  # published SFT on libero_10
    ],
)
def test_published_success_rates_have_their_published_intervals(
    successes: int, episodes: int, low: float, high: float
) -> None:
    rate = wilson(successes, episodes)
    assert round(100 * rate.low, 1) == low
    assert round(100 * rate.high, 1) == high


def test_ends_are_the_shares_whose_score_test_is_on_the_edge() -> None:
    """Independent formulation: scan all shares, keep those that a score test at 5 % would not reject."""
    shares = np.linspace(0.0, 1.0, 200_001)
    rng = np.random.default_rng(0)
    for _ in range(30):
        episodes = int(rng.integers(1, 600))
        successes = int(rng.integers(0, episodes + 1))
        error = np.sqrt(np.maximum(shares * (1 - shares), 1e-300) / episodes)
        kept = shares[np.abs(successes / episodes - shares) <= Z95 * error]
        rate = wilson(successes, episodes)
        assert math.isclose(rate.low, kept.min(), abs_tol=1e-5)
        assert math.isclose(rate.high, kept.max(), abs_tol=1e-5)


def test_interval_equals_scipys() -> None:
    rng = np.random.default_rng(1)
    for episodes in rng.integers(1, 700, 200).tolist():
        successes = int(rng.integers(0, episodes + 1))
        expected = binomtest(successes, episodes).proportion_ci(0.9, method="wilson")
        rate = wilson(successes, episodes, confidence=0.9)
        assert (rate.low, rate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_interval_is_informative_at_none_and_all_successes() -> None:
    none, every = wilson(0, 20), wilson(20, 20)
    assert none.low == 0.0
    assert 0.1 < none.high < 0.2
    assert every.high == 1.0
    assert 0.8 < every.low < 0.9
    assert none.high == pytest.approx(1 - every.low)


@pytest.mark.parametrize(("successes", "episodes"), [(0, 0), (5, 4), (-1, 4)])
def test_impossible_counts_are_refused(successes: int, episodes: int) -> None:
    with pytest.raises(ValueError, match="successes/episodes"):
        wilson(successes, episodes)


def test_clusters_of_one_are_independent_and_clusters_that_agree_count_once() -> None:
    assert clustered_wilson([(1, 1)] * 13 + [(0, 1)] * 7) == wilson(13, 20)
    alike, single = clustered_wilson([(10, 10)] * 13 + [(0, 10)] * 7), wilson(13, 20)
    assert (alike.successes, alike.episodes) == (130, 200)
    assert (alike.low, alike.high) == pytest.approx((single.low, single.high), abs=0.01)
    none, every = clustered_wilson([(0, 5)] * 4), clustered_wilson([(5, 5)] * 4)
    assert (none.high, every.low) == pytest.approx((wilson(0, 4).high, wilson(4, 4).low))
    lone, one = clustered_wilson([(3, 6)]), wilson(3, 6)
    assert lone.low < one.low < one.high < lone.high


def test_design_effect_is_that_of_the_analysis_of_variance() -> None:
    """Equal clusters of m: 1 + (m - 1) times the correlation within, which the mean squares give."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        clusters, size = int(rng.integers(20, 60)), int(rng.integers(2, 8))
        chance = rng.beta(0.5, 0.5, clusters)
        numbers = rng.random((clusters, size)) < chance[:, None]
        between = size * numbers.mean(axis=1).var(ddof=1)
        within = numbers.var(axis=1, ddof=1).mean()
        correlation = (between - within) / (between + (size - 1) * within)
        found = design_effect(numbers.sum(axis=1).tolist(), [size] * clusters, int(numbers.sum()))
        assert found == pytest.approx(1 + (size - 1) * correlation, rel=0.05)


@pytest.mark.parametrize("spread", [0.2, 1.0, 50.0])
def test_clustered_interval_covers_the_true_share(spread: float) -> None:
    """Thirty init states with one to nine seeds, that end nearly always or never alike; half of them succeed."""
    rng, hits, naive = np.random.default_rng(5), 0, 0
    for _ in range(2000):
        sizes = rng.integers(1, 10, 30)
        won = rng.binomial(sizes, rng.beta(spread, spread, 30))
        rate, alone = (
            clustered_wilson(list(zip(won.tolist(), sizes.tolist(), strict=True))),
            wilson(won.sum(), sizes.sum()),
        )
        hits += rate.low <= 0.5 <= rate.high
        naive += alone.low <= 0.5 <= alone.high
    assert 0.93 <= hits / 2000 <= 0.98
    assert spread > 1 or naive / 2000 < 0.85


def test_text_form_names_percent_and_interval() -> None:
    assert str(wilson(471, 500)) == "94.2 % (91.8-95.9)"
