"""Is this machine fit? ``python -m dtvla.doctor`` or ``dtvla doctor``; exit code 1 means no."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

import dtvla
from dtvla.cli import entry

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from dtvla.health.checks import Finding

LABELS = {"ok": "ok  ", "note": "note", "fail": "FAIL"}
COLOURS = {"ok": "32", "note": "33", "fail": "31;1"}
SUBJECT_WIDTH, LINE_WIDTH = 20, 112


def examine(cfg: DictConfig) -> list[Finding]:
    """Run all checks, from the cheapest to the probes of the simulator. Takes up to a minute on two cores.

    Args:
        cfg: ``conf/doctor.yaml``.
    """
    from dtvla.health import checks
    from dtvla.health.simulator import check_simulator

    return [
        checks.check_python(),
        *checks.check_packages(),
        checks.check_machine(cfg.min_memory_gb),
        *checks.check_disk(Path(cfg.paths.root), cfg.min_free_disk_gb),
        checks.check_assets(),
        *check_simulator(cfg.probe_timeout_s),
    ]


def render_findings(findings: list[Finding], *, colour: bool = False) -> str:
    """The doctor's screen as text: a line per finding, its fix below it, and a verdict.

    Args:
        findings: in the order of the screen.
        colour: colour the labels with ANSI codes.
    """
    lines = [f"dtvla {dtvla.__version__}: is this machine fit?"]
    indent = " " * (2 + len(LABELS["ok"]) + 2 + SUBJECT_WIDTH + 1)
    for finding in findings:
        label = LABELS[finding.status]
        if colour:
            label = f"\x1b[{COLOURS[finding.status]}m{label}\x1b[0m"
        first, *rest = wrap(finding.found, LINE_WIDTH - len(indent)) or [""]
        lines.append(f"  {label}  {finding.subject:<{SUBJECT_WIDTH}} {first}")
        lines += [indent + line for line in rest]
        if finding.fix:
            lines += [indent + line for line in wrap(f"-> {finding.fix}", LINE_WIDTH - len(indent))]
    wrong = [finding.subject for finding in findings if finding.status == "fail"]
    lines.append(f"not fit: {', '.join(wrong)}" if wrong else "this machine is fit")
    return "\n".join(lines)


@entry("doctor")
def main(cfg: DictConfig) -> None:
    """Print the screen; exit with 1 when something is wrong."""
    findings = examine(cfg)
    print(render_findings(findings, colour=sys.stdout.isatty()))
    if any(finding.status == "fail" for finding in findings):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
