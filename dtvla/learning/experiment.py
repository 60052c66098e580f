"""One training run: composed from its configuration, continued when interrupted, exported when complete."""

from __future__ import annotations

import signal
import time
import warnings
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from dtvla import __version__
from dtvla.cli import command_line
from dtvla.errors import UserError
from dtvla.jobs import by_joblib, in_multirun, name_of, varied
from dtvla.learning.composing import made, plain, say
from dtvla.learning.run_folder import RunFolder

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, Trainer

    from dtvla.learning.module import PolicyModule

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
SIGINT_EXIT_CODE = 128 + signal.SIGINT
ALGORITHMS = ("sft", "grpo")


def train(cfg: DictConfig) -> float | None:
    """Run, continue or look up the training that ``conf/train.yaml`` describes.

    Returns:
        The final value of ``cfg.optimized_metric``, or None when that is null.

    Raises:
        UserError: a setting is wrong, something required is absent, or the run folder holds other work.
        SystemExit: code 143 after SIGTERM, 130 after Ctrl-C; a checkpoint is there to continue from.
    """
    folder = _run_folder(cfg)
    cfg.run.folder = str(folder.path)
    checkpoint = folder.begin(plain(cfg), resume=in_multirun() if cfg.resume is None else bool(cfg.resume))
    result = folder.result()
    if result is not None:
        print(f"This run is finished ({result['steps']} steps); its policy is {folder.policy}")
        return _metric(cfg, result["metrics"])
    metrics = _fit(cfg, folder, checkpoint)
    say(f"policy: {folder.policy}")
    if folder.best.exists():
        say(f"most successful in rollouts: {folder.best}")
    return _metric(cfg, metrics)


def _fit(cfg: DictConfig, folder: RunFolder, checkpoint: Path | None) -> dict[str, float]:
    started = time.monotonic()
    from lightning.pytorch import seed_everything

    from dtvla.callbacks.checkpoint import read_step
    from dtvla.policy.gathering import gathered

    _quiet()
    seed_everything(int(cfg.seed), verbose=False)
    recipe = _recipe(cfg)
    data = recipe.open_inputs(cfg)
    if checkpoint is not None:
        cfg.run.start_step = read_step(checkpoint)
        say(f"continuing after step {cfg.run.start_step}: {checkpoint}")
    module: PolicyModule = recipe.module(cfg, data, cfg.run.start_step)
    trainer = _trainer(cfg)
    with folder.held() if trainer.is_global_zero else nullcontext():
        if trainer.is_global_zero:
            _record(cfg, folder, module)
        _run(trainer, module, data, checkpoint)
        metrics = _final_metrics(trainer, module, data)
        with gathered(module.policy) as policy:
            if trainer.is_global_zero and not folder.policy.exists():
                policy.save(folder.policy)
        if trainer.is_global_zero:
            folder.finish(_result(cfg, module, trainer.global_step, metrics, time.monotonic() - started))
    return metrics


def _recipe(cfg: DictConfig) -> ModuleType:
    """What ``algorithm`` names: a module with ``open_inputs`` and ``module``.

    Raises:
        UserError: there is no such algorithm.
    """
    name = str(cfg.algorithm.name)
    if name not in ALGORITHMS:
        raise UserError(f"algorithm.name: {name!r} is unknown; use {' or '.join(ALGORITHMS)}")
    return import_module(f"dtvla.learning.{name}_experiment")


def _run(trainer: Trainer, module: PolicyModule, data: LightningDataModule, checkpoint: Path | None) -> None:
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException:
        say(f"stopped by SIGTERM after step {trainer.global_step}, which is saved; continue with resume=true")
        raise SystemExit(SIGTERM_EXIT_CODE) from None
    except SystemExit:  # Lightning's answer to Ctrl-C
        say("interrupted; continue from the last checkpoint with the same command and resume=true")
        raise SystemExit(SIGINT_EXIT_CODE) from None


def _record(cfg: DictConfig, folder: RunFolder, module: PolicyModule) -> None:
    """Write what a resume compares its settings with, and what makes policies of checkpoints."""
    from dtvla.policy import checkpoint
    from dtvla.policy.weights import new_folder

    folder.record(plain(cfg))
    with new_folder(folder.processor, replace=True) as temporary:
        checkpoint.write_without_weights(module.policy, temporary)


def _trainer(cfg: DictConfig) -> Trainer:
    import torch

    from dtvla.callbacks.checkpoint import AtomicCheckpointIO

    if cfg.trainer.accelerator in ("cuda", "gpu") and not torch.cuda.is_available():
        raise UserError(f"trainer: torch {torch.__version__} finds no GPU; use trainer=cpu or install a CUDA build")
    callbacks = [made(callback) for callback in (cfg.callbacks or {}).values()]
    loggers = [made(logger) for logger in (cfg.logger or {}).values()]
    trainer: Trainer = made(
        cfg.trainer,
        callbacks=callbacks,
        logger=loggers or False,
        plugins=[AtomicCheckpointIO()],
    )
    if trainer.world_size > 1 and by_joblib():  # Lightning would repeat the command line of a joblib process
        raise UserError(
            f"trainer.devices: {trainer.world_size} processes for one job, but hydra/launcher=joblib starts one; "
            "use hydra/launcher=submitit_slurm, or a command of its own for each training"
        )
    return trainer


def _final_metrics(trainer: Trainer, module: PolicyModule, data: LightningDataModule) -> dict[str, float]:
    """Metrics after the last step; validates once more unless the last step did."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if trainer.enable_validation and module.validated_step != trainer.global_step:
        trainer.validate(module, datamodule=data, verbose=False)
        metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {name: value for name, value in sorted(metrics.items()) if "/" in name}


def _metric(cfg: DictConfig, metrics: dict[str, float]) -> float | None:
    if cfg.optimized_metric is None:
        return None
    if cfg.optimized_metric not in metrics:
        known = ", ".join(metrics) or "none"
        raise UserError(f"optimized_metric: {cfg.optimized_metric!r} was not measured; use null or one of {known}")
    return metrics[cfg.optimized_metric]


def _result(
    cfg: DictConfig, module: PolicyModule, steps: int, metrics: dict[str, float], seconds: float
) -> dict[str, Any]:
    import lightning
    import torch
    import transformers

    from dtvla.policy.quantization import count

    return {
        "format": "dtvla.training",
        "version": 1,
        "command": command_line("train"),
        "name": str(cfg.name),
        "steps": steps,
        "parameters": count(module.model),
        "seconds_since_last_start": round(seconds, 1),
        "metrics": metrics,
        "versions": {
            "dtvla": __version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "transformers": transformers.__version__,
        },
    }


def _run_folder(cfg: DictConfig) -> RunFolder:
    """``<paths.runs>/<name>``; in a multirun every job has a folder of its own, named by what the multirun varies."""
    path = Path(str(cfg.paths.runs)) / str(cfg.name)
    named = ("name", "+experiment")  # most experiments bring a name that is theirs
    others = {key: value for key, value in varied().items() if key not in named or value != path.name}
    return RunFolder(path.with_name(f"{path.name}-{name_of(others)}") if others else path)


def _quiet() -> None:
    """Keep advice of libraries that does not apply here off the screen (after their import, which sets their level)."""
    import logging

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`IterableDataset` has `__len__` defined.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*overridden `on_before_batch_transfer` in `LightningModule`.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # torchmetrics have summed over ranks already
