"""Measurements of speed: what is timed, against what, and how far it is from what the device allows."""

from dtvla.errors import UserError

STUDIES = {
    "latency": "dtvla.benchmarks.studies",
    "throughput": "dtvla.benchmarks.studies",
    "rollout": "dtvla.benchmarks.rollout",
    "parity": "dtvla.benchmarks.parity",
    "memory": "dtvla.benchmarks.memory",
    "training": "dtvla.benchmarks.training",
    "grpo": "dtvla.benchmarks.grpo",
}
"""Name of a study -> module with a function of that name and its ``Settings``."""


def check_study(name: str | None) -> str:
    """The name of a study; known without loading torch.

    Raises:
        UserError: none was named, or an unknown one.
    """
    if name in STUDIES:
        return name
    found = "none was named" if name is None else f"{name!r} is unknown"
    choices = ", ".join(STUDIES)
    raise UserError(f"benchmark: {found}; begin with one of {choices}, e.g. dtvla benchmark latency model=small")
