"""One evaluation: a checked plan, episodes, ``results.json`` and films."""

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.cli import command_line
from dtvla.errors import UserError
from dtvla.policy.hub import Source, locate
from dtvla.rollout import results as records
from dtvla.rollout.results import Results
from dtvla.sim.suites import Task, get_tasks, step_limit

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dtvla.policy.policy import Policy

CAMERAS = ("agentview", "wrist")  # what LiberoEnv observes


@dataclass(frozen=True)
class Plan:
    """What an evaluation will do, checked before anything heavy is loaded.

    Attributes:
        checkpoint: folder of the policy.
        output: folder of the results.
        tasks: the tasks.
        init_states: indices of the init states, the same for every task.
        settings: everything that decides the outcome; equal settings mean the same run.
    """

    checkpoint: Path
    output: Path
    tasks: list[Task]
    init_states: list[int]
    settings: dict[str, Any]


def evaluate(cfg: "DictConfig") -> float:
    """Run the evaluation that `cfg` (``conf/evaluate.yaml``) describes, or show it when it is finished already.

    Returns:
        The success rate over all episodes, in [0, 1].

    Raises:
        UserError: a setting is wrong, or the output folder holds another run.
        RuntimeError: an episode broke; nothing is written then.
    """
    plan = make_plan(cfg)
    results = finished_results(plan)
    if results is None:
        results = _run(cfg, plan)
        records.write_results(results, plan.output)
    print_summary(results, plan.output)
    return results.total().share


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
    init_states = _init_states(cfg.init_states, tasks)
    limit = step_limit(env.suite, env.protocol)
    settings = {
        "checkpoint_sha256": _digest(source),
        "suite": env.suite,
        "task_ids": [task.task_id for task in tasks],
        "init_states": init_states,
        "seed": int(cfg.seed),
        "protocol": env.protocol,
        "max_steps": limit if env.max_steps is None else int(env.max_steps),
        "settle_steps": env.settle_steps,
        "render": env.render,
        "image_size": env.image_size,
        "cot": OmegaConf.to_container(cfg.cot, resolve=True),
        "compat": OmegaConf.to_container(cfg.compat, resolve=True),
        "quantize": cfg.quantize,
    }
    return Plan(source.folder, _output(cfg), tasks, init_states, settings)


def finished_results(plan: Plan) -> Results | None:
    """The results that lie in the output folder already, or None.

    Raises:
        UserError: they belong to a run with other settings.
    """
    path = plan.output / records.RESULTS_FILE
    if not path.exists():
        return None
    found = records.read_results(path)
    differences = [k for k in plan.settings if found.settings.get(k) != plan.settings[k]]
    if differences:
        raise UserError(
            f"output: {path} holds another run (other {', '.join(differences)}) and is not overwritten; "
            "choose another output=FOLDER"
        )
    print(f"Already evaluated ({found.provenance.get('started', 'unknown time')}); these are the stored results.")
    return found


