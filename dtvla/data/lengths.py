"""How many tokens each sample will have, known before any is made; thoughts that are too long are found with it."""

from __future__ import annotations

import numpy as np

from dtvla.data.demonstrations import Demonstrations
from dtvla.errors import UserError
from dtvla.policy.layout import Layout

LONG_THOUGHTS = ("error", "truncate")


class SequenceLengths:
    """Sequence lengths by frame: each distinct instruction and thought is tokenised once.

    Attributes:
        truncated: frames whose thought is cut.
    """

    def __init__(
        self, demonstrations: Demonstrations, layout: Layout, long_thoughts: str = "error", acts: bool = True
    ) -> None:
        """Tokenise all texts.

        Args:
            demonstrations: the frames.
            layout: of the policy.
            long_thoughts: what happens to thoughts of more than ``layout.max_thought_tokens``: ``error``, ``truncate``.
            acts: whether sequences go on behind the thought, see :meth:`~dtvla.policy.layout.Layout.encode`.

        Raises:
            UserError: an instruction or thought is too long.
        """
        if long_thoughts not in LONG_THOUGHTS:
            raise UserError(f"data.long_thoughts: {long_thoughts!r} is unknown; use {' or '.join(LONG_THOUGHTS)}")
        tasks = demonstrations.instructions
        self._prompts_PT = np.array(
            [[len(layout.prompt(text, thinking)) for text in tasks] for thinking in (False, True)]
        )
        self._tasks_F = demonstrations.task_index_F
        self._actions = len(layout.ending(acts))
        texts = demonstrations.thoughts if demonstrations.has_thoughts else [""]
        counts_U = np.array([len(ids) for ids in layout.tokens([text.strip() for text in texts])])
        thought_F = demonstrations.thought_index_F if demonstrations.has_thoughts else np.zeros_like(self._tasks_F)
        long_F = counts_U[thought_F] > layout.max_thought_tokens
        self.truncated = int(long_F.sum())
        if self.truncated and long_thoughts == "error":
            longest = int(counts_U[thought_F].argmax())
            episode = int(np.searchsorted(demonstrations.stops_E, longest, side="right"))
            raise UserError(
                f"data: the thoughts of {self.truncated} of {len(long_F)} frames are longer than "
                f"model.max_thought_tokens={layout.max_thought_tokens} (the longest has {counts_U.max()}, episode "
                f"{episode}); raise that, or cut them with data.long_thoughts=truncate"
            )
        self._thoughts_F = np.minimum(counts_U, layout.max_thought_tokens)[thought_F]

    def __call__(self, frames_B: np.ndarray, bare_B: np.ndarray) -> np.ndarray:
        """Tokens of each sample.

        Args:
            frames_B: dataset indices.
            bare_B: which samples are shown without their thought.
        """
        thoughts_B = np.where(bare_B, 0, self._thoughts_F[frames_B])
        prompts_B = self._prompts_PT[(thoughts_B > 0).astype(int), self._tasks_F[frames_B]]
        return prompts_B + thoughts_B + 2 + self._actions

    def longest(self) -> int:
        """Tokens of the longest sample of all frames."""
        frames_F = np.arange(len(self._tasks_F))
        return int(self(frames_F, np.zeros(len(frames_F), dtype=bool)).max())
