"""What writes thoughts: one small interface for a simulator's state, a remote model and a local one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtvla.cot.episodes import EpisodeView


@dataclass(frozen=True)
class Job:
    """One thought that is wanted.

    Attributes:
        frame: of the episode, from 0.
        attempt: 0 at first; answers are a function of it, so that another try may answer something else.
        complaints: what the checks found in the answer before, as readable sentences.
    """

    frame: int
    attempt: int = 0
    complaints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What an annotator wrote.

    Attributes:
        text: as it came, with one ``<think>...</think>`` in it if all is well.
        facts: of this answer, for its provenance: plain JSON values such as tokens, cost, whether it was cached.
    """

    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)


class Annotator(ABC):
    """Writes thoughts for frames of an episode.

    Attributes:
        identity: what the answers depend on, for their provenance and to refuse mixing: plain JSON values, at least
            ``annotator`` (its name), ``model`` (or None) and ``prompt`` (digest of the prompt, or None).
        jobs_per_call: most jobs of one call of :meth:`label`; None for all of an episode.
        calls: calls that may run at a time, each in a thread of its own.
    """

    identity: Mapping[str, Any]
    jobs_per_call: int | None = 1
    calls: int = 1

    @abstractmethod
    def label(self, episode: EpisodeView, jobs: Sequence[Job]) -> list[Answer]:
        """One answer for each job, in order.

        Raises:
            UserError: no answer can be had; what was answered before is kept.
        """

    def stop(self) -> None:  # noqa: B027 - most have nothing under way that could wait
        """Begin nothing more, from any thread: calls under way end as soon as they can, with an answer or without."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give back what is held."""
