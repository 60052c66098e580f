"""Probes of what really runs: each is a process of its own that ends by printing one line of JSON.

``python -m dtvla.health.probes NAME``. A process each, because the OpenGL backend is fixed per process, because two
rendering environments do not share one, and because a crash in a graphics driver must not end the doctor.

The reference values were measured with MuJoCo 3.3.2, the version that dtvla pins, and what drift looks like with later
ones: 3.3.3 renders the floor of libero_object at 121 instead of 178; from 3.4.0 on the bowl of libero_spatial task 5
slides 35 mm off its ramekin while the scene settles.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dtvla.errors import UserError

FLOOR_SUITE, FLOOR_TASK = "libero_object", 0
FLOOR_ROWS = slice(216, 256)
"""Of a 256 x 256 agentview picture: floor from edge to edge, in front of all objects."""
FLOOR_BRIGHTNESS = 178.0
FLOOR_TOLERANCE = 15.0

SETTLE_SUITE, SETTLE_TASK, SETTLE_BODY = "libero_spatial", 5, "akita_black_bowl_1"
SETTLE_POSITION_M = (-0.2114, 0.2021, 0.9344)
SETTLE_TOLERANCE_M = 0.010

PICTURE_SIZE = 256


def floor_brightness(picture_HWC: np.ndarray) -> float:
    """Mean over the floor patch of an agentview picture, uint8 (256, 256, 3), in [0, 255]."""
    return float(picture_HWC[FLOOR_ROWS].mean())


def probe_render() -> dict[str, Any]:
    """Render one real LIBERO observation with the backend in ``MUJOCO_GL``; its brightness, contrast and time."""
    from dtvla.sim.env import LiberoEnv

    env = LiberoEnv(FLOOR_SUITE, FLOOR_TASK, image_size=PICTURE_SIZE, render="full")
    try:
        observation, _ = env.reset(options={"init_state": 0})
        began = time.perf_counter()
        env.render()
        seconds = time.perf_counter() - began
        picture_HWC = observation["agentview"]
    finally:
        env.close()
    return {"floor": floor_brightness(picture_HWC), "contrast": float(picture_HWC.std()), "seconds": seconds}


def probe_settle() -> dict[str, Any]:
    """Distance in metres between where the bowl of libero_spatial task 5 rests after settling and where it should."""
    from dtvla.sim.env import LiberoEnv

    env = LiberoEnv(SETTLE_SUITE, SETTLE_TASK, render="none")
    try:
        env.reset(options={"init_state": 0})
        body = env.domain.obj_body_id[SETTLE_BODY]
        position = np.array(env.domain.sim.data.body_xpos[body])
    finally:
        env.close()
    return {"position_m": position.round(4).tolist(), "off_m": float(np.linalg.norm(position - SETTLE_POSITION_M))}


def probe_gpu() -> dict[str, Any]:
    """GPUs that torch can really compute on."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        torch.ones(8, device=f"cuda:{index}").sum().item()
        devices.append({"name": torch.cuda.get_device_name(index), "free_bytes": free, "total_bytes": total})
    return {"devices": devices, "cuda_build": torch.version.cuda}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "render": probe_render,
    "settle": probe_settle,
    "gpu": probe_gpu,
}


def run_probe(name: str, *, gl: str | None = None, timeout_s: float = 120.0) -> dict[str, Any]:
    """Run a probe in a fresh process and return what it found, or ``{"error": why}``.

    Args:
        name: one of ``PROBES``.
        gl: value of ``MUJOCO_GL`` for the probe; None leaves it as it is.
        timeout_s: a graphics driver may hang; the probe is ended after this many seconds.
    """
    environment = {**os.environ, **({"MUJOCO_GL": gl} if gl else {})}
    if gl:
        environment.pop("PYOPENGL_PLATFORM", None)
    command = [sys.executable, "-m", "dtvla.health.probes", name]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {timeout_s:g} s"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            return dict(json.loads(line))
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"error": f"the process ended with exit code {done.returncode}: {last}"}


def main() -> None:
    """Run the probe that the command line names and print what it found as JSON."""
    try:
        found = PROBES[sys.argv[1]]()
    except UserError as error:
        found = {"error": str(error)}
    except Exception as error:  # whatever it is, it is the finding
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
