"""Confidence intervals of success rates.

Written out, because importing ``scipy.stats`` costs more seconds than any command here may take to answer; tests hold
them to scipy's numbers.
"""

import math
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


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> Rate:
    """Wilson's score interval of a binomial share (E. B. Wilson, JASA 22, 1927).

    It stays inside [0, 1], is never empty at 0 or all successes, and covers well at the 20 to 500 episodes that
    robot benchmarks run, where the normal approximation does not.

    Args:
        successes: number of successes, 0 .. episodes.
        episodes: number of trials, at least 1.
        confidence: two-sided coverage in (0, 1).

    Raises:
        ValueError: the counts or the confidence are out of range.
    """
    if episodes < 1 or not 0 <= successes <= episodes:
        raise ValueError(f"successes/episodes: {successes}/{episodes} is not a share of at least one episode")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence: {confidence} is not inside (0, 1)")
    share, z = successes / episodes, NormalDist().inv_cdf((1.0 + confidence) / 2.0)
    weight = 1.0 + z**2 / episodes
    middle = (share + z**2 / (2 * episodes)) / weight
    half = z / weight * math.sqrt(share * (1.0 - share) / episodes + z**2 / (4 * episodes**2))
    low = 0.0 if successes == 0 else middle - half
    high = 1.0 if successes == episodes else middle + half
    return Rate(successes, episodes, low, high)
