"""Uncertainty of outcomes that come in clusters, by resampling; and of several tests at once."""

from collections.abc import Sequence

import numpy as np

from dtvla.errors import UserError


def bootstrap_ratio(strata: Sequence[np.ndarray], *, n_boot: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of a ratio of two sums over clusters, which are drawn anew within each stratum.

    Of K clusters K - 1 are drawn, without which strata of few clusters would vary too little (P. McCarthy, C. Snowden,
    "The Bootstrap and Finite Population Sampling", 1985); strata of one cluster are joined with another small one.
    Clusters with equal numbers need not be told apart, so that a stratum is one multinomial draw over its different
    clusters.

    Args:
        strata: for each stratum numbers (K, 2), numerator and denominator of its K clusters.
        n_boot: number of draws.
        seed: of the draws.

    Returns:
        Lower and upper end; both are the ratio itself where all clusters of every stratum are alike.

    Raises:
        UserError: too few draws.
        ValueError: there is a single cluster, or the denominators add up to nothing.
    """
    if n_boot < 100:
        raise UserError(f"n_boot: found {n_boot}; use at least 100 draws, 10000 for two digits")
    groups = sorted(strata, key=len)
    while len(groups) > 1 and len(groups[0]) == 1:
        groups = sorted([*groups[2:], np.concatenate(groups[:2])], key=len)
    if len(groups[0]) < 2:
        raise ValueError("strata: a single cluster does not tell how much clusters vary")
    rng = np.random.default_rng(seed)
    sums_B2 = np.zeros((n_boot, 2))
    for clusters_K2 in groups:
        kinds_U2, counts_U = np.unique(clusters_K2, axis=0, return_counts=True)
        size = counts_U.sum()
        drawn_BU = rng.multinomial(size - 1, counts_U / size, size=n_boot)
        sums_B2 += drawn_BU @ kinds_U2 * size / (size - 1)
    if not sums_B2[:, 1].all():
        raise ValueError("strata: the denominators of a draw add up to 0; leave out clusters that have none")
    low, high = np.quantile(sums_B2[:, 0] / sums_B2[:, 1], [0.025, 0.975])
    return float(low), float(high)


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
