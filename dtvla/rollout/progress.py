"""What a person sees while episodes run: successes so far, speed, time left."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dtvla.rollout.results import EpisodeResult, rate_of

LINE_SECONDS = 30.0


class EpisodeProgress:
    """A progress bar on a terminal; elsewhere (a log file) one line every half minute.

    Use it as a context manager and hand each finished episode to :meth:`update`.

    Args:
        title: what runs, e.g. ``libero_object think``.
        total: number of episodes.
    """

    def __init__(self, title: str, total: int):
        self.title = title
        self.total = total
        self.done: list[EpisodeResult] = []
        self.first = self.last_line = time.monotonic()
        console = Console(file=sys.stderr)
        self.terminal = console.is_terminal
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.terminal,
        )
        self.task = self.bar.add_task(title, total=total, status="starting simulators")

    def __enter__(self) -> "EpisodeProgress":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, result: EpisodeResult) -> None:
        """Count a finished episode."""
        self.done.append(result)
        if len(self.done) == 1:
            self.first = time.monotonic()  # speed is counted from here: before it, simulators start
        self.bar.update(self.task, advance=1, status=self.status())
        now = time.monotonic()
        if not self.terminal and (now - self.last_line > LINE_SECONDS or len(self.done) == self.total):
            self.last_line = now
            line = f"{self.title}: {len(self.done)}/{self.total} episodes, {self.status()}"
            if self.speed() > 0 and len(self.done) < self.total:
                line += f", {60 * (self.total - len(self.done)) / self.speed():.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def speed(self) -> float:
        """Episodes per minute since the first one finished; 0 before the second."""
        seconds = time.monotonic() - self.first
        return 60 * (len(self.done) - 1) / seconds if len(self.done) > 1 and seconds > 0 else 0.0

    def status(self) -> str:
        """Success so far and speed: ``success 90.0 % (59.6-98.2), 12.3 episodes/min``."""
        speed = f", {self.speed():.1f} episodes/min" if self.speed() > 0 else ""
        return f"success {rate_of(self.done)}{speed}"
