"""Limits of what is asked of an endpoint: how often, and for how much."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from threading import Condition, Event, Lock

from dtvla.errors import UserError


class Stopped(BaseException):
    """No more requests go out; no ``Exception``, for a client would repeat what such a one ended."""


class Pace:
    """Spaces requests of all threads evenly, until it is stopped."""

    def __init__(self, per_minute: float | None) -> None:
        """Allow so many a minute; None for any number."""
        self._interval = 60 / per_minute if per_minute else 0.0
        self._free, self._lock, self._end = 0.0, Lock(), Event()

    def wait(self) -> None:
        """Return when it is this request's turn; raises :class:`Stopped` when there are no more turns."""
        with self._lock:
            turn = max(self._free, time.monotonic())
            self._free = turn + self._interval
        if self._end.wait(max(0.0, turn - time.monotonic())):
            raise Stopped

    def stop(self) -> None:
        """Let no request out any more."""
        self._end.set()


class Budget:
    """Keeps what is spent within a limit, though the cost of a request is known only after it.

    A request is let through when there is room for it and all that are under way, each as dear as the dearest so far.
    Where none is known yet, the first goes alone.
    """

    def __init__(self, limit: float | None, spent: float = 0.0, dearest: float = 0.0) -> None:
        """Start with what was spent before; a limit of None is none."""
        self.spent = spent
        self._limit, self._dearest, self._under_way = limit, dearest, 0
        self._unknown = False  # whether an answer came without its cost
        self._settled = Condition()

    @contextmanager
    def request(self) -> Iterator[Callable[[float | None], None]]:
        """Hold room for one request; call what is yielded with its cost, None where that is not known.

        Raises:
            UserError: the limit may be passed by another request, or there is no telling.
        """
        with self._settled:
            self._settled.wait_for(self._room)
            self._under_way += 1
        try:
            yield self._pay
        finally:
            with self._settled:
                self._under_way -= 1
                self._settled.notify_all()

    def _room(self) -> bool:
        if self._limit is None:
            return True
        if self._unknown:
            raise UserError(
                "annotator.max_cost: the endpoint does not say how many tokens it used, so costs can't be limited; the "
                "answer is kept: set max_cost to null and watch the costs elsewhere"
            )
        if self.spent + self._dearest > self._limit:
            raise UserError(
                f"annotator.max_cost: {self.spent:.4f} of {self._limit:g} is spent and one more answer may cost "
                f"{self._dearest:.4f}; all answers are kept: raise it and run the same command again"
            )
        planned = self._under_way + 1
        return planned == 1 or (self._dearest > 0 and self.spent + planned * self._dearest <= self._limit)

    def _pay(self, cost: float | None) -> None:
        with self._settled:
            self._unknown |= cost is None
            self.spent += cost or 0.0
            self._dearest = max(self._dearest, cost or 0.0)


@dataclass(frozen=True)
class Prices:
    """What a million tokens cost; None where that is not known.

    Attributes:
        asked: of requests.
        answered: of answers.
    """

    asked: float | None = None
    answered: float | None = None

    def __post_init__(self) -> None:
        """Refuse one price without the other, and prices below zero."""
        known = [price for price in (self.asked, self.answered) if price is not None]
        if len(known) == 1 or any(not 0 <= price < inf for price in known):
            raise UserError(
                f"annotator.price_in: found price_in={self.asked} and price_out={self.answered}; give both, "
                "each for a million tokens, or none"
            )

    def cost(self, tokens_in: int | None, tokens_out: int | None) -> float | None:
        """What a request cost; None where that is not known."""
        if self.asked is None or self.answered is None or tokens_in is None or tokens_out is None:
            return None
        return (tokens_in * self.asked + tokens_out * self.answered) / 1e6
