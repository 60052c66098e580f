"""Entry point: measure how fast a policy decides and how fast it is simulated; the first word names the study.

    python -m dtvla.benchmark latency model=small
    python -m dtvla.benchmark throughput model=small batch_sizes=[1,4,16]
    python -m dtvla.benchmark rollout env=libero_object
    python -m dtvla.benchmark parity env=libero_object
    python -m dtvla.benchmark grpo model=nano env=libero_object

Settings are in ``conf/benchmark.yaml``; ``docs/benchmark.md`` says what is measured and how to read it.
"""

import sys
from typing import TYPE_CHECKING, Any

from dtvla.cli import command_line, entry

if TYPE_CHECKING:
    from omegaconf import DictConfig


@entry("benchmark")
def benchmark(cfg: "DictConfig") -> None:
    """Measure as configured; print tables and where the JSON is."""
    from pathlib import Path

    from omegaconf import OmegaConf

    from dtvla.benchmarks import check_study

    study = check_study(cfg.study)
    from dtvla.benchmarks.record import run, settings_of

    values: Any = OmegaConf.to_container(cfg, resolve=True)
    output = Path(str(cfg.output)).expanduser()
    run(study, settings_of(study, values), output, command_line("benchmark"))


def main() -> None:
    """Turn the first word into the setting ``study`` and let Hydra compose the rest."""
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-") and "=" not in sys.argv[1]:
        sys.argv[1] = f"study={sys.argv[1]}"
    benchmark()


if __name__ == "__main__":
    main()
