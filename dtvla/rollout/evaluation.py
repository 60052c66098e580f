"""One evaluation: the episodes of a plan, by one process or by those of torchrun, and their results."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.cli import command_line
from dtvla.cores import positive, worker_count
from dtvla.errors import UserError
from dtvla.jobs import jobs_at_a_time
from dtvla.rollout import journal
from dtvla.rollout import results as records
from dtvla.rollout.plan import Plan, make_plan
from dtvla.rollout.ranks import Ranks, join_ranks
from dtvla.rollout.results import Results
from dtvla.sim import settings as simulated
from dtvla.sim.pool import EpisodeSpec, pool_settings
from dtvla.sim.settings import ACTION_DIM

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

    from dtvla.policy.cot import CotMode
    from dtvla.policy.policy import Policy

CAMERAS = tuple(simulated.CAMERAS)


def evaluate(cfg: "DictConfig") -> float:
    """Run the evaluation that `cfg` (``conf/evaluate.yaml``) describes, or what is missing of it.

    Finished episodes are on disk at once: the same command continues a run that was killed, and shows a finished one.
    Under torchrun every process takes a share of the episodes; the output folder has to be the same for all.

    Returns:
        The success rate over all episodes, in [0, 1].

    Raises:
        UserError: a setting is wrong, or the output folder holds another run.
        RuntimeError: an episode broke; the finished ones are kept.
    """
    ranks = join_ranks()
    plan = make_plan(cfg)
    results = _finished(plan, ranks)
    if results is None:
        results = _run(cfg, plan, ranks)
    if ranks.first:
        print_summary(results, plan.output)
    return results.total().share


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


def _finished(plan: Plan, ranks: Ranks) -> Results | None:
    """The results that lie in the output folder already, or None.

    Raises:
        UserError: they belong to a run with other settings.
    """
    path = plan.output / records.RESULTS_FILE
    if not path.exists():
        return None
    found = records.read_results(path)
    journal.refuse_other_settings(path, found.settings, plan.settings)
    if ranks.first:
        print(f"Already evaluated ({found.provenance.get('started', 'unknown time')}); these are the stored results.")
    return found


@dataclass(frozen=True)
class _Crew:
    """Who runs the episodes of this process."""

    policy: "Policy"
    cot: "CotMode"
    batch_size: int | None
    workers: int
    conditions: Mapping[str, Any]


def _run(cfg: "DictConfig", plan: Plan, ranks: Ranks) -> Results:
    """Run the episodes that are not on disk yet; every process does its share, the first writes the results."""
    started, clock = records.now(), time.monotonic()
    before = journal.unfinished_run(plan.output, plan.settings)
    kept = journal.kept_episodes(plan.output)
    share = [spec for spec in ranks.share(plan.specs) if records.episode_key(spec) not in kept]
    crew = _crew(cfg, plan, ranks, len(share), before) if share or before is None else None
    if before is not None:
        provenance = {**before, "resumed": [*before["resumed"], started]}
        if ranks.first:
            print(f"{len(kept)} of {len(plan.specs)} episodes were finished before; going on in {plan.output}")
    else:
        assert crew is not None
        provenance = _provenance(cfg, plan, crew, ranks, started)
    with journal.Journal(plan.output, ranks.index) as own:
        if ranks.first:
            journal.begin_run(plan.output, plan.settings, provenance)
        ranks.wait()
        if crew is not None and share:
            _run_episodes(cfg, plan, ranks, crew, share, own)
        ranks.wait()
    if ranks.first:
        provenance["seconds"] = round(time.monotonic() - clock, 2)
        journal.finish_run(plan.output, plan.settings, provenance, plan.specs)
    ranks.wait()
    return records.read_results(plan.output)


def _run_episodes(
    cfg: "DictConfig", plan: Plan, ranks: Ranks, crew: _Crew, specs: Sequence[EpisodeSpec], own: journal.Journal
) -> None:
    from dtvla.rollout.progress import EpisodeProgress
    from dtvla.rollout.runner import run_episodes
    from dtvla.rollout.shared_pool import shared_pool

    title = f"{cfg.env.suite} cot={cfg.cot.mode}" + (f" process {ranks.index}" if ranks.count > 1 else "")
    with shared_pool(crew.workers, **pool_settings(cfg.env)) as pool, EpisodeProgress(title, len(specs)) as progress:

        def finished(episode: records.EpisodeResult) -> None:
            own.append(episode)
            progress.update(episode)

        run_episodes(
            crew.policy,
            specs,
            pool,
            crew.cot,
            batch_size=crew.batch_size,
            on_result=finished,
            video_dir=plan.output / "videos",
        )


def _crew(cfg: "DictConfig", plan: Plan, ranks: Ranks, episodes: int, before: Mapping[str, Any] | None) -> _Crew:
    """Load the policy, and check what can be checked with it.

    Raises:
        UserError: a setting is wrong, the checkpoint does not fit LIBERO, or the run was begun under other conditions.
    """
    from dtvla.policy.cot import CotMode
    from dtvla.policy.placement import type_name

    device, dtype = _placement(cfg, ranks)
    conditions = {"versions": records.versions(), "device": device.type, "dtype": type_name(dtype)}
    if before is not None:
        _refuse_other_conditions(plan.output, before, conditions)
    workers = worker_count(cfg.workers, episodes, ranks.local_count * jobs_at_a_time())
    policy = _load_policy(cfg, plan.checkpoint, device, dtype)
    cot = CotMode.from_config(plan.settings["cot"])
    return _Crew(policy, cot, _batch_size(cfg.batch_size, policy), workers, conditions)


def _placement(cfg: "DictConfig", ranks: Ranks) -> "tuple[torch.device, torch.dtype]":
    """Device and type of the policy; each process of a machine has a GPU of its own.

    Raises:
        UserError: unknown device or type, no such GPU, or more processes than GPUs.
    """
    import torch

    from dtvla.policy.placement import place

    device, dtype = place(str(cfg.device), str(cfg.dtype))
    if device.type == "cuda":
        if ranks.count > 1:
            device = torch.device("cuda", ranks.local_index)
        gpus = torch.cuda.device_count()
        if (device.index or 0) >= gpus:
            raise UserError(
                f"device: {device} is not one of the {gpus} GPUs here; name another, or start as many processes as GPUs"
            )
        torch.cuda.set_device(device)
    return device, dtype


def _load_policy(cfg: "DictConfig", checkpoint: Path, device: "torch.device", dtype: "torch.dtype") -> "Policy":
    import torch

    from dtvla.policy import compat, quantization
    from dtvla.policy.policy import Policy

    torch.set_num_threads(1 if cfg.threads == "auto" else positive("threads", cfg.threads))
    policy = Policy.load(checkpoint, device=device, dtype=dtype)
    if cfg.quantize is not None and quantization.bits_of(policy.model) != cfg.quantize:
        quantization.quantize(policy.model, str(cfg.quantize))
    unknown = [camera for camera in policy.processor.images.cameras if camera not in CAMERAS]
    if unknown:
        raise UserError(
            f"checkpoint: {checkpoint} looks through {', '.join(unknown)}, but LIBERO here has {', '.join(CAMERAS)}; "
            "use a checkpoint trained on these cameras"
        )
    numbers = policy.processor.layout.action_dim
    if numbers != ACTION_DIM:
        raise UserError(
            f"checkpoint: {checkpoint} gives actions of {numbers} numbers, but LIBERO's have {ACTION_DIM}; "
            "use a checkpoint trained on LIBERO"
        )
    compat.apply(policy, compat.Compat.from_config(cfg.compat))
    return policy


def _batch_size(setting: int | str, policy: "Policy") -> int | None:
    if setting == "auto":
        return 1 if policy.model.device.type == "cpu" or policy.model.pads_visible else None
    return positive("batch_size", setting)


def _refuse_other_conditions(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Episodes of one results file come from the same packages and the same arithmetic."""
    old, new = ({**run["versions"], "device": run["device"], "dtype": run["dtype"]} for run in (before, now))
    changed = [
        f"{name} {old.get(name)}, now {new.get(name)}" for name in {**old, **new} if old.get(name) != new.get(name)
    ]
    if changed:
        raise UserError(
            f"output: the run in {folder} was begun with {'; '.join(changed)}; "
            "go on with the same, or choose another output=FOLDER"
        )


def _provenance(cfg: "DictConfig", plan: Plan, crew: _Crew, ranks: Ranks, started: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return {
        "command": command_line("evaluate"),
        "config": OmegaConf.to_container(cfg, resolve=True),
        "checkpoint": str(plan.checkpoint),
        "decoder": crew.policy.model.decoder,
        "statistics_sha256": crew.policy.processor.normalizer.statistics.digest(),
        **crew.conditions,
        "machine": records.machine(),
        "processes": ranks.count,
        "started": started,
        "resumed": [],
    }
