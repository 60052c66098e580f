"""Where a policy looks: attention of its thought and action tokens to pictures, prompt, thought and actions."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dtvla.errors import UserError
from dtvla.policy.attention import Segment, positions, visible
from dtvla.policy.layout import IGNORE, Batch, Example, stack

if TYPE_CHECKING:
    import pandas as pd

    from dtvla.policy.policy import Policy

PROMPT, THOUGHT, ACTIONS = "prompt", "thought", "actions"


def sequence(policy: "Policy", observation: Mapping[str, Any], thought_ids: Sequence[int]) -> Batch:
    """The sequence of one decision as a row: pictures, prompt, thought, and an action block without content.

    Args:
        policy: whose sequences they are.
        observation: as for :meth:`dtvla.policy.policy.Policy.act`.
        thought_ids: from ``<think>`` to ``</think>``; an ``<action>`` behind it is left out, as the block has it.

    Raises:
        UserError: the decoder is autoregressive, so that what actions see and do depends on those written before.
    """
    if policy.model.autoregressive:
        raise UserError("checkpoint: its decoder is autoregressive; give one with a hybrid decoder")
    layout = policy.processor.layout
    think = [i for i in thought_ids if i != layout.vocabulary.action_start_id]
    parts = [layout.prompt(str(observation["instruction"])), think, layout.act_block()]
    counts = torch.tensor([len(part) for part in parts])
    ids_T = torch.tensor([i for part in parts for i in part])
    slot_T = torch.zeros(len(ids_T), dtype=torch.bool)
    slot_T[int(counts[:2].sum()) + 1 :][: layout.slots] = True
    segment_T = torch.tensor([Segment.PREFIX, Segment.THINK, Segment.ACT]).repeat_interleave(counts)
    example = Example(ids_T, segment_T, torch.full_like(ids_T, IGNORE), slot_T)
    return Batch(
        pixels_BNCHW=policy.processor.pixels(observation)[None],
        actions_BSD=torch.zeros(1, layout.chunk, layout.action_dim),
        **stack([example], layout.vocabulary.pad_id),
    )


def segments(policy: "Policy", batch: Batch) -> dict[str, slice]:
    """Where the parts of a row of :func:`sequence` lie: each camera, then prompt, thought and actions."""
    segment_T, cameras = batch.segment_BT[0], policy.processor.images.cameras
    images = policy.processor.layout.image_tokens
    lengths = dict.fromkeys(cameras, images // len(cameras))
    lengths[PROMPT] = int((segment_T == Segment.PREFIX).sum()) - images
    lengths[THOUGHT] = int((segment_T == Segment.THINK).sum())
    lengths[ACTIONS] = int((segment_T == Segment.ACT).sum())
    parts, start = {}, 0
    for name, length in lengths.items():
        parts[name] = slice(start, start + length)
        start += length
    return parts


def allowed(policy: "Policy", batch: Batch) -> Tensor:
    """Who may see whom in a row of :func:`sequence`: bool (T, T), queries by keys."""
    return visible(batch.segment_BT, rule=policy.model.rule)[0]


def attention_maps(policy: "Policy", batch: Batch) -> Tensor:
    """Attention weights of a row of :func:`sequence`.

    Returns:
        (layers, heads, T, T), queries by keys; every row of keys sums to 1.
    """
    model = policy.model
    text: Any = model.config.text_config
    kernel = text._attn_implementation
    mask_TT = allowed(policy, batch)
    with torch.no_grad():
        embeddings_BTD = model.embed(batch)
        bias_TT = torch.zeros(mask_TT.shape, dtype=embeddings_BTD.dtype)
        bias_TT.masked_fill_(~mask_TT, torch.finfo(embeddings_BTD.dtype).min)
        model.set_attn_implementation({"text_config": "eager"})  # the one that gives its weights away
        try:
            output = model.model.language_model(
                inputs_embeds=embeddings_BTD,
                attention_mask=bias_TT[None, None],
                position_ids=positions(batch.segment_BT, rule=model.rule),
                use_cache=False,
                output_attentions=True,
            )
        finally:
            model.set_attn_implementation({"text_config": kernel})
    return torch.cat(output.attentions)


def attention_mass(
    policy: "Policy", observations: Sequence[Mapping[str, Any]], thoughts: Sequence[Sequence[int]]
) -> "pd.DataFrame":
    """How the attention of thought and action tokens is shared out, by layer; the mean of heads and tokens.

    Args:
        policy: on the CPU.
        observations: one for each decision.
        thoughts: ids for each, as for :func:`sequence`.

    Returns:
        A row for each decision, layer (from 0), ``query`` (thought or actions) and ``source`` (a camera, prompt,
        thought or actions): ``share`` of the attention, and ``even``, the share that the source would have if all
        visible tokens were seen alike.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for decision, (observation, ids) in enumerate(zip(observations, thoughts, strict=True)):
        batch = sequence(policy, observation, ids)
        parts, mask_TT = segments(policy, batch), allowed(policy, batch).double()
        even_TT = mask_TT / mask_TT.sum(-1, keepdim=True)
        for layer, weights_TT in enumerate(attention_maps(policy, batch).double().mean(1)):
            for query in (THOUGHT, ACTIONS):
                for source, where in parts.items():
                    share, even = (m[parts[query], where].sum(-1).mean().item() for m in (weights_TT, even_TT))
                    rows.append({"decision": decision, "layer": layer, "query": query, "source": source})
                    rows[-1] |= {"share": share, "even": even}
    return pd.DataFrame(rows)
