"""What an evaluation will do: its settings, checked before anything heavy is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.errors import UserError
from dtvla.jobs import name_of, varied
from dtvla.policy.hub import locate
from dtvla.rollout.results import policy_name
from dtvla.rollout.runner import episode_specs
from dtvla.sim.pool import EpisodeSpec, pool_settings
from dtvla.sim.suites import Task, get_tasks, step_limit

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class Plan:
    """A checked evaluation.

    Attributes:
        checkpoint: folder of the policy.
        output: folder of the results.
        specs: all episodes, tasks outermost.
        settings: everything that decides the outcome; equal settings mean the same run.
    """

    checkpoint: Path
    output: Path
    specs: list[EpisodeSpec]
    settings: dict[str, Any]


def make_plan(cfg: "DictConfig") -> Plan:
    """Check the settings.

    Raises:
        UserError: see the messages below; unknown suite or task; init state out of range.
    """
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(cfg, "checkpoint"):
        raise UserError("checkpoint: none was given; add checkpoint=FOLDER, the policy folder that dtvla train wrote")
    source = locate(str(cfg.checkpoint))
    env = cfg.env
    tasks = get_tasks(env.suite, env.task_ids)
    task_ids = [task.task_id for task in tasks]
    if not tasks or len(set(task_ids)) < len(task_ids):
        raise UserError(f"env.task_ids: {task_ids} is empty or repeats a task; name each once, or null for all")
    if env.render == "none":
        raise UserError("env.render: none gives the policy no pictures; use full, or draft as in training")
    init_states = _init_states(cfg.init_states, tasks)
    limit = step_limit(env.suite, env.protocol)
    settings = {
        "checkpoint_sha256": source.digest(),
        "suite": env.suite,
        "task_ids": task_ids,
        "init_states": init_states,
        "seed": _seed(cfg.seed),
        "max_steps": limit if env.max_steps is None else int(env.max_steps),
        **pool_settings(env),
        "cot": OmegaConf.to_container(cfg.cot, resolve=True),
        "compat": OmegaConf.to_container(cfg.compat, resolve=True),
        "quantize": cfg.quantize,
    }
    specs = episode_specs(
        tasks,
        init_states,
        seed=settings["seed"],
        max_steps=settings["max_steps"],
        record=_filmed(cfg.record, init_states),
    )
    return Plan(source.folder, _output(cfg), specs, settings)


def _listed(setting: object) -> list[Any]:
    """What a setting holds that takes one value or several."""
    return list(setting) if isinstance(setting, Sequence) and not isinstance(setting, str) else [setting]


def _init_states(setting: Sequence[int] | None, tasks: Sequence[Task]) -> list[int]:
    fewest = min(tasks, key=lambda task: task.init_state_count)
    if setting is None:
        return list(range(fewest.init_state_count))
    chosen = _listed(setting)
    wrong = [i for i in chosen if not isinstance(i, int) or not 0 <= i < fewest.init_state_count]
    if wrong or not chosen or len(set(chosen)) < len(chosen):
        found = f"{wrong[0]!r} is not an init state" if wrong else f"{chosen} is empty or repeats an init state"
        raise UserError(
            f"init_states: {found}; {fewest.suite} task {fewest.task_id} has 0 to {fewest.init_state_count - 1}"
        )
    return chosen


def _seed(setting: int | Sequence[int]) -> int | list[int]:
    found = _listed(setting)
    if not found or len(set(found)) < len(found) or any(not isinstance(seed, int) or seed < 0 for seed in found):
        raise UserError(f"seed: found {setting}; give a whole number of at least 0, or a list of different ones")
    return setting if isinstance(setting, int) else found


def _filmed(setting: int | Sequence[int], init_states: Sequence[int]) -> list[int]:
    """The init states of every task to film."""
    if isinstance(setting, int) and setting >= 0:
        return list(init_states[:setting])
    chosen = _listed(setting)
    if not set(chosen) <= set(init_states):
        raise UserError(
            f"record: {setting} is neither a number of episodes nor some of the init states {list(init_states)}"
        )
    return chosen


def _output(cfg: "DictConfig") -> Path:
    """The results folder; in a multirun every job has one of its own, named by what the multirun varies."""
    from omegaconf import OmegaConf

    arm = varied()
    if cfg.output is not None:
        output = Path(str(cfg.output)).expanduser()
        if not arm or "output" in arm or OmegaConf.is_interpolation(cfg, "output"):
            return output
        return output / name_of(arm)
    folder = Path(str(cfg.checkpoint)).expanduser().resolve()  # of a hub id, OWNER/NAME, the last part is a name too
    suite, mode = str(cfg.env.suite), str(cfg.cot.mode)
    said = {"env": suite, "env.suite": suite, "cot": mode, "cot.mode": mode}
    others = name_of({key: value for key, value in arm.items() if key != "checkpoint" and said.get(key) != value})
    name = f"{suite}-{mode}" + (f"-{others}" if others else "")
    return Path(str(cfg.paths.root)) / "evaluations" / policy_name(folder) / name
