"""Two evaluations over the same episodes: who succeeded where, and whether the difference is more than chance.

Two policies that face the same init states fail on the same hard ones, so their episodes are compared pair by pair;
an unpaired comparison would need several times as many episodes to see the same difference.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dtvla.analysis.intervals import Rate, clustered_wilson, design_effect, wilson
from dtvla.errors import UserError
from dtvla.rollout.results import EpisodeResult, Key, Results, episode_key

# Settings that two evaluations are made to differ in, and those that pairing by key takes care of.
SUBJECT = ("checkpoint_sha256", "cot", "compat", "quantize")
SELECTION = ("suite", "task_ids", "init_states", "seed")
COMPUTED_ON = ("device", "dtype")  # recorded beside the settings


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

    def to_dict(self) -> dict[str, Any]:
        """Counts, both rates, the difference with its interval, and the p-value, for JSON."""
        low, high = self.interval
        return {
            **dict(zip(("both", "only_a", "only_b", "neither"), self.counts, strict=True)),
            "pairs": self.pairs,
            "init_states": len(self.states),
            "a": self.rate_a.to_dict(),
            "b": self.rate_b.to_dict(),
            "difference": {"value": self.difference, "low": low, "high": high},
            "p_value": self.p_value,
        }

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


@dataclass(frozen=True)
class Comparison:
    """What two evaluations say about each other.

    Attributes:
        total: all pairs.
        tasks: the pairs of every (suite, task id), in A's order.
        instructions: the words of every task.
        only_in_a: episodes that B did not run.
        only_in_b: episodes that A did not run.
        subject: settings that are compared: name to (A's value, B's value).
        warnings: differences that are not the subject but may explain the numbers, each a sentence.
    """

    total: Paired
    tasks: dict[tuple[str, int], Paired]
    instructions: dict[tuple[str, int], str]
    only_in_a: int
    only_in_b: int
    subject: dict[str, tuple[Any, Any]]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "total": self.total.to_dict(),
            "tasks": [
                {"suite": suite, "task_id": task, "instruction": self.instructions[suite, task], **pairs.to_dict()}
                for (suite, task), pairs in self.tasks.items()
            ],
            "only_in_a": self.only_in_a,
            "only_in_b": self.only_in_b,
            "subject": {name: {"a": a, "b": b} for name, (a, b) in self.subject.items()},
            "warnings": self.warnings,
        }


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


def compare(a: Results, b: Results) -> Comparison:
    """Pair the episodes of two evaluations by suite, task, init state and seed.

    Raises:
        UserError: an episode stands twice in one of them, or they have no episode in common.
    """
    episodes_a, episodes_b = _by_key("a", a), _by_key("b", b)
    common = [key for key in episodes_a if key in episodes_b]
    if not common:
        raise UserError(
            f"a, b: no episode in common (a: {_what(a)}; b: {_what(b)}); evaluate both on the same suite, tasks, "
            "init states and seed"
        )
    outcomes = {key: (episodes_a[key].success, episodes_b[key].success) for key in common}
    tasks = list(dict.fromkeys(key[:2] for key in common))
    return Comparison(
        total=tally(outcomes),
        tasks={task: tally({k: pair for k, pair in outcomes.items() if k[:2] == task}) for task in tasks},
        instructions={key[:2]: episodes_a[key].instruction for key in common},
        only_in_a=len(episodes_a) - len(common),
        only_in_b=len(episodes_b) - len(common),
        subject=_differences(_subject(a), _subject(b)),
        warnings=_warnings(a, b),
    )


def _warnings(a: Results, b: Results) -> list[str]:
    found = [
        f"{name} differs: {_shown(old)} in A, {_shown(new)} in B"
        for name, (old, new) in _differences(_surroundings(a), _surroundings(b)).items()
    ]
    words = {(e.suite, e.task_id): e.instruction for e in a.episodes}
    changed = {
        (e.suite, e.task_id) for e in b.episodes if words.get((e.suite, e.task_id), e.instruction) != e.instruction
    }
    found += [f"instruction of {suite} task {task} differs" for suite, task in sorted(changed)]
    if a.settings == b.settings:
        found.append("A and B have the same settings: differences are chance or defects, not a change of the policy")
    return found


def _surroundings(results: Results) -> dict[str, Any]:
    """What should be equal on both sides: simulation settings, device, type of numbers, versions of packages."""
    settings = {k: v for k, v in results.settings.items() if k not in (*SUBJECT, *SELECTION)}
    settings |= {name: results.provenance.get(name) for name in COMPUTED_ON}
    versions = results.provenance.get("versions", {})
    return {**settings, **{f"version of {package}": version for package, version in versions.items()}}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}


def _subject(results: Results) -> dict[str, Any]:
    """The settings under study, those of groups as ``group.name``."""
    flat: dict[str, Any] = {}
    for name in SUBJECT:
        value = results.settings.get(name)
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _shown(value: Any) -> str:
    return "not recorded" if value is None else str(value)


def _what(results: Results) -> str:
    return f"{results.settings.get('suite')}, seed {results.settings.get('seed')}, {len(results.episodes)} episodes"


def _by_key(name: str, results: Results) -> dict[Key, EpisodeResult]:
    episodes: dict[Key, EpisodeResult] = {}
    for episode in results.episodes:
        key = episode_key(episode)
        if key in episodes:
            raise UserError(
                f"{name}: {episode.suite} task {episode.task_id}, init state {episode.init_state}, seed {episode.seed}"
                " stands twice in it, so that it cannot be paired; evaluate again into another folder"
            )
        episodes[key] = episode
    return episodes
