"""Uncertainty of outcomes that come in clusters, by resampling and by exchange; and of several tests at once."""

from collections.abc import Sequence

import numpy as np

from dtvla.errors import UserError


def bootstrap_ratio(
    strata: Sequence[np.ndarray], *, n_boot: int = 10_000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of a ratio of two sums over clusters, which are drawn anew within each stratum.

    B. Efron, R. Tibshirani, "An Introduction to the Bootstrap" (1993), chapters 13 and 16. Clusters with equal numbers
    need not be told apart, so that a stratum is one multinomial draw over its different clusters.

    Args:
        strata: for each stratum numbers (K, 2), numerator and denominator of its K clusters.
        n_boot: number of draws.
        seed: of the draws.
        confidence: two-sided coverage in (0, 1).

    Returns:
        Lower and upper end; both are the ratio itself where all clusters of every stratum are alike.

    Raises:
        UserError: too few draws, or a confidence outside (0, 1).
        ValueError: the denominators add up to nothing.
    """
    if n_boot < 100:
        raise UserError(f"n_boot: found {n_boot}; use at least 100 draws, 10000 for two digits")
    if not 0.0 < confidence < 1.0:
        raise UserError(f"confidence: found {confidence}; use a share between 0 and 1, such as 0.95")
    rng = np.random.default_rng(seed)
    sums_B2 = np.zeros((n_boot, 2))
    for clusters_K2 in strata:
        kinds_U2, counts_U = np.unique(clusters_K2, axis=0, return_counts=True)
        drawn_BU = rng.multinomial(counts_U.sum(), counts_U / counts_U.sum(), size=n_boot)
        sums_B2 += drawn_BU @ kinds_U2
    if not sums_B2[:, 1].all():
        raise ValueError("strata: the denominators of a draw add up to 0; leave out clusters that have none")
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(sums_B2[:, 0] / sums_B2[:, 1], [tail, 1.0 - tail])
    return float(low), float(high)


def flip_test(differences: Sequence[int]) -> float:
    """Two-sided p-value of the sum of whole numbers when each is as likely to have the other sign; exact.

    With differences of -1, 0 and 1 it is McNemar's exact test. With several episodes on one init state, a difference
    is the sum of theirs, so that they are exchanged together: they are not independent of each other.
    (R. A. Fisher's randomisation test of paired differences, "The Design of Experiments", 1935.)

    Args:
        differences: successes of one arm minus those of the other, for each cluster.
    """
    sizes = [abs(int(d)) for d in differences if d]
    reach = sum(sizes)
    chances: np.ndarray = np.zeros(2 * reach + 1)  # of every sum from -reach to reach
    chances[reach] = 1.0
    for size in sizes:
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2
    observed = abs(sum(int(d) for d in differences))
    extreme = np.abs(np.arange(-reach, reach + 1)) >= observed
    return min(1.0, float(chances[extreme].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (S. Holm, Scandinavian Journal of Statistics 6, 1979), in the given order.

    The chance of even one false alarm among all of them stays below the level they are held against, however the
    tests depend on each other.
    """
    order = np.argsort(p_values)
    factors = np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.maximum.accumulate(np.asarray(p_values)[order] * factors).clip(max=1.0)
    return [float(p) for p in corrected]
