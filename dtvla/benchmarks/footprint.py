"""Memory of one rendering simulation: where it goes, and whether it grows over many episodes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from dtvla.benchmarks.processes import MIB, memory
from dtvla.sim.pool import EnvPool, EpisodeSpec, pool_settings

SAMPLES = 25


def stages(env: Mapping[str, Any], task_id: int) -> dict[str, Any]:
    """Memory of this process after each stage of its first episode, and the size of the model's parts.

    Call it in a fresh process.

    Args:
        env: the config group ``env``.
        task_id: in its suite.

    Returns:
        ``after``: :func:`dtvla.benchmarks.processes.memory` after ``imports``, ``environment`` and ``first pictures``;
        ``model_mib``: ``textures`` and ``meshes`` of the compiled model, ``rest`` of it, and the ``arena`` that MuJoCo
        reserves for a simulation's contacts and touches as far as it needs.
    """
    from dtvla.benchmarks.recording import make_env
    from dtvla.sim.backend import import_libero

    after = {}
    import_libero()
    after["imports"] = memory(os.getpid())
    simulation = make_env(env, task_id)
    after["environment"] = memory(os.getpid())
    simulation.reset()
    after["first pictures"] = memory(os.getpid())
    model = simulation.domain.sim.model._model
    meshes = sum(getattr(model, name).nbytes for name in dir(model) if name.startswith("mesh_"))
    sizes = {"textures": model.ntexdata, "meshes": meshes, "rest": model.nbuffer - model.ntexdata - meshes}
    sizes["arena"] = model.narena
    simulation.close()
    return {"after": after, "model_mib": {name: round(float(size) / MIB, 1) for name, size in sizes.items()}}


def growth(env: Mapping[str, Any], episodes: int, actions_SD: np.ndarray) -> dict[str, Any]:
    """Memory of a worker over many short episodes, a reset and one chunk each, on the tasks of ``env`` one by one.

    Args:
        env: the config group ``env``; ``task_ids`` null stays on task 0.
        episodes: how many.
        actions_SD: the chunk.

    Returns:
        ``pss_mib`` by ``episode``, and ``grown_mib``: the last value less that of the first tenth, when caches
        are full.
    """
    task_ids = env["task_ids"] or [0]
    sampled, values = [], []
    with EnvPool(1, **pool_settings(env)) as pool:
        for number in range(episodes):
            task_id = task_ids[number * len(task_ids) // episodes]
            pool.start(0, EpisodeSpec(env["suite"], task_id, number % 50, 0, env["max_steps"]))
            pool.ready(None)
            pool.act(0, actions_SD)
            pool.ready(None)
            if number % max(1, episodes // SAMPLES) == 0 or number == episodes - 1:
                sampled.append(number + 1)
                values.append(memory(pool.process_ids[0])["pss"])
        losses = list(pool.losses)
    settled = next(value for number, value in zip(sampled, values, strict=True) if number > episodes // 10)
    return {
        "episodes": episodes,
        "task_ids": list(task_ids),
        "episode": sampled,
        "pss_mib": values,
        "grown_mib": round(values[-1] - settled, 1),
        "replaced_workers": losses,
    }
