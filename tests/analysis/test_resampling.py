"""Bootstrap, exchange and Holm's correction against enumeration and scipy."""

from itertools import combinations, product

import numpy as np
import pytest
from scipy.stats import binomtest, permutation_test

from dtvla.analysis.pairing import Paired
from dtvla.analysis.resampling import bootstrap_ratio, flip_test, holm
from dtvla.errors import UserError


def test_bootstrap_has_the_quantiles_of_all_possible_draws() -> None:
    """Two strata of 4 and 3 clusters: 4^4 x 3^3 equally likely draws."""
    rng = np.random.default_rng(0)
    strata = [np.stack([rng.integers(-2, 3, k), rng.integers(1, 4, k)], axis=1) for k in (4, 3)]
    ratios = []
    for places in product(*[range(4)] * 4, *[range(3)] * 3):
        chosen = np.concatenate([strata[0][list(places[:4])], strata[1][list(places[4:])]])
        ratios.append(chosen[:, 0].sum() / chosen[:, 1].sum())
    for confidence in (0.8, 0.95):
        tails = [(1 - confidence) / 2, (1 + confidence) / 2]
        below, above = (np.quantile(ratios, np.clip([t - 0.004, t + 0.004], 0, 1)) for t in tails)
        low, high = bootstrap_ratio(strata, n_boot=100_000, seed=1, confidence=confidence)
        assert below[0] <= low <= below[1]
        assert above[0] <= high <= above[1]


def test_strata_are_kept_apart() -> None:
    """An easy and a hard task that each always go the same way leave nothing to chance; thrown together they would."""
    easy, hard = np.array([[1, 1]] * 20), np.array([[0, 1]] * 20)
    assert bootstrap_ratio([easy, hard]) == (0.5, 0.5)
    low, high = bootstrap_ratio([np.concatenate([easy, hard])])
    assert low < 0.4 < 0.6 < high


def test_bootstrap_covers_the_true_difference() -> None:
    """A hundred pairs of ten tasks, several seeds on each init state that succeed together: 95 % is promised."""
    rng, hits = np.random.default_rng(2), 0
    for _ in range(400):
        changes = rng.choice([-1, 0, 1], (10, 10), p=[0.1, 0.6, 0.3])
        strata = [np.stack([4 * row, np.full(10, 4)], axis=1) for row in changes]
        low, high = bootstrap_ratio(strata, n_boot=400, seed=int(rng.integers(1 << 30)))
        hits += low <= 0.2 <= high
    assert 0.90 <= hits / 400 <= 0.98


def test_the_same_seed_gives_the_same_interval() -> None:
    strata = [np.random.default_rng(0).random((9, 2))]
    assert bootstrap_ratio(strata, seed=3) == bootstrap_ratio(strata, seed=3) != bootstrap_ratio(strata, seed=4)


def test_bad_numbers_are_refused() -> None:
    strata = [np.array([[1, 1], [0, 1]])]
    with pytest.raises(UserError, match=r"^n_boot: found 10; "):
        bootstrap_ratio(strata, n_boot=10)
    with pytest.raises(UserError, match=r"^confidence: found 95; "):
        bootstrap_ratio(strata, confidence=95)
    with pytest.raises(ValueError, match="add up to 0"):
        bootstrap_ratio([np.array([[0, 0], [0, 1]])])


def test_flips_of_single_episodes_are_mcnemars_exact_test() -> None:
    for lost, won in np.random.default_rng(0).integers(0, 120, (60, 2)).tolist():
        found = flip_test([-1] * lost + [1] * won + [0] * 7)
        assert found == pytest.approx(Paired(3, lost, won, 4).p_value, rel=1e-9)
        if lost + won:
            assert found == pytest.approx(binomtest(won, lost + won).pvalue, rel=1e-9)
    assert flip_test([]) == flip_test([0, 0]) == 1.0


def test_flips_of_clusters_equal_scipys_permutation_test() -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        differences = rng.integers(-5, 6, int(rng.integers(2, 11)))
        exact = permutation_test(
            (differences.astype(float),), np.sum, permutation_type="samples", n_resamples=np.inf, vectorized=False
        )
        assert flip_test(differences.tolist()) == pytest.approx(exact.pvalue, rel=1e-9)


def test_seeds_that_agree_count_once() -> None:
    """Ten seeds with one outcome are no ten witnesses: the p-value is that of one seed."""
    assert flip_test([10] * 6 + [-10] * 1) == pytest.approx(flip_test([1] * 6 + [-1] * 1))


def test_holm_is_closed_testing_with_bonferroni() -> None:
    """A hypothesis falls when every set of hypotheses with it falls: the largest Bonferroni p among these sets."""
    rng = np.random.default_rng(3)
    for _ in range(40):
        values = (rng.random(int(rng.integers(1, 8))) ** 3).round(2).tolist()
        expected = [
            max(
                min(1.0, len(group) * min(values[j] for j in group))
                for size in range(1, len(values) + 1)
                for group in combinations(range(len(values)), size)
                if i in group
            )
            for i in range(len(values))
        ]
        assert holm(values) == pytest.approx(expected)
    assert holm([]) == []
