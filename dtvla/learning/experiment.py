"""One training run: composed from its configuration, continued when interrupted, exported when complete."""

from __future__ import annotations

import hashlib
import re
import signal
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dtvla import __version__
from dtvla.cli import command_line
from dtvla.errors import UserError
from dtvla.learning.run_folder import RunFolder

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from dtvla.data.datamodule import DemonstrationDataModule
    from dtvla.learning.optim import OptimizerSettings
    from dtvla.learning.sft import SFTModule

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
SIGINT_EXIT_CODE = 128 + signal.SIGINT
LONGEST_JOB_NAME = 80


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
    checkpoint = folder.begin(_plain(cfg), resume=bool(cfg.resume))
    result = folder.result()
    if result is not None:
        print(f"This run is finished ({result['steps']} steps); its policy is {folder.policy}")
        return _metric(cfg, result["metrics"])
    metrics = _fit(cfg, folder, checkpoint)
    _say(f"policy: {folder.policy}")
    if folder.best.exists():
        _say(f"most successful in rollouts: {folder.best}")
    return _metric(cfg, metrics)


def _fit(cfg: DictConfig, folder: RunFolder, checkpoint: Path | None) -> dict[str, float]:
    started = time.monotonic()
    from lightning.pytorch import seed_everything

    from dtvla.callbacks.checkpoint import read_step
    from dtvla.policy.gathering import gathered

    _quiet()
    seed_everything(int(cfg.seed), verbose=False)
    data = _open_inputs(cfg)
    if checkpoint is not None:
        cfg.run.start_step = read_step(checkpoint)
        _say(f"continuing after step {cfg.run.start_step}: {checkpoint}")
    module = _module(cfg, data, cfg.run.start_step)
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


def _run(trainer: Trainer, module: SFTModule, data: DemonstrationDataModule, checkpoint: Path | None) -> None:
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException:
        _say(f"stopped by SIGTERM after step {trainer.global_step}, which is saved; continue with resume=true")
        raise SystemExit(SIGTERM_EXIT_CODE) from None
    except SystemExit:  # Lightning's answer to Ctrl-C
        _say("interrupted; continue from the last checkpoint with the same command and resume=true")
        raise SystemExit(SIGINT_EXIT_CODE) from None


def _record(cfg: DictConfig, folder: RunFolder, module: SFTModule) -> None:
    """Write what a resume compares its settings with, and what makes policies of checkpoints."""
    from dtvla.policy import checkpoint
    from dtvla.policy.weights import new_folder

    folder.record(_plain(cfg))
    with new_folder(folder.processor, replace=True) as temporary:
        checkpoint.write_without_weights(module.policy, temporary)


def _open_inputs(cfg: DictConfig) -> DemonstrationDataModule:
    """Check the settings, open the dataset, and look for the weights that training starts from.

    Raises:
        UserError: naming everything that is absent or unfit at once.
    """
    from dtvla.data.grouping import Cut
    from dtvla.policy.hub import locate
    from dtvla.policy.quantization import check_bits

    data: DemonstrationDataModule = _made(cfg.data)
    problems = _problem(lambda: _optimizer(cfg)) + _problem(lambda: Cut(**_passes(cfg)))
    problems += _problem(lambda: check_bits(cfg.model.quantize))
    if cfg.model.get("lora") and not cfg.model.checkpoint:
        problems.append(
            "model.lora: adapts a trained model, but model.checkpoint is null; set it, or use model/lora=none"
        )
    problems += _problem(lambda: data.demonstrations)
    if cfg.model.checkpoint:  # nothing is downloaded for a run that can't begin
        problems += _problem(lambda: locate(str(cfg.model.checkpoint), download=not problems))
    if problems:
        raise UserError("; and ".join(problems))
    return data


