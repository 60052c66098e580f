"""A hand that moves two items about without any physics, and what a simulator would know of it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dtvla.cot.hindsight import Track

OPEN_M = 0.078
BOWL, SOUP = np.array([0.1, 0.2, 0.02]), np.array([-0.1, -0.2, 0.04])
PLATE, BASKET = np.array([0.0, -0.1, 0.01]), np.array([0.2, 0.0, 0.0])
HOME = np.array([-0.2, 0.0, 0.3])


@dataclass
class Puppet:
    """A hand that moves items about, and a record of what a simulator would know at each frame."""

    items: np.ndarray = field(default_factory=lambda: np.stack([BOWL, SOUP]).copy())
    targets: np.ndarray = field(default_factory=lambda: np.stack([PLATE, BASKET]))
    hand: np.ndarray = field(default_factory=HOME.copy)
    gap: float = OPEN_M
    holds: int | None = None
    rows: list[tuple[Any, ...]] = field(default_factory=list)

    def step(self, closing: bool, move: np.ndarray | None = None) -> int:
        """One frame; returns its number."""
        held = [number == self.holds for number in range(len(self.items))]
        self.rows.append((closing, self.gap, self.hand.copy(), self.items.copy(), held))
        if move is not None:
            self.hand += move
            if self.holds is not None:
                self.items[self.holds] += move
        return len(self.rows) - 1

    def go(self, place: np.ndarray, closing: bool, speed: float = 0.025) -> range:
        """Frames of a straight way."""
        steps = max(1, int(np.ceil(np.linalg.norm(place - self.hand) / speed)))
        move = (place - self.hand) / steps
        first = len(self.rows)
        for _ in range(steps):
            self.step(closing, move)
        return range(first, len(self.rows))

    def squeeze(self, item: int | None, frames: int = 8, touched: int = 8) -> int:
        """Close, touching the item from frame ``touched`` on; returns the frame at which it is held."""
        first = still = len(self.rows)
        for frame in range(frames):
            self.holds = item if frame >= touched else None
            self.step(True)
            gap = max(0.03, self.gap - 0.01)
            still, self.gap = still + (gap != self.gap), gap
        self.holds = item
        return max(still + 1, first + touched)

    def let_go(self, frames: int = 8) -> int:
        """Open; returns the first frame at which the fingers are apart."""
        first = len(self.rows)
        began, apart = self.gap, first + frames
        for _ in range(frames):
            self.step(False)
            self.holds = None
            self.gap = min(OPEN_M, self.gap + 0.006)
            if self.gap > min(began + 0.02, 0.07):
                apart = min(apart, len(self.rows))
        return apart

    def pick(self, item: int) -> int:
        """Approach from above and hold; returns the first frame at which it is held."""
        above = self.items[item] + [0.0, 0.0, 0.07]
        self.go(above, closing=False)
        self.go(self.items[item], closing=False, speed=0.01)
        return self.squeeze(item)

    def put(self, target: int) -> None:
        """Lift, carry and lower what is held."""
        self.go(self.hand + [0.0, 0.0, 0.1], closing=True, speed=0.01)
        self.go(self.targets[target] + [0.0, 0.0, 0.12], closing=True)
        self.go(self.targets[target] + [0.0, 0.0, 0.03], closing=True, speed=0.01)

    def end(self) -> tuple[np.ndarray, Track]:
        """Gripper commands and the record; a goal holds where its item is at its target and no more than 4 cm up."""
        closing, gap, hand, items, held = (np.array(part) for part in zip(*self.rows, strict=True))
        away = np.concatenate([items[1:], self.items[None]]) - self.targets
        solved = (np.linalg.norm(away[..., :2], axis=-1) < 0.02) & (away[..., 2] < 0.04)
        targets = np.broadcast_to(self.targets, items.shape)
        return closing, Track(gap, hand, items, targets, held, solved)
