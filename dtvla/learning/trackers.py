"""Weights & Biases and SwanLab: optional loggers, one run of theirs for each run folder.

Both write into the run folder first. Offline they leave it at that; ``wandb sync`` or ``swanlab sync`` send it later.
"""

from __future__ import annotations

import importlib
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from dtvla.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import WandbLogger
    from swanlab.integration.pytorch_lightning import SwanLabLogger


def wandb_logger(folder: str, *, offline: bool = False, start_step: int = 0, **options: Any) -> WandbLogger:
    """Lightning's logger for Weights & Biases.

    Args:
        folder: gets ``wandb/`` with the data and the run's id.
        offline: whether to send nothing.
        start_step: optimiser steps behind the checkpoint that the training starts from; above 0 the run of the
            interrupted training continues.
        options: of ``WandbLogger`` and ``wandb.init``.

    Raises:
        UserError: wandb is not installed.
    """
    wandb = _import("wandb")
    from lightning.pytorch.loggers import WandbLogger

    if wandb.run is not None:  # of the job before in a sweep; Lightning would go on with it
        wandb.finish()
    path = Path(folder) / "wandb"
    return WandbLogger(save_dir=folder, offline=offline, id=_run_id(path, start_step), **options)


def swanlab_logger(folder: str, *, mode: str = "online", start_step: int = 0, **options: Any) -> SwanLabLogger:
    """SwanLab's own logger for Lightning.

    Args:
        folder: gets ``swanlab/`` with the data and the run's id.
        mode: ``online``, ``offline`` (to be sent later), ``local`` (for SwanLab's dashboard on this machine), or
            ``disabled``.
        start_step: as for :func:`wandb_logger`.
        options: of ``SwanLabLogger`` and ``swanlab.init``.

    Raises:
        UserError: swanlab is not installed.
    """
    swanlab = _import("swanlab")
    from swanlab.integration.pytorch_lightning import SwanLabLogger

    if swanlab.has_run():
        swanlab.finish()
    path = Path(folder) / "swanlab"
    identity = {"id": _run_id(path, start_step), "resume": "allow"}
    return SwanLabLogger(save_dir=folder, log_dir=str(path), mode=mode, **identity, **options)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"logger: {name} can't be imported ({error}); install the extra with `pip install -e '.[loggers]'`, "
            "or use logger=default"
        ) from None


def _run_id(folder: Path, start_step: int) -> str:
    """The id of the run that is continued, or a new one; kept in a file, which the first rank writes."""
    path = folder / "run_id"
    if start_step and path.is_file():
        return path.read_text().strip()
    made = secrets.token_hex(4)
    if getattr(rank_zero_only, "rank", 0) == 0:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(made)
    return made
