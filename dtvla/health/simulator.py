"""Findings about GPU and simulator: runs the probes side by side and judges what they found."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dtvla.cores import usable_cores
from dtvla.health.checks import GB, REINSTALL, Finding
from dtvla.health.probes import (
    FLOOR_BRIGHTNESS,
    FLOOR_TOLERANCE,
    SETTLE_TOLERANCE_M,
    run_probe,
)

RENDERERS = ("egl", "osmesa")
PACKAGES = {"egl": "libegl1 libgl1 libegl-mesa0 libgl1-mesa-dri", "osmesa": "libosmesa6"}
MIN_CONTRAST = 5.0
"""Standard deviation of a real picture is about 45; a black or uniform one has none."""
DRIFT = "MuJoCo or its renderer differs from the pinned one, and success rates with it: " + REINSTALL


def check_simulator(timeout_s: float) -> list[Finding]:
    """Render with EGL and OSMesa, let a scene settle, and compute on the GPU; all of it for real.

    Args:
        timeout_s: end a probe that has not answered after this many seconds.
    """
    with ThreadPoolExecutor(max(1, min(4, usable_cores()))) as threads:
        frames = {gl: threads.submit(run_probe, "render", gl=gl, timeout_s=timeout_s) for gl in RENDERERS}
        settle = threads.submit(run_probe, "settle", timeout_s=timeout_s)
        gpu = threads.submit(run_probe, "gpu", timeout_s=timeout_s)
        rendered = {gl: frame.result() for gl, frame in frames.items()}
    return [judge_gpu(gpu.result()), *judge_renderers(rendered), judge_floor(rendered), judge_settle(settle.result())]


def judge_gpu(found: dict[str, Any]) -> Finding:
    """A machine without a GPU is fit for the small models; a GPU that torch cannot use is a fault."""
    if "error" in found:
        fix = "the GPU or its driver fails: check nvidia-smi; a torch built for your driver's CUDA may be needed"
        return Finding("fail", "GPU", found["error"], fix)
    if found["devices"]:
        text = ", ".join(
            f"{device['name']} ({device['free_bytes'] / GB:.0f} of {device['total_bytes'] / GB:.0f} GB free)"
            for device in found["devices"]
        )
        return Finding("ok", "GPU", f"{text}, CUDA {found['cuda_build']}")
    if os.path.exists("/proc/driver/nvidia/version"):
        fix = "the driver may be too old for this torch: update it, or install a torch for an older CUDA"
        text = f"an NVIDIA driver is loaded, but torch (CUDA {found['cuda_build']}) finds no GPU"
        return Finding("fail", "GPU", text, fix)
    return Finding("ok", "GPU", "none: nano models train on the CPU, larger ones need a GPU")


def judge_renderers(rendered: dict[str, dict[str, Any]]) -> list[Finding]:
    """One working renderer is enough; another that is broken is only worth a note, unless ``MUJOCO_GL`` asks for it."""
    reasons = {gl: _render_fault(found) for gl, found in rendered.items()}
    wanted = os.environ.get("MUJOCO_GL", "").strip().lower()
    findings = []
    for gl, reason in reasons.items():
        if not reason:
            milliseconds = 1000 * rendered[gl]["seconds"]
            findings.append(Finding("ok", f"renderer {gl}", f"{milliseconds:.0f} ms for both cameras"))
            continue
        fatal = gl == wanted or all(reasons.values())
        fix = f"apt-get install {PACKAGES[gl]} (or the GPU driver's EGL)" if "Error: " not in reason else REINSTALL
        findings.append(Finding("fail" if fatal else "note", f"renderer {gl}", reason, fix))
    return findings


def judge_floor(rendered: dict[str, dict[str, Any]]) -> Finding:
    """From MuJoCo 3.3.3 on, floors render a third darker, which a trained policy notices."""
    levels = {gl: found["floor"] for gl, found in rendered.items() if not _render_fault(found)}
    if not levels:
        return Finding("note", "floor brightness", "not measured: no renderer works", "see the renderers above")
    found = ", ".join(f"{level:.0f} with {gl}" for gl, level in levels.items())
    found += f" (expected {FLOOR_BRIGHTNESS:.0f} ± {FLOOR_TOLERANCE:.0f})"
    if all(abs(level - FLOOR_BRIGHTNESS) <= FLOOR_TOLERANCE for level in levels.values()):
        return Finding("ok", "floor brightness", found)
    return Finding("fail", "floor brightness", found, DRIFT)


def judge_settle(found: dict[str, Any]) -> Finding:
    """From MuJoCo 3.4.0 on, the bowl of libero_spatial task 5 slides off its ramekin before the episode begins."""
    if "error" in found:
        return Finding("fail", "settling", found["error"], f"the simulator does not run: {REINSTALL}")
    off, tolerance = 1000 * found["off_m"], 1000 * SETTLE_TOLERANCE_M
    text = f"the bowl of libero_spatial task 5 rests {off:.1f} mm off (at most {tolerance:.0f})"
    if found["off_m"] <= SETTLE_TOLERANCE_M:
        return Finding("ok", "settling", text)
    return Finding("fail", "settling", text, DRIFT)


def _render_fault(found: dict[str, Any]) -> str:
    if "error" in found:
        return str(found["error"])
    if found["contrast"] < MIN_CONTRAST:
        return f"the picture is uniform (standard deviation {found['contrast']:.1f} of 255)"
    return ""
