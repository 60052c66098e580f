"""Entry point: compare two evaluations of the same init states, episode by episode.

    python -m dtvla.compare outputs/evaluations/NAME/libero_goal-mask outputs/evaluations/NAME/libero_goal-think

Settings are in ``conf/compare.yaml``.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtvla.cli import entry, leading_words

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dtvla.analysis.pairing import Comparison, Paired

COMPARISON_FORMAT = "dtvla.comparison"
COMPARISON_VERSION = 1


def main() -> None:
    """Compare the two folders that the command line names, ``A B`` or ``a=A b=B``."""
    sys.argv[1:] = name_words(sys.argv[1:])
    _main()


@entry("compare")
def _main(cfg: "DictConfig") -> None:
    run(cfg)


def run(cfg: "DictConfig") -> "Comparison":
    """Compare as configured; print the table and write the file.

    Raises:
        UserError: results are missing, damaged or without a common episode; the output exists already.
    """
    from omegaconf import OmegaConf

    from dtvla.analysis.pairing import compare
    from dtvla.errors import UserError
    from dtvla.rollout.results import read_results

    missing = [name for name in ("a", "b") if OmegaConf.is_missing(cfg, name)]
    if missing:
        raise UserError(f"{', '.join(missing)}: not given; name two evaluations, dtvla compare FOLDER FOLDER")
    output = None if cfg.output is None else Path(str(cfg.output)).expanduser()
    if output is not None and (output.exists() or output.suffix != ".json"):
        raise UserError(f"output: {output} exists already or is no .json file; choose another output=FILE.json")
    a, b = (Path(str(path)).expanduser() for path in (cfg.a, cfg.b))
    comparison = compare(read_results(a), read_results(b))
    _print(comparison, a, b)
    if output is not None:
        _write(comparison, a, b, output)
    return comparison


def name_words(arguments: Sequence[str]) -> list[str]:
    """Turn the words that come first on the command line into settings ``a`` and ``b``, the rest as it is."""
    words = leading_words(arguments, most=2)
    return [*(f"{name}={word}" for name, word in zip("ab", words, strict=False)), *arguments[len(words) :]]


def _print(comparison: "Comparison", a: Path, b: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    print(f"A: {a}\nB: {b}")
    for name, (old, new) in comparison.subject.items():
        print(f"compared: {name}: {_short(old)} in A, {_short(new)} in B")
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
    suites = {suite for suite, _ in comparison.tasks}
    for (suite, task), pairs in comparison.tasks.items():
        words = f"{task}: {comparison.instructions[suite, task]}"
        table.add_row(words if len(suites) == 1 else f"{suite} {words}", *_cells(pairs))
    if len(comparison.tasks) > 1:
        table.add_row("all tasks", *_cells(comparison.total))
    Console().print(table)
    if len(comparison.tasks) > 1:
        print("p of single tasks are not corrected for their number; judge by all tasks.")
    if comparison.only_in_a or comparison.only_in_b:
        print(f"left out, without a partner: {comparison.only_in_a} episodes of A, {comparison.only_in_b} of B")
    for warning in comparison.warnings:
        print(f"warning: {warning}")


def _cells(pairs: "Paired") -> list[str]:
    low, high = (100 * end for end in pairs.interval)
    return [
        str(pairs.pairs),
        f"{100 * pairs.rate_a.share:.1f}",
        f"{100 * pairs.rate_b.share:.1f}",
        f"{pairs.only_a}:{pairs.only_b}",
        f"{100 * pairs.difference:+.1f} ({low:+.1f}, {high:+.1f})",
        "<0.0001" if pairs.p_value < 1e-4 else f"{pairs.p_value:.4f}",
    ]


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _write(comparison: "Comparison", a: Path, b: Path, output: Path) -> None:
    import json

    from dtvla.rollout.results import write_text

    document = {
        "format": COMPARISON_FORMAT,
        "format_version": COMPARISON_VERSION,
        "a": str(a),
        "b": str(b),
        **comparison.to_dict(),
    }
    write_text(output, json.dumps(document, indent=1, allow_nan=False) + "\n")
    print(f"written: {output}")


if __name__ == "__main__":
    main()
