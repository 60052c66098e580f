"""Entry point: fine-tune a policy that thinks and then acts.

    python -m dtvla.train +experiment=quickstart
    python -m dtvla.train +experiment=libero_cot_sft trainer.precision=bf16-mixed

Settings are in ``conf/train.yaml`` and the groups it names. Writes the run folder ``<paths.runs>/<name>`` and returns
the metric named by ``optimized_metric``, so that sweeps can use it.
"""

from typing import TYPE_CHECKING

from dtvla.cli import entry

if TYPE_CHECKING:
    from omegaconf import DictConfig


@entry("train")
def main(cfg: "DictConfig") -> float | None:
    """Train as configured; print where the policy is."""
    from dtvla.learning.experiment import train

    return train(cfg)


if __name__ == "__main__":
    main()
