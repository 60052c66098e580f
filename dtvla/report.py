"""Entry point: write a report of training runs and evaluations.

    python -m dtvla.report outputs/runs/NAME                                    one HTML file
    python -m dtvla.report outputs/evaluations/NAME/libero_goal-{think,mask}    a comparison
    python -m dtvla.report run=outputs/runs/NAME                                Markdown, pictures beside it

Settings are in ``conf/report.yaml``.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtvla.cli import entry

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Write the report of the folders that the command line names, or of ``run=FOLDER``."""
    sys.argv[1:] = name_folders(sys.argv[1:])
    _main()


@entry("report")
def _main(cfg: "DictConfig") -> None:
    run(cfg)


def run(cfg: "DictConfig") -> Path:
    """Write the report as configured: HTML for folders, Markdown for a run.

    Raises:
        UserError: a setting is wrong, a folder is missing or holds nothing, a file is damaged.
    """
    from omegaconf import OmegaConf

    from dtvla.errors import UserError

    if not cfg.folders:
        from dtvla.analysis.report import write_report

        return write_report(cfg)
    if not OmegaConf.is_missing(cfg, "run") or cfg.evaluations is not None:
        raise UserError("run, evaluations: found folders, too; name all of them as folders, dtvla report FOLDER...")
    from dtvla.analysis.html import write_html

    return write_html(cfg)


def name_folders(arguments: Sequence[str]) -> list[str]:
    """Turn the words that come first on the command line into the setting ``folders``, the rest as it is.

    A word is a setting when it holds ``=``, unless a file or folder of this name exists (multirun makes such names).
    """
    count = 0
    for word in arguments:
        if word.startswith("-") or ("=" in word and not Path(word).expanduser().exists()):
            break
        count += 1
    if not count:
        return list(arguments)
    quoted = [word.replace("\\", "\\\\").replace("'", "\\'") for word in arguments[:count]]
    return ["folders=[" + ",".join(f"'{word}'" for word in quoted) + "]", *arguments[count:]]


if __name__ == "__main__":
    main()
