"""Where a policy computes, and in which type."""

from __future__ import annotations

import torch

from dtvla.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Device and type of the weights that two settings ask for.

    Args:
        device: a name of torch's, or ``auto``: the GPU when there is one.
        dtype: one of :data:`DTYPES`, or ``auto``: float32 on a CPU, else bfloat16.

    Raises:
        UserError: no such device or type, or the GPU is not there.
    """
    if dtype not in (*DTYPES, "auto"):
        raise UserError(f"dtype: {dtype!r} is unknown; use auto, {' or '.join(DTYPES)}")
    found = torch.cuda.is_available()
    name = ("cuda" if found else "cpu") if device == "auto" else device
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: {name!r} is unknown; use auto, cpu, cuda or cuda:1") from None
    if chosen.type == "cuda" and not found:
        raise UserError(f"device: {name} was asked for but torch {torch.__version__} finds no GPU; use device=cpu")
    return chosen, DTYPES.get(dtype, torch.float32 if chosen.type == "cpu" else torch.bfloat16)


def type_name(dtype: torch.dtype) -> str:
    """Such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")