def _problem(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except UserError as error:
        return [str(error)]
    return []


def _module(cfg: DictConfig, data: DemonstrationDataModule, start_step: int) -> SFTModule:
    from dtvla.learning.sft import SFTModule
    from dtvla.policy import compat
    from dtvla.policy.policy import build_policy
    from dtvla.policy.quantization import count

    demonstrations = data.demonstrations
    _say(f"data: {demonstrations.root}, {demonstrations.episodes} episodes, {len(demonstrations)} frames")
    policy = build_policy(_plain(cfg.model), demonstrations.texts(), demonstrations.statistics)
    compat.apply(policy, compat.Compat.from_config(_plain(cfg.compat)))
    for remark in data.attach(policy.processor, start_step, **_passes(cfg)):
        _say(remark)
    module = SFTModule(
        policy,
        _optimizer(cfg),
        data_fingerprint=demonstrations.fingerprint,
        seed=int(cfg.seed),
        action_smoothing_bins=float(cfg.algorithm.loss.action_smoothing_bins),
    )
    sizes = f"{count(module.model) / 1e6:.1f} M parameters, {count(module.model, trainable=True) / 1e6:.1f} M trained"
    _say(f"model: {cfg.model.name}, {sizes}")
    return module


def _optimizer(cfg: DictConfig) -> OptimizerSettings:
    from dtvla.learning.optim import OptimizerSettings

    values = _plain(cfg.algorithm.optimizer)
    return OptimizerSettings(**{**values, "betas": tuple(values["betas"])})


def _passes(cfg: DictConfig) -> dict[str, Any]:
    return {key: cfg.algorithm[key] for key in ("micro_batch_size", "pack_tokens")}


def _trainer(cfg: DictConfig) -> Trainer:
    import torch

    from dtvla.callbacks.checkpoint import AtomicCheckpointIO

    if cfg.trainer.accelerator in ("cuda", "gpu") and not torch.cuda.is_available():
        raise UserError(f"trainer: torch {torch.__version__} finds no GPU; use trainer=cpu or install a CUDA build")
    callbacks = [_made(callback) for callback in (cfg.callbacks or {}).values()]
    loggers = [_made(logger) for logger in (cfg.logger or {}).values()]
    trainer: Trainer = _made(
        cfg.trainer,
        callbacks=callbacks,
        logger=loggers or False,
        plugins=[AtomicCheckpointIO()],
    )
    return trainer


def _final_metrics(trainer: Trainer, module: SFTModule, data: DemonstrationDataModule) -> dict[str, float]:
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
    cfg: DictConfig, module: SFTModule, steps: int, metrics: dict[str, float], seconds: float
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
    """``<paths.runs>/<name>``; in a sweep every job has a folder of its own, named by its overrides."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    path = Path(str(cfg.paths.runs)) / str(cfg.name)
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        path = path.with_name(f"{path.name}-{_job_name(HydraConfig.get().overrides.task)}")
    return RunFolder(path)


def _job_name(overrides: Sequence[str]) -> str:
    """A folder name for a job of a sweep, the same when it is resumed; long ones end in a digest."""
    kept = [text for text in sorted(overrides) if text.split("=")[0] not in ("name", "resume", "+experiment")]
    name = re.sub(r"[^A-Za-z0-9_.=,+-]+", "_", ",".join(kept)) or "job"
    if len(name) <= LONGEST_JOB_NAME:
        return name
    return f"{name[:LONGEST_JOB_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _made(cfg: DictConfig, **options: Any) -> Any:
    """What a node with a ``_target_`` describes; a :class:`UserError` comes through as it was raised."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(cfg, **options)
    except InstantiationException as error:
        raise (error.__cause__ if isinstance(error.__cause__, UserError) else error) from None


def _plain(cfg: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def _say(text: str) -> None:
    """Print on one rank."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    if not rank_zero_only.rank:  # type: ignore[attr-defined]
        print(text)


def _quiet() -> None:
    """Keep advice of libraries that does not apply here off the screen (after their import, which sets their level)."""
    import logging

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`IterableDataset` has `__len__` defined.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # torchmetrics have summed over ranks already
