"""Performs a recorded episode again, without pictures, and notes where everything was at each frame."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dtvla.cot.hindsight import Track
from dtvla.errors import UserError
from dtvla.sim.env import LiberoEnv, SimulationDiverged
from dtvla.sim.expert import Expert
from dtvla.sim.scene import Goal, Scene, goals

_NO_LIMIT = 1_000_000  # steps; an episode ends with its last frame


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an episode came about.

    Attributes:
        suite, task_id: the task.
        settle_steps: of the environment, before the first frame.
        frames: how many there are.
        init_state, seed: where the scripted expert began, and of its disturbances; None for a recording.
        first_state: float64 (1 + nq + nv,), where a recording began; None for the expert.
        actions_F7: float64, what a recording executed; None for the expert, which decides anew.
    """

    suite: str
    task_id: int
    settle_steps: int
    frames: int
    init_state: int | None = None
    seed: int | None = None
    first_state: np.ndarray | None = None
    actions_F7: np.ndarray | None = None


@dataclass(frozen=True)
class Retraced:
    """An episode that was performed again.

    Attributes:
        goals: G goals of the task, each with an item and a target.
        track: what hindsight needs.
        state_F8: float32 proprioception, as a dataset stores it.
    """

    goals: list[Goal]
    track: Track
    state_F8: np.ndarray


def placing_goals(env: LiberoEnv) -> list[Goal]:
    """The goals of a task that is about putting things on or in others.

    Raises:
        UserError: the task asks for something else, too.
    """
    found = goals(env.domain)
    others = [" ".join(goal) for goal in env.domain.parsed_problem["goal_state"] if goal[0] not in ("in", "on")]
    if others or not found:
        raise UserError(
            f"annotator: {env.task.suite} task {env.task.task_id} ({env.task.instruction!r}) asks for "
            f"{', '.join(others)}; annotator=state speaks only of putting things in or on others, "
            "use annotator=openai or annotator=policy"
        )
    return found


def retrace(env: LiberoEnv, recipe: Recipe) -> Retraced:
    """Perform an episode in an environment of its task that ends neither at success nor at a step limit.

    Raises:
        UserError: the task asks for more than putting things in or on others, or the simulation diverges.
    """
    wanted = placing_goals(env)
    diary = _Diary(Scene(env), wanted)
    try:
        decide = _begin(env, recipe)
        for _ in range(recipe.frames):
            diary.look(env.observe()["state"])
            env.step(decide())
            diary.judge()
    except SimulationDiverged as error:
        raise UserError(f"dataset: an episode can't be performed again, {error}; use another annotator") from None
    return Retraced(wanted, diary.track(), np.stack(diary.states))


def _begin(env: LiberoEnv, recipe: Recipe) -> Callable[[], np.ndarray]:
    """Go to the episode's first frame; what is called before each step says what is executed."""
    if recipe.actions_F7 is not None:
        env.reset(seed=0, options={"state": recipe.first_state})
        return iter(recipe.actions_F7).__next__
    assert recipe.seed is not None
    env.reset(seed=0, options={"init_state": recipe.init_state})
    expert = Expert(env, seed=recipe.seed)
    return lambda: expert.act().executed


@dataclass
class _Diary:
    """Collects one entry per frame."""

    scene: Scene
    goals: list[Goal]
    states: list[np.ndarray] = field(default_factory=list)
    grips: list[np.ndarray] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    items: list[list[np.ndarray]] = field(default_factory=list)
    targets: list[list[np.ndarray]] = field(default_factory=list)
    held: list[list[bool]] = field(default_factory=list)
    solved: list[list[bool]] = field(default_factory=list)

    def look(self, state_8: np.ndarray) -> None:
        """Note where things are before the action of a frame."""
        scene = self.scene
        self.states.append(np.asarray(state_8, dtype=np.float32))
        self.grips.append(scene.grip_position)
        self.gaps.append(scene.gap)
        self.items.append([scene.position(goal.item) for goal in self.goals])
        self.targets.append([scene.position(goal.target) for goal in self.goals])
        self.held.append([scene.holds(goal.item) for goal in self.goals])

    def judge(self) -> None:
        """Note which goals hold after it."""
        domain = self.scene.domain
        self.solved.append([bool(domain._eval_predicate([g.predicate, g.item, g.target])) for g in self.goals])

    def track(self) -> Track:
        """All entries."""
        gaps, grips, items, targets = (np.array(part) for part in (self.gaps, self.grips, self.items, self.targets))
        return Track(gaps, grips, items, targets, np.array(self.held), np.array(self.solved))


_env: LiberoEnv | None = None


def retrace_here(recipe: Recipe) -> Retraced:
    """:func:`retrace` in a worker process, which keeps the environment of the last task."""
    global _env
    key = (recipe.suite, recipe.task_id, recipe.settle_steps)
    if _env is None or (_env.task.suite, _env.task.task_id, _env.settle_steps) != key:
        if _env is not None:
            _env.close()
            _env = None
        _env = LiberoEnv(
            recipe.suite,
            recipe.task_id,
            render="none",
            settle_steps=recipe.settle_steps,
            max_steps=_NO_LIMIT,
            ends_at_success=False,
        )
    return retrace(_env, recipe)


def start_worker() -> None:
    """Initialise a worker process: it ends with its parent, however that ends, and at once on Ctrl-C."""

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=wait, daemon=True).start()
