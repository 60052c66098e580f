"""The model against transformers' own forward, and the invariances of the hybrid mask, in float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask
from transformers import PaliGemmaForConditionalGeneration

from dtvla.errors import UserError
from dtvla.policy.adapters import linear_rows
from dtvla.policy.attention import positions
from dtvla.policy.layout import IGNORE, Batch, Segment
from dtvla.policy.loss import sft_loss
from dtvla.policy.model import HybridVLA, configure, make_config, supervised_positions
from dtvla.policy.policy import Policy
from dtvla.policy.vocabulary import Vocabulary

from .conftest import SETTINGS, make_batch, random_example, sentence
from .test_vocabulary import PUBLISHED_CONFIG

pytestmark = pytest.mark.usefixtures("exact_norms")


def transformers_logits(policy: Policy, batch: Batch) -> torch.Tensor:
    """PaliGemmaForConditionalGeneration's own forward on unpadded rows, with the mask and the inputs spelled out."""
    model, vocabulary = policy.model, policy.processor.layout.vocabulary
    published = PaliGemmaForConditionalGeneration(model.config).double().eval()
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("slot_embedding")}
    published.load_state_dict(weights)
    autoregressive = model.config.action_decoder == "autoregressive"
    length = batch.segment_BT.shape[1]
    mask = torch.zeros(len(batch), 1, length, length, dtype=torch.bool)
    for b, row in enumerate(batch.segment_BT.tolist()):
        prefix = row.count(Segment.PREFIX)
        for q in range(length):
            reach = prefix if q < prefix else length if row[q] == Segment.ACT and not autoregressive else q + 1
            mask[b, 0, q, :reach] = True
    embeddings = published.get_input_embeddings()(batch.input_ids_BT)
    slots = torch.zeros_like(embeddings)
    if model.slot_embedding is not None:
        scaled = model.slot_embedding.weight * model.config.text_config.hidden_size**0.5
        slots[batch.slot_BT] = scaled.repeat(len(batch), 1)
    if not autoregressive:
        embeddings = torch.where(batch.slot_BT[..., None], slots, embeddings)
    pixels = (batch.pixels_BNCHW.double() / 255 - 0.5) / 0.5
    for b in range(len(batch)):
        images = published.get_image_features(pixels[b]).pooler_output.flatten(0, 1)
        embeddings[b, batch.input_ids_BT[b] == vocabulary.image_id] = images
    return published(inputs_embeds=embeddings, attention_mask=mask).logits


MODELS = [{"slot_embedding": True}, {"slot_embedding": False}, {"slot_embedding": False, "decoder": "autoregressive"}]


@pytest.mark.parametrize("changes", MODELS)
def test_logits_equal_transformers_own_forward(make_policy: Callable[..., Policy], changes: dict[str, Any]) -> None:
    policy, rng = make_policy(**changes), np.random.default_rng(0)
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
        column = linear_rows(policy.model.lm_head, hidden, bins.first_id, bins.last_id).flip(-1)[:, k]
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


