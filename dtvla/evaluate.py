"""Entry point: run a checkpoint in LIBERO and count its successes.

    python -m dtvla.evaluate checkpoint=DIR env=libero_object env.task_ids=[0] init_states=[30,31]
    python -m dtvla.evaluate -m cot=think,mask,random checkpoint=DIR      # one results folder for each mode

Settings are in ``conf/evaluate.yaml``. Returns the success rate, so that sweeps can use it.
"""

from typing import TYPE_CHECKING

from dtvla.cli import entry

if TYPE_CHECKING:
    from omegaconf import DictConfig


@entry("evaluate")
def main(cfg: "DictConfig") -> float:
    """Evaluate as configured; print a table and where the results are."""
    from dtvla.rollout.evaluation import evaluate

    return evaluate(cfg)


if __name__ == "__main__":
    main()
