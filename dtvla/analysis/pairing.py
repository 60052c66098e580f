"""Two policies over the same episodes: who succeeded where, and whether the difference is more than chance.

Two policies that face the same init states fail on the same hard ones, so their episodes are compared pair by pair;
an unpaired comparison would need several times as many episodes to see the same difference.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from dtvla.analysis.intervals import Rate, clustered_wilson, design_effect, wilson
from dtvla.rollout.results import Key


@dataclass(frozen=True)
class Paired:
    """Outcomes of pairs of episodes; those of an init state with other seeds are not independent of each other.

    Attributes:
        states: for each init state, in how many of its pairs both succeeded, only A, only B, neither.
    """

    states: tuple[tuple[int, int, int, int], ...]

    @cached_property
    def counts(self) -> tuple[int, int, int, int]:
        """Of all pairs: both succeeded, only A, only B, neither."""
        both, only_a, only_b, neither = map(sum, zip(*self.states, strict=True))
        return both, only_a, only_b, neither

    @property
    def both(self) -> int:
        """Pairs in which A and B succeeded."""
        return self.counts[0]

    @property
    def only_a(self) -> int:
        """Pairs in which only A succeeded."""
        return self.counts[1]

    @property
    def only_b(self) -> int:
        """Pairs in which only B succeeded."""
        return self.counts[2]

    @property
    def neither(self) -> int:
        """Pairs in which both failed."""
        return self.counts[3]

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return sum(self.counts)

    @cached_property
    def rate_a(self) -> Rate:
        """Success rate of A with its Wilson interval."""
        return clustered_wilson([(both + a, sum(state)) for state in self.states for both, a, _, _ in [state]])

    @cached_property
    def rate_b(self) -> Rate:
        """Success rate of B with its Wilson interval."""
        return clustered_wilson([(both + b, sum(state)) for state in self.states for both, _, b, _ in [state]])

    @property
    def difference(self) -> float:
        """Success rate of B minus that of A, in [-1, 1]."""
        return (self.only_b - self.only_a) / self.pairs

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 % interval of :attr:`difference`.

        Method 10 of R. G. Newcombe, "Improved confidence intervals for the difference between binomial proportions
        based on paired data", Statistics in Medicine 17 (1998): the distances from both rates to the ends of their
        Wilson intervals, added as sides of a triangle whose angle is the correlation of the outcomes. It stays inside
        [-1, 1] and has a width when the pairs all agree, which the bootstrap has not. Several seeds of an init state
        count for fewer pairs by their design effect.
        """
        effect = design_effect(self._changes, list(map(sum, self.states)), self.only_a + self.only_b)
        a, b = (wilson(rate.successes, self.pairs, design_effect=effect) for rate in (self.rate_a, self.rate_b))
        phi = self._correlation(effect)

        def side(one: float, other: float) -> float:
            return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))

        low = self.difference - side(b.share - b.low, a.high - a.share)
        high = self.difference + side(a.share - a.low, b.high - b.share)
        return max(-1.0, low), min(1.0, high)

    @cached_property
    def p_value(self) -> float:
        """Two-sided p-value of McNemar's exact test, or of its generalisation to several seeds, see `flip_test`."""
        return flip_test(self._changes)

    @cached_property
    def _changes(self) -> list[int]:
        """Successes of B minus those of A on every init state."""
        return [only_b - only_a for _, only_a, only_b, _ in self.states]

    def _correlation(self, effect: float) -> float:
        """Correlation of the outcomes with Newcombe's continuity correction; 0 when a policy always does the same."""
        product = self.both * self.neither - self.only_a * self.only_b
        successes_a, successes_b = self.rate_a.successes, self.rate_b.successes
        margins = successes_a * (self.pairs - successes_a) * successes_b * (self.pairs - successes_b)
        corrected = max(0.0, product - effect * self.pairs / 2) if product > 0 else product
        return corrected / math.sqrt(margins) if margins else 0.0


def tally(outcomes: Mapping[Key, tuple[bool, bool]]) -> Paired:
    """Count pairs of outcomes, (A succeeded, B succeeded) for the key of every episode."""
    states: dict[tuple[str, int, int], list[int]] = {}
    for (suite, task_id, init_state, _), (a, b) in outcomes.items():
        states.setdefault((suite, task_id, init_state), [0, 0, 0, 0])[2 * (not a) + (not b)] += 1
    return Paired(tuple((both, a, b, neither) for both, a, b, neither in states.values()))


def flip_test(differences: Iterable[int]) -> float:
    """Two-sided p-value of the sum of whole numbers when each is as likely to have the other sign; exact.

    With differences of -1, 0 and 1 it is McNemar's exact test. With several seeds on one init state, a difference is
    the sum of theirs, so that they are exchanged together: they are not independent of each other.
    (R. A. Fisher's randomisation test of paired differences, "The Design of Experiments", 1935.)

    Args:
        differences: successes of B minus those of A, for each init state.
    """
    sizes = [int(d) for d in differences if d]
    ways = Counter({0: 1})
    for size in sizes:
        both: Counter[int] = Counter()
        for total, count in ways.items():
            both[total + size] += count
            both[total - size] += count
        ways = both
    extreme = sum(count for total, count in ways.items() if abs(total) >= abs(sum(sizes)))
    return extreme / 2 ** len(sizes)
