"""What a GRPO training logs, as panels for :func:`dtvla.analysis.curves.plot_curves` and as a table."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dtvla.analysis.curves import Panel

if TYPE_CHECKING:
    import pandas as pd

GROUP_PANELS = (
    Panel("sampled success", "share of episodes", ("success",), share=True),
    Panel("groups with a gradient", "share of groups", ("kept_share",), share=True),
    Panel("spread of returns in a group", "standard deviation", ("group_spread",)),
)
UPDATE_PANELS = (
    Panel("size of an update", "KL from the sampling policy, nats", ("update_kl",)),
    Panel("largest change of a token", "log of the probability ratio", ("log_ratio_max",)),
    Panel("clipped tokens", "share", ("clipped_above", "clipped_below")),
)
ENTROPY_PANELS = (
    Panel("entropy of an action token", "nats", ("action_entropy",)),
    Panel("entropy of a thought token", "nats", ("thought_entropy",)),
    Panel("KL from the start", "nats", ("kl",)),
)


def iteration_table(series: Mapping[str, tuple[list[int], list[float]]], every: int = 5) -> "pd.DataFrame":
    """Sampled episodes in blocks of iterations.

    Args:
        series: of :func:`dtvla.analysis.curves.read_metrics`.
        every: iterations of a block.

    Returns:
        Columns ``iterations`` (``1-5``, ...), ``episodes``, ``success``, ``thought_entropy`` and ``action_entropy``
        (nats), means over the episodes.
    """
    import numpy as np
    import pandas as pd

    names = ["success", "thought_entropy", "action_entropy"]
    episodes, *numbers = (np.array(series[f"sampled/{name}"][1]) for name in ["episodes", *names])
    rows = []
    for first in range(0, len(episodes), every):
        part = slice(first, first + every)
        row = {"iterations": f"{first + 1}-{min(first + every, len(episodes))}", "episodes": int(episodes[part].sum())}
        rows.append(row | {n: np.average(x[part], weights=episodes[part]) for n, x in zip(names, numbers, strict=True)})
    return pd.DataFrame(rows)
