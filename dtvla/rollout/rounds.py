"""Which groups of episodes are worth learning from, and how many more to collect: arithmetic on outcomes alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dtvla.errors import UserError


@dataclass(frozen=True)
class GroupOutcome:
    """How a group of episodes of one task and init state ended.

    Attributes:
        number: of its prompt among those of the iteration.
        size: episodes.
        successes: among them.
        decisions: of all of them.
        steps: simulated in all of them.
    """

    number: int
    size: int
    successes: int
    decisions: int
    steps: int


class Rounds:
    """The rounds of one iteration. What it decides is a function of the outcomes, the same on all ranks."""

    def __init__(
        self, needed: int, most: int, keep_success: Sequence[float] | None, max_rounds: int, surplus: int = 0
    ) -> None:
        """Begin an iteration.

        Args:
            needed: groups to keep, surplus included.
            most: groups of one round.
            keep_success: lowest and highest share of successes of a kept group, inclusive; None keeps all.
            max_rounds: with this many there have to be enough.
            surplus: groups that an earlier iteration left.
        """
        self.needed, self.most, self.keep_success, self.max_rounds = needed, most, keep_success, max_rounds
        self.surplus = surplus
        self.count = 0
        self.outcomes: list[GroupOutcome] = []

    @property
    def kept(self) -> list[GroupOutcome]:
        """Groups to learn from, in the order of their prompts."""
        return [outcome for outcome in self.outcomes if is_kept(outcome.successes, outcome.size, self.keep_success)]

    def next_prompts(self) -> range:
        """Prompts of the next round; none when there are enough groups.

        A round takes as many groups as are missing, or more when experience says that only a share of them will be
        kept: in short rounds simulators idle, as each round waits for its slowest episode.

        Raises:
            UserError: there are not enough after the last round.
        """
        collected, kept = len(self.outcomes), len(self.kept)
        missing = self.needed - self.surplus - kept
        if missing <= 0:
            return range(0)
        if self.count >= self.max_rounds:
            raise self._too_few()
        if collected:
            missing = -(-missing * collected // kept) if kept else self.most
        return range(collected, collected + min(missing, self.most))

    def add(self, outcomes: Iterable[GroupOutcome]) -> None:
        """Take note of a round's groups, in any order."""
        self.count += 1
        self.outcomes = sorted([*self.outcomes, *outcomes], key=lambda outcome: outcome.number)

    def _too_few(self) -> UserError:
        failed = sum(outcome.successes == 0 for outcome in self.outcomes)
        solved = sum(outcome.successes == outcome.size for outcome in self.outcomes)
        mixed = len(self.outcomes) - failed - solved
        keep = None if self.keep_success is None else list(self.keep_success)
        return UserError(
            f"data.max_rounds: after {self.count} rounds {len(self.kept)} of {self.needed - self.surplus} groups are "
            f"within data.keep_success={keep}; of {len(self.outcomes)} groups {failed} failed in all episodes, "
            f"{solved} succeeded in all, {mixed} are mixed; start from a policy that succeeds sometimes but not always "
            "(model.checkpoint), widen data.keep_success, choose other env.task_ids or data.init_states, or allow "
            "more rounds"
        )


def is_kept(successes: int, size: int, keep_success: Sequence[float] | None) -> bool:
    """Whether a group's share of successes lies within the bounds, which belong to them."""
    return keep_success is None or keep_success[0] <= successes / size <= keep_success[1]
