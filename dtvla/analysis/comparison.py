"""Two evaluations over the same episodes: what is compared, who succeeded where, and what to read it with."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.analysis.ablation import arm_differences
from dtvla.analysis.frames import KEY, Run, check_poolable, episode_frame, under_study
from dtvla.errors import UserError
from dtvla.rollout.results import Results

if TYPE_CHECKING:
    import pandas as pd


def compare(a: Results, b: Results) -> dict[str, Any]:
    """Pair the episodes of two evaluations by suite, task, init state and seed.

    Returns:
        ``subject`` (settings under study that differ, each with its value in ``a`` and in ``b``), ``total`` and
        ``tasks`` (rows of :func:`dtvla.analysis.ablation.compare_arms`, whose arm is B and whose baseline is A),
        and ``warnings`` (sentences).

    Raises:
        UserError: an episode stands twice in one of them, or they have no episode in common.
    """
    frame = episode_frame([Run("A", Path(), a), Run("B", Path(), b)])
    frame["arm"] = frame["run"]
    shared = _shared(frame, a, b)
    rows = under_study(shared).rename(columns={"cot": "cot.mode"}).set_index("run")
    warnings = check_poolable(shared)  # who has no partner is told by the numbers
    unknown = [name for name, decoder in rows["decoder"].items() if decoder is None]
    if len(unknown) == 1:  # results of older versions, whose decoder may be the other's
        warnings.append(f"decoder of {unknown[0]} is not recorded")
        del rows["decoder"]
    subject = {name: {"a": old, "b": new} for name, (old, new) in rows.items() if old != new}
    if not subject and warnings:
        warnings.append(
            "A and B differ in nothing under study: differences are chance, defects or what the other warnings name"
        )
    elif not subject:
        warnings.append("A and B have the same settings: differences are chance or defects, not a change of the policy")
    words = {(e.suite, e.task_id): e.instruction for e in a.episodes}
    tasks = arm_differences(frame, "A", by=["suite", "task_id"]).to_dict("records")
    return {
        "subject": subject,
        "total": arm_differences(frame, "A").to_dict("records")[0],
        "tasks": [{"instruction": words[row["suite"], row["task_id"]], **row} for row in tasks],
        "warnings": warnings,
    }


def _shared(frame: "pd.DataFrame", a: Results, b: Results) -> "pd.DataFrame":
    """The episodes that A and B have both run."""
    twice = frame[frame.duplicated(["arm", *KEY])]
    if not twice.empty:
        row = twice.iloc[0]
        raise UserError(
            f"{row.arm.lower()}: {row.suite} task {row.task_id}, init state {row.init_state}, seed {row.seed} stands "
            "twice in it, so that it cannot be paired; evaluate again into another folder"
        )
    shared = frame[frame.duplicated(KEY, keep=False)]
    if shared.empty:
        of_a, of_b = (
            f"{results.settings.get('suite')}, seed {results.settings.get('seed')}, {len(results.episodes)} episodes"
            for results in (a, b)
        )
        raise UserError(
            f"a, b: no episode in common (a: {of_a}; b: {of_b}); evaluate both on the same suite, tasks, init states "
            "and seed"
        )
    return shared
