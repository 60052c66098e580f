"""How far a policy's actions move when its thought, or what it sees, is exchanged."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dtvla.analysis.attention_map import sequence
from dtvla.errors import UserError
from dtvla.policy.adapters import linear_rows
from dtvla.policy.cot import STRATEGIES, CotMode
from dtvla.policy.layout import Batch

if TYPE_CHECKING:
    import pandas as pd

    from dtvla.policy.policy import Policy

CHANGES = ("thought empty", "thought random", "thought shuffled", "thought of another moment", "other pictures")
_MODES = {"thought empty": "mask", "thought random": "random", "thought shuffled": "shuffle"}


def action_log_probs(policy: "Policy", batch: Batch) -> Tensor:
    """Log-probabilities of the action bins after a sequence of :func:`dtvla.analysis.attention_map.sequence`.

    Returns:
        float64 (S * D, K), a row for each action token, bins in ascending order.
    """
    layout, bins = policy.processor.layout, policy.processor.layout.bins
    with torch.no_grad():
        hidden_TD = policy.model.encode(batch)[0]
        before = int(batch.slot_BT[0].nonzero()[0]) - 1  # a slot is read at the token before it
        read_AD = hidden_TD[before : before + layout.slots]
        logits_AK = linear_rows(policy.model.lm_head, read_AD, bins.first_id, bins.last_id).flip(-1)
    return logits_AK.double().log_softmax(-1)


def sensitivity(
    policy: "Policy",
    observations: Sequence[Mapping[str, Any]],
    thoughts: Sequence[Sequence[int]],
    *,
    draws: int = 4,
    seed: int = 0,
) -> "pd.DataFrame":
    """How far the distribution of actions moves with each of :data:`CHANGES`, one at a time.

    Random thoughts are as long as the own one. Other moments are the decisions whose thought is another: their
    thought under the own pictures, or their pictures over the own thought, which says how much pictures matter.

    Args:
        policy: with a hybrid decoder.
        observations: of the decisions of an episode, one for each.
        thoughts: ids of the own thought for each.
        draws: of random and of shuffled thoughts.
        seed: of the draws.

    Returns:
        A row for each decision and change, means over draws or other moments: ``distance`` (total variation between
        the distributions of an action token, in [0, 1]; mean of the tokens), ``bins`` (share of tokens whose most
        likely bin is another) and ``shift`` (mean distance of the most likely actions, normalised to [-1, 1]).

    Raises:
        UserError: the decoder is autoregressive, or all thoughts are the same.
    """
    import pandas as pd

    if len({tuple(ids) for ids in thoughts}) < 2:
        raise UserError("thoughts: all are the same; choose an episode in which the thought changes")
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for decision, (observation, own) in enumerate(zip(observations, thoughts, strict=True)):
        before = action_log_probs(policy, sequence(policy, observation, own))
        others = [k for k, ids in enumerate(thoughts) if list(ids) != list(own)]
        for change in CHANGES:
            made = [
                _moved(policy, before, action_log_probs(policy, sequence(policy, o, ids)))
                for o, ids in _changed(policy, change, observations, thoughts, decision, others, draws, rng)
            ]
            numbers = {name: sum(one[name] for one in made) / len(made) for name in made[0]}
            rows.append({"decision": decision, "change": change, **numbers})
    return pd.DataFrame(rows)


def _changed(
    policy: "Policy",
    change: str,
    observations: Sequence[Mapping[str, Any]],
    thoughts: Sequence[Sequence[int]],
    decision: int,
    others: Sequence[int],
    draws: int,
    rng: torch.Generator,
) -> Iterator[tuple[Mapping[str, Any], Sequence[int]]]:
    """Observations and thoughts to decide on instead of the own ones."""
    observation, own = observations[decision], thoughts[decision]
    if change == "other pictures":
        yield from ((observations[k], own) for k in others)
    elif change == "thought of another moment":
        yield from ((observation, thoughts[k]) for k in others)
    else:
        mode, layout = _MODES[change], policy.processor.layout
        words = sum(i not in layout.vocabulary.control_ids for i in own)
        cot = CotMode(mode, length=words)
        for _ in range(draws if STRATEGIES[mode].draws else 1):
            yield observation, STRATEGIES[mode].replace(list(own), observation, layout, cot, rng) or []


def _moved(policy: "Policy", before_AK: Tensor, after_AK: Tensor) -> dict[str, float]:
    bins = policy.processor.layout.bins
    chosen_A, other_A = bins.most_likely(before_AK), bins.most_likely(after_AK)
    return {
        "distance": 0.5 * (before_AK.exp() - after_AK.exp()).abs().sum(-1).mean().item(),
        "bins": (chosen_A != other_A).double().mean().item(),
        "shift": (bins.value(chosen_A) - bins.value(other_A)).abs().mean().item(),
    }
