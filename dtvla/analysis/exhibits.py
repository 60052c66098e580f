"""Single episodes on a page: the same one in every arm side by side, with its film and what was thought when."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from dtvla.analysis.clips import Clip, make_clips
from dtvla.analysis.frames import say
from dtvla.analysis.sources import Arm
from dtvla.analysis.tables import printable
from dtvla.errors import UserError
from dtvla.rollout.results import EpisodeResult, Key, Thought, episode_key

NO_THOUGHT = "(no thought)"
LONGEST = 600  # letters of a thought that are shown


@dataclass(frozen=True)
class Moment:
    """A thought and the policy steps from `first` to before `end` at which it stood."""

    first: int
    end: int
    text: str


@dataclass(frozen=True)
class Card:
    """An episode of one arm.

    Attributes:
        arm: name of the arm.
        success: of the episode.
        steps: of the episode.
        decisions: of the episode.
        recorded: what was thought at them is recorded, be it nothing.
        moments: the thoughts; equal ones that follow each other are one. Empty without any thought.
        film: the film, or None.
        lacking: that there is no film though one was made, in words without folders of this machine; else empty.
    """

    arm: str
    success: bool
    steps: int
    decisions: int
    recorded: bool
    moments: list[Moment]
    film: Clip | None = None
    lacking: str = ""


@dataclass(frozen=True)
class Exhibit:
    """One episode in all arms that have run it."""

    suite: str
    task_id: int
    instruction: str
    init_state: int
    seed: int
    cards: list[Card]


def moments(thoughts: Sequence[Thought], steps: int) -> list[Moment]:
    """The thoughts of an episode of `steps` steps; a thought that did not change goes on; long ones are cut."""
    texts = [cut(thought.text) for thought in thoughts]
    if not any(texts):
        return []
    changes = [i for i, text in enumerate(texts) if i == 0 or text != texts[i - 1]]
    ends = [thoughts[i].step for i in changes] + [max(steps, thoughts[changes[-1]].step + 1)]
    return [Moment(first, end, texts[i] or NO_THOUGHT) for i, (first, end) in zip(changes, pairwise(ends), strict=True)]


def cut(text: str) -> str:
    """The text in one line of printable signs, cut to a length that a page can bear."""
    words = printable(text)
    return words if len(words) <= LONGEST else f"{words[:LONGEST]} … ({len(words) - LONGEST} more letters)"


def choose(arms: Sequence[Arm], count: int) -> list[Key]:
    """Up to `count` episodes that are worth a look, the most telling first.

    Only filmed episodes and those with thoughts are eligible. Episodes with more films come first, then those that some
    arms solved and others did not, else they come as they were run: success is not preferred. Every task has its turn
    before one comes again.
    """
    seen: dict[Key, list[EpisodeResult]] = {}
    for arm in arms:
        for _, episode in arm.episodes:
            seen.setdefault(episode_key(episode), []).append(episode)
    eligible = {k: es for k, es in seen.items() if any(e.video or any(t.text for t in e.thoughts) for e in es)}

    def rank(key: Key) -> tuple[int, bool]:
        outcomes = {episode.success for episode in eligible[key]}
        return -sum(episode.video is not None for episode in eligible[key]), len(outcomes) == 1

    by_task: dict[tuple[str, int], list[Key]] = {}
    for key in sorted(eligible, key=rank):
        by_task.setdefault(key[:2], []).append(key)
    turns = {key: turn for keys in by_task.values() for turn, key in enumerate(keys)}
    return sorted(eligible, key=lambda key: (turns[key], rank(key)))[:count]


def make_exhibits(arms: Sequence[Arm], count: int, film_bytes: int) -> list[Exhibit]:
    """Gather the chosen episodes with their films.

    Args:
        arms: to choose from.
        count: most episodes, each in all arms that have run it.
        film_bytes: most that the films take together; 0 for none.
    """
    shown: list[tuple[Key, str, Path, EpisodeResult]] = []
    for key in choose(arms, count):
        for arm in arms:
            shown += [(key, arm.name, run.folder, e) for run, e in arm.episodes if episode_key(e) == key]
    films = [folder / str(e.video) for _, _, folder, e in shown if e.video]
    clips = dict(zip(films, make_clips(films, film_bytes), strict=True))
    unread = [clip for clip in clips.values() if isinstance(clip, UserError)]
    if unread:  # often all of them, where results were copied without their films
        say(f"{unread[0]}" + (f" (and {len(unread) - 1} more films)" if len(unread) > 1 else ""))
    exhibits: dict[Key, Exhibit] = {}
    for key, arm_name, folder, episode in shown:
        film, lacking = _film(clips, folder, episode.video)
        card = Card(
            arm_name, episode.success, episode.steps, len(episode.latency) or len(episode.thoughts),
            bool(episode.thoughts), moments(episode.thoughts, episode.steps), film, lacking,
        )  # fmt: skip
        suite, task_id, init_state, seed = key
        new = Exhibit(suite, task_id, episode.instruction, init_state, seed, [])
        exhibits.setdefault(key, new).cards.append(card)
    return list(exhibits.values())


def _film(clips: Mapping[Path, Clip | UserError | None], folder: Path, video: str | None) -> tuple[Clip | None, str]:
    """The film, or why it lacks."""
    if video is None:
        return None, ""
    clip = clips[folder / video]
    if isinstance(clip, UserError):
        return None, f"the film {video} cannot be read"
    return clip, "" if clip else f"the film {video} is left out for its size; a higher films_mb takes it in"
