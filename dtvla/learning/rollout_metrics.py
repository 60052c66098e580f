"""What an iteration's episodes were like."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dtvla.learning.iteration import Iteration


def of(iteration: Iteration) -> dict[str, float]:
    """Metrics by name, prefixed ``sampled/``.

    ``success``: of all episodes that were collected now. ``kept_share``: of groups, for having both outcomes.
    ``reward``, ``group_spread`` (mean standard deviation within a group), ``well_formed``, ``steps``,
    ``thought_tokens``, ``truncated`` and the entropies: of the episodes that are learned from. Entropies are per token
    and estimated from the log-probabilities of what was sampled, which costs nothing.
    """
    collection, trajectories = iteration.collection, iteration.trajectories
    records = [record for trajectory in trajectories for record in trajectory.records]
    thought = [value for r in records for value in r.thought_log_probs[: len(r.thought_ids) - r.forced]]
    action = np.concatenate([record.action_log_probs_A for record in records])
    rewards_GN = iteration.rewards_N.reshape(len(collection.groups), -1)
    values = {
        "rounds": collection.rounds,
        "episodes": collection.episodes,
        "simulated_steps": collection.simulated_steps,
        "reward": iteration.rewards_N.mean(),
        "group_spread": rewards_GN.std(axis=1, ddof=1).mean(),
        "well_formed": iteration.well_formed_N.mean(),
        "steps": np.mean([trajectory.steps for trajectory in trajectories]),
        "decisions": len(records),
        "thought_tokens": np.mean([len(record.thought_ids) for record in records]),
        "truncated": np.mean([record.truncated for record in records]),
        "thought_entropy": -np.mean(thought) if thought else 0.0,
        "action_entropy": -action.mean(),
    }
    if collection.episodes:  # else groups that were left over fill the iteration
        values["success"] = collection.successes / collection.episodes
        values["kept_share"] = collection.kept_groups / collection.collected_groups
    return {f"sampled/{name}": float(value) for name, value in values.items()}
