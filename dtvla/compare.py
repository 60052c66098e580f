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
    from omegaconf import DictConfig

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

    from dtvla.analysis.comparison import compare
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
