"""The model against transformers' own forward, and the invariances of the hybrid mask, in float64."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import PaliGemmaForConditionalGeneration

from dtvla.errors import UserError
from dtvla.policy.layout import IGNORE, Batch, Segment
from dtvla.policy.model import make_config, supervised_positions
from dtvla.policy.policy import Policy

from .conftest import SETTINGS, make_batch, random_example, sentence

pytestmark = pytest.mark.usefixtures("exact_norms")


def transformers_logits(policy: Policy, batch: Batch) -> torch.Tensor:
    """PaliGemmaForConditionalGeneration's own forward on unpadded rows, with the mask and the inputs spelled out."""
    model, vocabulary = policy.model, policy.processor.layout.vocabulary
    published = PaliGemmaForConditionalGeneration(model.config).double().eval()
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("slot_embedding")}
    published.load_state_dict(weights)
    length = batch.segment_BT.shape[1]
    mask = torch.zeros(len(batch), 1, length, length, dtype=torch.bool)
    for b, row in enumerate(batch.segment_BT.tolist()):
        prefix = row.count(Segment.PREFIX)
        for q in range(length):
            reach = prefix if q < prefix else length if row[q] == Segment.ACT else q + 1
            mask[b, 0, q, :reach] = True
    embeddings = published.get_input_embeddings()(batch.input_ids_BT)
    slots = torch.zeros_like(embeddings)
    if model.slot_embedding is not None:
        scaled = model.slot_embedding.weight * model.config.text_config.hidden_size**0.5
        slots[batch.slot_BT] = scaled.repeat(len(batch), 1)
    embeddings = torch.where(batch.slot_BT[..., None], slots, embeddings)
    pixels = (batch.pixels_BNCHW.double() / 255 - 0.5) / 0.5
    for b in range(len(batch)):
        images = published.get_image_features(pixels[b]).pooler_output.flatten(0, 1)
        embeddings[b, batch.input_ids_BT[b] == vocabulary.image_id] = images
    return published(inputs_embeds=embeddings, attention_mask=mask).logits


@pytest.mark.parametrize("slot_embedding", [True, False])
def test_logits_equal_transformers_own_forward(make_policy: Callable[..., Policy], slot_embedding: bool) -> None:
    policy, rng = make_policy(slot_embedding=slot_embedding), np.random.default_rng(0)
    for _ in range(4):
        batch = make_batch(policy, [random_example(policy, rng)])
        with torch.no_grad():
            ours, theirs = policy.model(batch), transformers_logits(policy, batch)
        assert (ours - theirs[:, :-1][supervised_positions(batch)]).abs().max() < 1e-9


def test_batch_mates_and_padding_change_nothing(policy: Policy) -> None:
    rng = np.random.default_rng(1)
    samples = [random_example(policy, rng) for _ in range(6)]
    with torch.no_grad():
        together = policy.model.encode(make_batch(policy, samples))
        for row, sample in enumerate(samples):
            alone = policy.model.encode(make_batch(policy, [sample]))[0]
            assert (together[row, : len(alone)] - alone).abs().max() < 1e-9


def test_action_labels_never_change_a_logit(policy: Policy) -> None:
    """Neither through the labels nor through ids at the slots, whose embedding is replaced."""
    rng = np.random.default_rng(2)
    batch = make_batch(policy, [random_example(policy, rng) for _ in range(3)])
    bins = policy.processor.layout.bins
    with torch.no_grad():
        before = policy.model(batch)
        drawn = torch.from_numpy(rng.integers(bins.first_id, bins.last_id + 1, int(batch.slot_BT.sum())))
        batch.labels_BT[batch.slot_BT] = drawn
        batch.input_ids_BT[batch.slot_BT] = drawn.flip(0)
        batch.actions_BSD = -batch.actions_BSD
        assert torch.equal(policy.model(batch), before)


def test_information_flows_exactly_where_the_rule_says(policy: Policy) -> None:
    """Change one input token: the positions that may see it change, all others do not."""
    rng = np.random.default_rng(3)
    example, pixels, actions = random_example(policy, rng)
    layout = policy.processor.layout
    example = layout.encode(sentence(rng, 3, 8), sentence(rng, 5, 9), actions)
    batch = make_batch(policy, [(example, pixels, actions)])
    segment = example.segment_T.tolist()
    first = {s: segment.index(s) for s in (Segment.PREFIX, Segment.THINK, Segment.ACT)}
    with torch.no_grad():
        before = policy.model.encode(batch)[0]
        for changed in (layout.image_tokens + 2, first[Segment.THINK] + 2, first[Segment.ACT] + layout.slots + 1):
            other = make_batch(policy, [(example, pixels, actions)])
            other.input_ids_BT = batch.input_ids_BT.clone()
            other.input_ids_BT[0, changed] = layout.vocabulary.action_first_id - 1
            moved = (policy.model.encode(other)[0] - before).abs().amax(-1) > 1e-12
            kind = segment[changed]
            expected = [
                kind == Segment.PREFIX or s == Segment.ACT or (s == Segment.THINK and kind == s and q >= changed)
                for q, s in enumerate(segment)
            ]
            assert moved.tolist() == expected


def test_only_supervised_positions_reach_the_head(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    batch = make_batch(policy, [random_example(policy, rng) for _ in range(3)])
    seen: list[int] = []
    hook = policy.model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    policy.model(batch)
    hook.remove()
    assert seen == [int((batch.labels_BT != IGNORE).sum())]


def test_action_logits_are_the_bands_columns_by_bin(policy: Policy) -> None:
    hidden = torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bins = policy.processor.layout.bins
    full = policy.model.logits(hidden)
    for k in (0, 1, bins.count - 1):
        column = policy.model.action_logits(hidden, bins)[:, k]
        assert torch.allclose(column, full[:, bins.last_id - k], atol=1e-12)


def test_fresh_rows_of_neighbouring_bins_are_similar(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(action_bins=256, text=SETTINGS["text"] | {"hidden_size": 128})
    bins, table = policy.processor.layout.bins, policy.model.get_input_embeddings().weight
    rows = table[bins.first_id : bins.last_id + 1].flip(0)
    similarity = functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    near = similarity.diagonal(4).mean()
    far = similarity.diagonal(128).abs().mean()
    assert near > 0.95
    assert far < 0.35
    assert rows.std().item() == pytest.approx(table[3 : bins.first_id].std().item(), rel=0.1)
    assert policy.model.lm_head.weight is table


def test_image_size_must_fit_the_patches(policy: Policy) -> None:
    with pytest.raises(UserError, match="patch_size"):
        make_config(SETTINGS | {"image_size": 20}, policy.processor.layout.vocabulary)
