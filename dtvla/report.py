"""Entry point: write a report (Markdown and pictures) of a training run and its evaluations.

    python -m dtvla.report run=outputs/runs/NAME evaluations=[outputs/evaluations/NAME/*]

Settings are in ``conf/report.yaml``.
"""

from typing import TYPE_CHECKING

from dtvla.cli import entry

if TYPE_CHECKING:
    from omegaconf import DictConfig


@entry("report")
def main(cfg: "DictConfig") -> None:
    """Write the report as configured and print where it is."""
    from dtvla.analysis.report import write_report

    write_report(cfg)


if __name__ == "__main__":
    main()
