"""Command lines: the Hydra wrapper that every entry point uses, and the console command ``dtvla``.

``python -m dtvla.train ...`` and ``dtvla train ...`` are the same thing. Heavy libraries are imported by the entry
points inside their task functions, so ``--help`` and misspelled options answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from dtvla.errors import UserError

COMMANDS = {
    "doctor": "is this machine fit? versions, GPU, renderer, LIBERO's assets, MuJoCo drift, disk",
    "collect": "make demonstrations: a scripted expert with thoughts, or LIBERO's own replayed (source=hdf5)",
    "annotate": "thoughts for a dataset: by the simulator's state, an endpoint or a policy; checked, with provenance",
    "review": "look at thoughts in the browser: accept, edit or reject them",
    "train": "fine-tune a policy, e.g. +experiment=libero_cot_sft",
    "evaluate": "run a checkpoint in LIBERO: success rates with intervals, videos with thoughts",
    "compare": "two evaluations over the same init states: difference with interval, McNemar's paired test",
    "report": "one page of a training run, its evaluations, or a comparison: HTML that holds everything, or Markdown",
    "export": "write a checkpoint in the published or in dtvla's format, with adapters merged; push it to a hub",
    "benchmark": "measure: latency, throughput, rollout, parity, training, memory, grpo",
}
USER_ERROR_EXIT_CODE = 2
INTERRUPT_EXIT_CODE = 130


def config_dir() -> Path:
    """Return the folder of dtvla's Hydra configuration: inside an installed wheel, else of the checkout.

    Raises:
        UserError: neither place holds it (a broken installation).
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise UserError(f"installation: no conf/ inside or beside {package}; install dtvla again")


def entry(config_name: str) -> Callable[[Callable[[Any], Any]], Callable[[], None]]:
    """Make a command-line entry point of a function that takes the composed configuration.

    The configuration is ``conf/<config_name>.yaml``. A folder of the user's own (``--config-dir``) is searched first:
    its files add to the shipped ones and win over those of the same name. A :class:`UserError` and a missing or
    mistyped value end the process with one line and exit code 2. In a multirun a job that fails, for whatever reason,
    leaves the others alone: it is named at the end, and the exit code is 2.

    Args:
        config_name: name of the primary configuration, without ``.yaml``.
    """

    def decorate(function: Callable[[Any], Any]) -> Callable[[], None]:
        @wraps(function)
        def task(cfg: Any) -> Any:
            from dtvla import jobs

            try:
                return jobs.run(function, cfg) if jobs.in_multirun() else function(cfg)
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                raise SystemExit(INTERRUPT_EXIT_CODE) from None
            except Exception as error:
                message = explanation(error)
                if message is None:
                    raise
                print(f"error: {message}", file=sys.stderr)
            raise SystemExit(USER_ERROR_EXIT_CODE)

        @wraps(function)
        def run() -> None:
            import hydra

            from dtvla.multirun import check_plugins, told

            try:
                folder = _put_users_folder_first(config_dir())
                check_plugins(sys.argv[1:])
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                raise SystemExit(USER_ERROR_EXIT_CODE) from None
            with told():
                hydra.main(version_base="1.3", config_path=str(folder), config_name=config_name)(task)()

        return run

    return decorate


def explanation(error: Exception) -> str | None:
    """What a user is told of an error that they can mend, on one line; None of a defect of dtvla."""
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: not given; set {error.full_key}=..."
    if isinstance(error, OmegaConfBaseException):
        return f"configuration: {' '.join(str(error).split())}"
    return None


def _put_users_folder_first(shipped: Path) -> Path:
    """Return the folder that Hydra searches first, and let ``--config-dir`` name the other one.

    Hydra itself searches ``--config-dir`` last, where it can add files but not replace any.

    Raises:
        UserError: the user's folder does not exist.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    options, others = parser.parse_known_args(sys.argv[1:])
    if options.config_dir is None:
        return shipped
    own = Path(options.config_dir).expanduser().resolve()
    if not own.is_dir():
        raise UserError(f"--config-dir: {own} is not a folder; name the folder that holds your configuration files")
    sys.argv[1:] = ["--config-dir", str(shipped), *others]
    return own


def leading_words(arguments: Sequence[str], most: int = sys.maxsize) -> list[str]:
    """Up to `most` words that come first on a command line and are no settings, quoted for Hydra.

    A word is a setting when it holds ``=``, unless a file or folder of this name exists (multirun makes such names).
    """
    words = takewhile(
        lambda word: not word.startswith("-") and ("=" not in word or Path(word).expanduser().exists()), arguments
    )
    return ["'" + word.replace("\\", "\\\\").replace("'", "\\'") + "'" for word in islice(words, most)]


def command_line(name: str) -> str | None:
    """The command that repeats this Hydra job of entry point ``name``; None outside of Hydra."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return None
    root = os.environ.get("DTVLA_ROOT")  # decides where relative results are looked for
    variables = [f"DTVLA_ROOT={root}"] if root else []
    settings = list(HydraConfig.get().overrides.task)
    if any(setting.startswith("+sweep=") for setting in settings):
        settings.append("hydra.mode=RUN")  # a search begins a multirun even without -m; this is one trial of it
    return shlex.join([*variables, "python", "-m", f"dtvla.{name}", *settings])


def main() -> None:
    """Run ``dtvla COMMAND [options]``."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help", "help"):
        print("usage: dtvla COMMAND [options]      (dtvla COMMAND --help lists a command's settings)\n")
        for name, text in COMMANDS.items():
            print(f"  {name:10s}{text}")
        return
    if sys.argv[1] == "--version":
        from dtvla import __version__

        print(__version__)
        return
    command = sys.argv.pop(1)
    if command not in COMMANDS:
        print(f"error: command: {command!r} is unknown; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(USER_ERROR_EXIT_CODE)
    sys.argv[0] = f"{os.path.basename(sys.argv[0])} {command}"
    importlib.import_module(f"dtvla.{command}").main()
