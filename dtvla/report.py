"""Entry point: write a report of training runs and evaluations.

    python -m dtvla.report outputs/runs/NAME                                    one HTML file
    python -m dtvla.report outputs/evaluations/NAME/libero_goal-{think,mask}    a comparison
    python -m dtvla.report outputs/runs/NAME output=report.md                   Markdown, pictures beside it

Settings are in ``conf/report.yaml``.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtvla.cli import entry, leading_words

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Write the report of the folders that the command line names."""
    sys.argv[1:] = name_folders(sys.argv[1:])
    _main()


@entry("report")
def _main(cfg: "DictConfig") -> None:
    from dtvla.analysis.report import write_report

    write_report(cfg)


def name_folders(arguments: Sequence[str]) -> list[str]:
    """Turn the words that come first on the command line into the setting ``folders``, the rest as it is."""
    words = leading_words(arguments)
    return [*([f"folders=[{','.join(words)}]"] if words else []), *arguments[len(words) :]]


if __name__ == "__main__":
    main()
