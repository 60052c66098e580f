"""Confidence intervals of success rates.

Written out, because importing ``scipy.stats`` costs more seconds than any command here may take to answer; tests hold
them to scipy's numbers.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Rate:
    """A share of successes with its confidence interval.

    Attributes:
        successes: episodes that succeeded.
        episodes: episodes that were run, at least 1.
        low: lower end of the interval, a share in [0, 1].
        high: upper end of the interval, a share in [0, 1].
    """

    successes: int
    episodes: int
    low: float
    high: float

    @property
    def share(self) -> float:
        """Successes over episodes, in [0, 1]."""
        return self.successes / self.episodes

    def __str__(self) -> str:
        """Percent with interval: ``94.2 % (91.8-95.9)``."""
        return f"{100 * self.share:.1f} % ({100 * self.low:.1f}-{100 * self.high:.1f})"

    def to_dict(self) -> dict[str, float | int]:
        """The fields and the rate, for JSON."""
        return {
            "successes": self.successes,
            "episodes": self.episodes,
            "rate": self.share,
            "low": self.low,
            "high": self.high,
        }


def wilson(successes: int, episodes: int, confidence: float = 0.95, *, design_effect: float = 1.0) -> Rate:
    """Wilson's score interval of a binomial share (E. B. Wilson, JASA 22, 1927).

    It stays inside [0, 1], is never empty at 0 or all successes, and covers well at the 20 to 500 episodes that
    robot benchmarks run, where the normal approximation does not.

    Args:
        successes: number of successes, 0 .. episodes.
        episodes: number of trials, at least 1.
        confidence: two-sided coverage in (0, 1).
        design_effect: of :func:`design_effect`, by which the episodes count for fewer than they are.

    Raises:
        ValueError: the counts or the confidence are out of range.
    """
    if episodes < 1 or not 0 <= successes <= episodes:
        raise ValueError(f"successes/episodes: {successes}/{episodes} is not a share of at least one episode")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: {confidence} is not inside (0, 1)")
    share, z = successes / episodes, NormalDist().inv_cdf((1.0 + confidence) / 2.0)
    number = episodes / design_effect
    weight = 1.0 + z**2 / number
    middle = (share + z**2 / (2 * number)) / weight
    half = z / weight * math.sqrt(share * (1.0 - share) / number + z**2 / (4 * number**2))
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == episodes else middle + half
    return Rate(successes, episodes, low, high)


def clustered_wilson(clusters: Collection[tuple[int, int]]) -> Rate:
    """Wilson's 95 % interval of outcomes that are alike within clusters, such as the seeds of an init state.

    The number of episodes is divided by the design effect (E. Korn, B. Graubard, Survey Methodology 24, 1998). Where
    every cluster has one episode this is :func:`wilson`.

    Args:
        clusters: successes and episodes of each.
    """
    successes, sizes = [won for won, _ in clusters], [size for _, size in clusters]
    effect = design_effect(successes, sizes, sum(successes))
    return wilson(sum(successes), sum(sizes), design_effect=effect)


def design_effect(sums: Collection[int], sizes: Collection[int], squares: int) -> float:
    """How many times as large the variance of a mean is as if its numbers were independent, at least 1.

    (L. Kish, "Survey Sampling", 1965: the variance between clusters over that of a simple random sample.) Where this
    can't be estimated, the numbers of a cluster count as one.

    Args:
        sums: of the numbers of each cluster.
        sizes: how many numbers each cluster has.
        squares: sum of the squares of all numbers.
    """
    number, clusters = sum(sizes), len(sizes)
    if clusters == number:
        return 1.0
    mean = sum(sums) / number
    alone = (squares / number - mean**2) / (number - 1)
    if clusters == 1 or alone <= 0.0:
        return number / clusters
    spread = sum((part - mean * size) ** 2 for part, size in zip(sums, sizes, strict=True))
    return max(1.0, clusters / (clusters - 1) * spread / number**2 / alone)
