"""Two groups of episodes that cannot be paired: is the difference of their success rates more than chance?

Published results are counts; which episode succeeded is not told, so the paired test of
:mod:`dtvla.analysis.pairing` can't be used. What can be kept apart are the tasks: an easy and a hard task are never
thrown together, which the exact test for strata does.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dtvla.analysis.intervals import Rate

if TYPE_CHECKING:
    import numpy as np

# Tables as likely as the observed one count as such although their floating point numbers differ in the last digits.
TIE = 1.0 + 1e-7


class Stratum(NamedTuple):
    """Successes of A and B among their episodes of one task (or suite): a two-by-two table."""

    successes_a: int
    episodes_a: int
    successes_b: int
    episodes_b: int


def two_proportion_z(a: Rate, b: Rate) -> tuple[float, float]:
    """Score test of equal shares with the pooled variance: (z of B minus A, two-sided p-value).

    z is 0 and p is 1 where all or no episodes of both succeeded.
    """
    share = (a.successes + b.successes) / (a.episodes + b.episodes)
    variance = share * (1.0 - share) * (1.0 / a.episodes + 1.0 / b.episodes)
    z = (b.share - a.share) / math.sqrt(variance) if variance > 0.0 else 0.0
    return z, math.erfc(abs(z) / math.sqrt(2.0))


def difference_interval(a: Rate, b: Rate) -> tuple[float, float]:
    """Interval of B's share minus A's, inside [-1, 1], with the coverage that the intervals of both rates have.

    Method 10 of R. G. Newcombe, "Interval estimation for the difference between independent proportions", Statistics
    in Medicine 17 (1998): the distances from both shares to the ends of their Wilson intervals, added in squares.
    """
    difference = b.share - a.share
    low = difference - math.hypot(b.share - b.low, a.high - a.share)
    high = difference + math.hypot(b.high - b.share, a.share - a.low)
    return low, high


def exact_p(strata: Sequence[Stratum]) -> float:
    """Two-sided p-value of the exact test that A and B are equally good in every stratum.

    Given how many episodes of a stratum succeeded in all, A's part of them is hypergeometric when A and B are equally
    good; the distribution of the sum over strata is the convolution of these. The p-value sums what is no likelier
    than the observed sum. With one stratum this is Fisher's exact test, with several its extension by M. Zelen, "The
    analysis of several 2 x 2 contingency tables", Biometrika 58 (1971).

    Raises:
        ValueError: there is no stratum, or the counts of one are impossible.
    """
    import numpy as np

    if not strata:
        raise ValueError("strata: there are none")
    distribution, observed = np.ones(1), 0
    for stratum in strata:
        lowest, chances = _hypergeometric(stratum)
        distribution = np.convolve(distribution, chances)
        observed += stratum.successes_a - lowest
    p_value = distribution[distribution <= distribution[observed] * TIE].sum() / distribution.sum()
    return min(1.0, float(p_value))


def _hypergeometric(stratum: Stratum) -> tuple[int, "np.ndarray"]:
    """The fewest successes that A can have had, and the chances of this many, one more, ... given the margins."""
    import numpy as np
    from scipy.stats import hypergeom

    won_a, all_a, won_b, all_b = stratum
    if not (0 <= won_a <= all_a and 0 <= won_b <= all_b and all_a > 0 and all_b > 0):
        raise ValueError(f"strata: {stratum} is no table of successes among at least one episode each")
    won = won_a + won_b
    lowest, most = max(0, won - all_b), min(won, all_a)
    return lowest, hypergeom.pmf(np.arange(lowest, most + 1), all_a + all_b, won, all_a)
