"""The policy that solved most, kept while training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dtvla.analysis.intervals import Rate
from dtvla.errors import UserError

if TYPE_CHECKING:
    from dtvla.policy.policy import Policy

SCORE_FILE = "rollouts.yaml"


class BestPolicy:
    """One policy folder, replaced whenever a policy is more successful; of equals, the earlier one stays.

    The folder holds its own score, so a training that is killed and resumed continues to compare. A score over other
    episodes can't be compared: it counts as none.
    """

    def __init__(self, folder: Path, episodes: Mapping[str, Any]) -> None:
        """Look at nothing yet.

        Args:
            folder: of the policy, see :func:`dtvla.policy.checkpoint.save`, and its score.
            episodes: what decides about the episodes that scores are taken over, plain values.
        """
        self.folder, self.episodes = folder, dict(episodes)

    def score(self) -> dict[str, Any] | None:
        """What the kept policy reached: ``step`` and the fields of :meth:`dtvla.analysis.intervals.Rate.to_dict`."""
        path = self.folder / SCORE_FILE
        if not path.is_file():
            return None
        score: dict[str, Any] = yaml.safe_load(path.read_text())
        return score if score.pop("over") == self.episodes else None

    def offer(self, policy: Policy, step: int, rate: Rate) -> bool:
        """Keep a policy if it is the best so far, in place of the one before; the folder is never half-written.

        Args:
            policy: with whole weights, see :func:`dtvla.policy.gathering.gathered`.
            step: optimiser steps behind it.
            rate: of its successes.

        Returns:
            Whether it is kept.

        Raises:
            UserError: it can't be written, for example on a full disk; the one before stays.
        """
        from safetensors import SafetensorError

        from dtvla.policy.checkpoint import write
        from dtvla.policy.weights import new_folder

        before = self.score()
        if before is not None and rate.share <= before["rate"]:
            return False
        score = {"step": step, **rate.to_dict(), "over": self.episodes}
        try:
            with new_folder(self.folder, replace=True) as temporary:
                write(policy, temporary)
                (temporary / SCORE_FILE).write_text(yaml.safe_dump(score, sort_keys=False))
        except (OSError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.folder}: not saved ({reason}); make room and continue with resume=true") from error
        return True
