"""Entry point: compare two evaluations of the same init states, episode by episode.

    python -m dtvla.compare outputs/evaluations/NAME/libero_goal-mask outputs/evaluations/NAME/libero_goal-think

Settings are in ``conf/compare.yaml``.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.cli import entry, leading_words

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig

    from dtvla.rollout.results import Results

COMPARISON_FORMAT = "dtvla.comparison"
COMPARISON_VERSION = 2


def main() -> None:
    """Compare the two folders that the command line names, ``A B`` or ``a=A b=B``."""
    sys.argv[1:] = name_words(sys.argv[1:])
    _main()


@entry("compare")
def _main(cfg: "DictConfig") -> None:
    run(cfg)


def run(cfg: "DictConfig") -> dict[str, Any]:
    """Compare as configured; print the table and write the file, whose content is returned.

    Raises:
        UserError: results are missing, damaged or without a common episode; the output exists already.
    """
    from omegaconf import OmegaConf

    from dtvla.errors import UserError
    from dtvla.rollout.results import read_results, write_text

    missing = [name for name in ("a", "b") if OmegaConf.is_missing(cfg, name)]
    if missing:
        raise UserError(f"{', '.join(missing)}: not given; name two evaluations, dtvla compare FOLDER FOLDER")
    output = None if cfg.output is None else Path(str(cfg.output)).expanduser()
    if output is not None and (output.exists() or output.suffix != ".json"):
        raise UserError(f"output: {output} exists already or is no .json file; choose another output=FILE.json")
    a, b = (Path(str(path)).expanduser() for path in (cfg.a, cfg.b))
    comparison = {
        "format": COMPARISON_FORMAT,
        "format_version": COMPARISON_VERSION,
        "a": str(a),
        "b": str(b),
        **compare(read_results(a), read_results(b)),
    }
    _print(comparison)
    if output is not None:
        write_text(output, json.dumps(comparison, indent=1, allow_nan=False) + "\n")
        print(f"written: {output}")
    return comparison


def name_words(arguments: Sequence[str]) -> list[str]:
    """Turn the words that come first on the command line into settings ``a`` and ``b``, the rest as it is."""
    words = leading_words(arguments, most=2)
    return [*(f"{name}={word}" for name, word in zip("ab", words, strict=False)), *arguments[len(words) :]]


def compare(a: "Results", b: "Results") -> dict[str, Any]:
    """Pair the episodes of two evaluations by suite, task, init state and seed.

    Returns:
        ``subject`` (settings under study that differ, each with its value in ``a`` and in ``b``), ``total`` and
        ``tasks`` (rows of :func:`dtvla.analysis.ablation.compare_arms`, whose arm is B and whose baseline is A),
        and ``warnings`` (sentences).

    Raises:
        UserError: an episode stands twice in one of them, or they have no episode in common.
    """
    from dtvla.analysis.ablation import arm_differences
    from dtvla.analysis.frames import Run, check_poolable, episode_frame, under_study

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


def _shared(frame: "pd.DataFrame", a: "Results", b: "Results") -> "pd.DataFrame":
    """The episodes that A and B have both run."""
    from dtvla.analysis.frames import KEY
    from dtvla.errors import UserError

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


def _print(comparison: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from dtvla.analysis.frames import shown

    print(f"A: {comparison['a']}\nB: {comparison['b']}")
    for name, values in comparison["subject"].items():
        print(f"compared: {name}: {shown(values['a'])} in A, {shown(values['b'])} in B")
    table = Table(
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
        title="success in %, difference with its 95 % interval",
        title_justify="left",
    )
    table.add_column("task", min_width=14)
    for column in ("pairs", "A", "B", "only A:B", "B - A", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    total, tasks = comparison["total"], comparison["tasks"]
    several = len({row["suite"] for row in tasks}) > 1
    for row in tasks:
        words = f"{row['task_id']}: {row['instruction']}"
        table.add_row(f"{row['suite']} {words}" if several else words, *_cells(row))
    if len(tasks) > 1:
        table.add_row("all tasks", *_cells(total))
    Console().print(table)
    if len(tasks) > 1:
        print("p of single tasks are corrected for their number (Holm); that of all tasks is one test of its own.")
    if total["left_out"] or total["baseline_left_out"]:
        print(f"left out, without a partner: {total['baseline_left_out']} episodes of A, {total['left_out']} of B")
    for warning in comparison["warnings"]:
        print(f"warning: {warning}")


def _cells(row: Mapping[str, Any]) -> list[str]:
    from dtvla.analysis.tabulate import p_value, percent

    difference, low, high = (f"{100 * row[name]:+.1f}" for name in ("difference", "low", "high"))
    return [
        str(row["pairs"]),
        percent(row["baseline_rate"]),
        percent(row["rate"]),
        f"{row['only_baseline']}:{row['only_arm']}",
        f"{difference} ({low}, {high})",
        p_value(row["p_holm"]),
    ]


if __name__ == "__main__":
    main()
