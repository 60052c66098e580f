"""Wilson's interval against published numbers, its defining equation, and its coverage."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from dtvla.analysis.intervals import wilson

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


def test_text_form_names_percent_and_interval() -> None:
    assert str(wilson(471, 500)) == "94.2 % (91.8-95.9)"