def test_visible_padding_disturbs_a_padded_row_and_no_other(make_policy: Callable[..., Policy]) -> None:
    policy, rng = make_policy(), np.random.default_rng(5)
    short, long = random_example(policy, rng), random_example(policy, rng)
    while len(long[0].input_ids_T) <= len(short[0].input_ids_T):
        long = random_example(policy, rng)
    batch = make_batch(policy, [short, long])
    with torch.no_grad():
        clean = policy.model.encode(batch)
        policy.model.pads_visible = True
        leaking = policy.model.encode(batch)
    moved = (leaking - clean).abs().amax(-1)
    assert (moved[0, : len(short[0].input_ids_T)] > 1e-6).all()
    assert moved[1].max() < 1e-12


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("changes", [*MODELS, {"pads_visible": True}])
def test_flex_attention_equals_sdpa(make_policy: Callable[..., Policy], changes: dict[str, Any], packed: bool) -> None:
    rng = np.random.default_rng(6)
    policy = make_policy(**changes)
    model = policy.model
    model.pads_visible = changes.get("pads_visible", False)
    for count in (2, 3):
        batch = make_batch(policy, [random_example(policy, rng) for _ in range(count)])
        segment_BT, real_BT, sample_BT = batch.segment_BT, batch.segment_BT != Segment.PAD, None
        if packed:  # two samples in each row, whose padding is a third
            segment_BT = torch.cat([segment_BT, segment_BT.flip(0)], dim=1)
            real_BT = segment_BT != Segment.PAD
            sample_BT = torch.arange(2).repeat_interleave(segment_BT.shape[1] // 2).expand_as(segment_BT)
        embeddings = model.embed(batch).detach()
        if packed:
            embeddings = torch.cat([embeddings, embeddings.flip(0)], dim=1)
        found = {}
        for attention in ("sdpa", "flex"):
            configure(model, SETTINGS | changes | {"attention": attention})
            with torch.no_grad():
                mask = model.mask(segment_BT, sample_BT)
                assert isinstance(mask, BlockMask) == (attention == "flex")
                found[attention] = model.transform(embeddings, mask, positions(segment_BT, sample_BT, model.rule))[
                    real_BT
                ]
                if not packed:
                    assert torch.equal(model.encode(batch)[real_BT], found[attention])
        assert (found["flex"] - found["sdpa"]).abs().max() < 1e-9


def test_flex_attention_without_gradients_is_named_on_the_cpu(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(attention="flex")
    batch = make_batch(policy, [random_example(policy, np.random.default_rng(7))])
    with pytest.raises(UserError, match="model.attention: flex"):
        policy.model(batch)


@pytest.mark.parametrize("frozen", [(), ("embed_tokens", "vision_tower")])
def test_gradient_checkpointing_computes_twice_and_changes_nothing(
    make_policy: Callable[..., Policy], frozen: tuple[str, ...]
) -> None:
    batch, found, forwards = None, [], []
    for gradient_checkpointing in (False, True):
        policy = make_policy(gradient_checkpointing=gradient_checkpointing)
        batch = batch or make_batch(policy, [random_example(policy, np.random.default_rng(8)) for _ in range(3)])
        for name, parameter in policy.model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))
        calls: list[int] = []
        policy.model.model.language_model.layers[1].mlp.register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        loss = sft_loss(policy.model.train(), batch, policy.processor.layout.bins).mean
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in policy.model.parameters() if p.requires_grad)])
        forwards.append(len(calls))
    assert forwards == [1, 2]
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


def test_published_shape_has_the_published_number_of_parameters(published_settings: dict[str, Any]) -> None:
    config = make_config(published_settings, Vocabulary.from_config(PUBLISHED_CONFIG))
    with torch.device("meta"):
        model = HybridVLA(config)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    assert counts["vision_tower"] == 412_442_352
    assert counts["multi_modal_projector"] == 1152 * 2048 + 2048
    assert counts["language_model"] == 257_157 * 2048 + 1_981_882_368 + 2048
    assert sum(p.numel() for p in model.parameters()) == sum(counts.values()) == 2_923_345_648


def test_padded_vocabulary_gives_the_table_its_rows(make_policy: Callable[..., Policy]) -> None:
    policy, plain = make_policy(vocabulary_size=1000), make_policy()
    assert policy.model.get_input_embeddings().weight.shape[0] == policy.processor.layout.vocabulary.size == 1000
    assert policy.processor.layout.prompt("move down") == plain.processor.layout.prompt("move down")


def test_batches_that_do_not_fit_the_model_are_named(policy: Policy) -> None:
    batch = make_batch(policy, [random_example(policy, np.random.default_rng(9)) for _ in range(2)])
    size = policy.processor.layout.vocabulary.size
    changed = {name: getattr(batch, name).clone() for name in ("input_ids_BT", "labels_BT")}
    for name, wrong in (("input_ids_BT", size), ("input_ids_BT", -1), ("labels_BT", size)):
        ids_BT = changed[name].clone()
        ids_BT[1, 10] = wrong
        with pytest.raises(UserError, match=f"token {wrong} is outside"):
            policy.model(replace(batch, **{name: ids_BT}))
    for cameras in (batch.pixels_BNCHW[:, :1], batch.pixels_BNCHW.repeat(1, 2, 1, 1, 1)):
        with pytest.raises(UserError, match=f"{cameras.shape[1]} pictures"):
            policy.model(replace(batch, pixels_BNCHW=cameras))
    with pytest.raises(UserError, match=r"pictures: shape .* not \(batch, cameras, 3, 16, 16\)"):
        policy.model(replace(batch, pixels_BNCHW=batch.pixels_BNCHW[..., :8]))


def test_settings_that_contradict_are_named(policy: Policy, make_policy: Callable[..., Policy]) -> None:
    with pytest.raises(UserError, match="patch_size"):
        make_config(SETTINGS | {"image_size": 20}, policy.processor.layout.vocabulary)
    with pytest.raises(UserError, match="model.attention"):
        make_policy(attention="flash")
    with pytest.raises(UserError, match="model.decoder"):
        make_policy(decoder="diffusion")
    with pytest.raises(UserError, match="model.slot_embedding"):
        make_policy(decoder="autoregressive", slot_embedding=True)
    with pytest.raises(UserError, match="model/decoder=hybrid"):
        configure(policy.model, {"decoder": "autoregressive"})