def print_summary(results: Results, output: Path) -> None:
    """Print success rates with intervals as a table, and where the files are."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"cot={results.settings['cot']['mode']}", title_justify="left")
    for name in ("suite", "task", "success", "rate, 95 % interval"):
        table.add_column(name, justify="right" if name == "success" else "left")
    for suite, task, rate in records.rows(results):
        table.add_row(suite, task, f"{rate.successes}/{rate.episodes}", str(rate))
    console = Console()
    console.print(table)
    latency = results.decision_latency()
    if latency is not None:
        console.print(f"median decision {1000 * latency:.0f} ms, evaluation {results.provenance['seconds']:.0f} s")
    tokens = results.thought_tokens_per_forward()
    if tokens is not None:
        console.print(f"thought tokens per forward {tokens:.2f}")
    console.print(f"results: {output / records.RESULTS_FILE}", soft_wrap=True, highlight=False)
    for episode in results.episodes:
        if episode.video:
            console.print(f"video:   {output / episode.video}", soft_wrap=True, highlight=False)


def worker_count(setting: int | str, episodes: int) -> int:
    """Number of simulator processes: `setting`, or one per usable core for "auto", at most one per episode.

    Raises:
        UserError: neither a positive number nor "auto".
    """
    if setting != "auto" and (not isinstance(setting, int) or setting < 1):
        raise UserError(f"workers: {setting!r} is not a number of processes; use auto or 1, 2, ...")
    return min(episodes, usable_cores() if setting == "auto" else int(setting))


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(cfg: "DictConfig", plan: Plan) -> Results:
    from dtvla.policy import compat
    from dtvla.policy.cot import CotMode
    from dtvla.rollout.progress import EpisodeProgress
    from dtvla.rollout.runner import episode_specs, run_episodes
    from dtvla.rollout.shared_pool import shared_pool

    started, clock = records.now(), time.monotonic()
    env = cfg.env
    published = compat.Compat.from_config(plan.settings["compat"])
    policy = _load_policy(cfg, plan.checkpoint)
    compat.apply(policy, published)
    cot = CotMode.from_config(plan.settings["cot"])
    specs = episode_specs(
        plan.tasks, plan.init_states, seed=cfg.seed, max_steps=plan.settings["max_steps"], record=cfg.record
    )
    batch_size = _batch_size(cfg.batch_size, policy)
    title = f"{env.suite} cot={cfg.cot.mode}"
    pool_settings = {key: env[key] for key in ("image_size", "render", "protocol", "settle_steps")}
    with (
        shared_pool(worker_count(cfg.workers, len(specs)), **pool_settings) as pool,
        EpisodeProgress(title, len(specs)) as progress,
    ):
        episodes = run_episodes(
            policy,
            specs,
            pool,
            cot,
            batch_size=batch_size,
            on_result=progress.update,
            video_dir=plan.output / "videos",
        )
    provenance = _provenance(cfg, plan, policy, started, time.monotonic() - clock)
    return Results(plan.settings, provenance, episodes)


def _load_policy(cfg: "DictConfig", checkpoint: Path) -> "Policy":
    import torch

    from dtvla.policy import quantization
    from dtvla.policy.placement import place
    from dtvla.policy.policy import Policy

    device, dtype = place(str(cfg.device), str(cfg.dtype))
    threads = 1 if cfg.threads == "auto" else int(cfg.threads)
    torch.set_num_threads(threads)
    policy = Policy.load(checkpoint, device=device, dtype=dtype)
    if cfg.quantize is not None and quantization.bits_of(policy.model) != cfg.quantize:
        quantization.quantize(policy.model, str(cfg.quantize))
    unknown = [camera for camera in policy.processor.images.cameras if camera not in CAMERAS]
    if unknown:
        raise UserError(
            f"checkpoint: {checkpoint} looks through {', '.join(unknown)}, but LIBERO here has {', '.join(CAMERAS)}; "
            "use a checkpoint trained on these cameras"
        )
    return policy


def _batch_size(setting: int | str, policy: "Policy") -> int | None:
    if setting == "auto":
        return 1 if policy.model.device.type == "cpu" or policy.model.pads_visible else None
    if not isinstance(setting, int) or setting < 1:
        raise UserError(f"batch_size: {setting!r} is not a number of observations; use auto or 1, 2, ...")
    return setting


def _init_states(setting: Sequence[int] | None, tasks: Sequence[Task]) -> list[int]:
    fewest = min(tasks, key=lambda task: task.init_state_count)
    if setting is None:
        return list(range(fewest.init_state_count))
    chosen = list(setting)
    wrong = [i for i in chosen if not isinstance(i, int) or not 0 <= i < fewest.init_state_count]
    if wrong or not chosen or len(set(chosen)) < len(chosen):
        found = f"{wrong[0]!r} is not an init state" if wrong else f"{chosen} is empty or repeats an init state"
        raise UserError(
            f"init_states: {found}; {fewest.suite} task {fewest.task_id} has 0 to {fewest.init_state_count - 1}"
        )
    return chosen


def _output(cfg: "DictConfig") -> Path:
    if cfg.output is not None:
        return Path(str(cfg.output)).expanduser()
    folder = Path(str(cfg.checkpoint)).expanduser().resolve()  # of a hub id, OWNER/NAME, the last part is a name too
    run = folder.parent.name if folder.name == "policy" else folder.name
    return Path(str(cfg.paths.root)) / "evaluations" / run / f"{cfg.env.suite}-{cfg.cot.mode}"


def _digest(source: Source) -> str:
    """One sha256 over the files that decide what the policy does."""
    total = hashlib.sha256()
    for path in source.files():
        with path.open("rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _provenance(cfg: "DictConfig", plan: Plan, policy: "Policy", started: str, seconds: float) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return {
        "command": command_line("evaluate"),
        "config": OmegaConf.to_container(cfg, resolve=True),
        "checkpoint": str(plan.checkpoint),
        "statistics_sha256": policy.processor.normalizer.statistics.digest(),
        "versions": records.versions(),
        "machine": records.machine(),
        "started": started,
        "seconds": round(seconds, 2),
    }
