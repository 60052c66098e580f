"""Thoughts while they are written: stop rule, length cap, random numbers, and drafts to speculate with.

Speculation: tokens of a draft (the thought of the episode's previous decision) are fed together with the last written
token, and the model chooses a token at each of their positions. Choices are kept as long as the draft agrees with them;
the first that differs is kept too, and what the draft has behind it is dropped. Every kept choice was made behind
exactly the tokens that stand before it, with its own random number, so the result is the one without a draft, token
for token, greedy or sampled. (For a draft without probabilities of its own this is the rejection rule of Leviathan et
al., 2023: a draft token x is kept with probability p(x), and otherwise the token follows p without x.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dtvla.policy.vocabulary import Vocabulary

LONGEST_MATCH = 8  # a draft is re-aligned by at most so many tokens
FARTHEST_LONE_MATCH = 4  # a single equal token says little: it may re-align the draft by this many tokens


@dataclass
class Thought:
    """A decoded thought.

    Attributes:
        ids: everything after the prompt, up to and including ``<action>``.
        truncated: whether the length cap changed a token to close it.
        log_probs: of each id, at temperature 1 or that of sampling; 0 for those that the cap decided.
        forced: tokens at the end that the cap decided.
        forwards: passes of the model that chose at least one of the tokens.
    """

    ids: list[int] = field(default_factory=list)
    truncated: bool = False
    log_probs: list[float] = field(default_factory=list)
    forced: int = 0
    forwards: int = 0


class Draft:
    """A guess of what is about to be written."""

    def __init__(self, ids: Sequence[int]) -> None:
        """Start at the first token."""
        self.ids = list(ids)
        self.place = 0
        self._surprised = False

    def propose(self, most: int) -> list[int]:
        """The next tokens, ``most`` at most."""
        return self.ids[self.place : self.place + most]

    def follow(self, written: Sequence[int]) -> None:
        """Take note of the last written token.

        A first surprise counts as a word replaced by another. After a second in a row a word was dropped or added: the
        draft continues where its past has the longest match with what was written, the nearest of equals.
        """
        token, after = written[-1], self.place + 1
        surprised = self.ids[self.place : after] != [token]
        if surprised and self._surprised:
            places = [place + 1 for place, own in enumerate(self.ids) if own == token]
            scored = [(self._match(place, written), -abs(place - after), place) for place in places]
            match, nearness, best = max(scored, default=(0, 0, after))
            if match > 1 or (match == 1 and -nearness <= FARTHEST_LONE_MATCH):
                after = best
        self.place, self._surprised = after, surprised

    def _match(self, place: int, written: Sequence[int]) -> int:
        """Number of equal tokens just before a place of the draft and at the end of what was written."""
        length = 0
        while length < min(place, len(written), LONGEST_MATCH) and self.ids[place - 1 - length] == written[-1 - length]:
            length += 1
        return length


class Draws:
    """One random number in [0, 1) per token of a row, from the row's own generator."""

    def __init__(self, generator: torch.Generator) -> None:
        """Nothing is drawn yet."""
        self._generator = generator
        self._drawn: list[float] = []

    def at(self, first: int, count: int) -> list[float]:
        """The numbers of tokens ``first`` to ``first + count - 1``; asked twice, they are the same."""
        while len(self._drawn) < first + count:
            self._drawn.append(torch.rand((), generator=self._generator, dtype=torch.float64).item())
        return self._drawn[first : first + count]


class Writer:
    """Writes one row's thought from the model's choices."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        max_tokens: int,
        draft: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> None:
        """Begin an empty thought.

        Args:
            vocabulary: all ids.
            max_tokens: cap on its tokens, tags counted, before it is closed.
            draft: a thought that this one may resemble, up to and including ``<action>``.
            generator: on the CPU; None for a greedy thought.
        """
        self.thought = Thought()
        self.done = False
        self._words, self._max_tokens = vocabulary, max_tokens
        self._draft = Draft(draft)
        self._draws = None if generator is None else Draws(generator)

    def propose(self, most: int) -> list[int]:
        """Draft tokens to feed behind the last written token, ``most`` at most."""
        room = self._max_tokens - len(self.thought.ids)
        return self._draft.propose(max(min(most, room), 0))

    def uniforms(self, count: int) -> list[float]:
        """Random numbers of the next ``count`` tokens; empty for a greedy thought."""
        return [] if self._draws is None else self._draws.at(len(self.thought.ids), count)

    def take(self, proposal: Sequence[int], choices: Sequence[tuple[int, float]]) -> None:
        """Write what a forward chose.

        Args:
            proposal: the draft tokens that were fed.
            choices: the chosen token and its log-probability behind the last written token and behind each draft token.
        """
        self.thought.forwards += 1
        for index, (token, log_prob) in enumerate(choices):
            self._write(token, log_prob)
            if self.done or index == len(proposal) or self.thought.ids[-1] != proposal[index]:
                return

    def _write(self, token: int, log_prob: float) -> None:
        """Add a token, or the closing one at the cap."""
        thought, words = self.thought, self._words
        closed = thought.ids[-1:] == [words.think_end_id]
        if len(thought.ids) >= self._max_tokens:
            forced = words.action_start_id if closed else words.think_end_id
            thought.truncated = thought.truncated or forced != token
            thought.forced += 1
            token, log_prob = forced, 0.0
        thought.ids.append(token)
        thought.log_probs.append(log_prob)
        self._draft.follow(thought.ids)
        self.done = closed and token == words.action_start_id
