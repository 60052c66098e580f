"""The policy objective against one that is written out token by token, on dense logits in float64."""

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import on_ranks
from sampled_decisions import SAMPLING, batch_of, encoded, talkative
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dtvla.errors import UserError
from dtvla.learning.advantages import token_weights
from dtvla.learning.decisions import PolicyBatch
from dtvla.learning.objective import KL_ESTIMATORS, Objective, ObjectiveSums, policy_loss
from dtvla.learning.sharding import shard
from dtvla.policy import loss
from dtvla.policy.layout import IGNORE
from dtvla.policy.log_probs import token_log_probs
from dtvla.policy.policy import Policy

pytestmark = pytest.mark.usefixtures("exact_norms")

OBJECTIVES = {
    "published": Objective(),
    "tight": Objective(clip_low=0.05, clip_high=0.02, dual_clip=1.2),
    "without_dual_clip": Objective(dual_clip=None, kl_weight=0.3, kl_estimator="k1"),
    "k2": Objective(kl_weight=0.4, kl_estimator="k2"),
    "k3": Objective(kl_weight=0.04, kl_estimator="k3", entropy_weight=0.02),
    "entropy": Objective(entropy_weight=0.5),
}


@pytest.fixture(params=["hybrid", "autoregressive"])
def policy(request: pytest.FixtureRequest, make_policy: Callable[..., Policy]) -> Policy:
    return talkative(make_policy, request.param)


def disturbed(policy: Policy, samples: list, seed: int = 0) -> PolicyBatch:
    """A batch whose sampling policy and reference were others: ratios on all sides of all clips."""
    rng = np.random.default_rng(seed)
    advantages_B, weights_B = rng.normal(size=len(samples)), rng.uniform(0.1, 1, size=len(samples))
    batch = batch_of(policy, samples, advantages_B, weights_B)
    noise = torch.Generator().manual_seed(seed)
    learned_BT = batch.labels_BT != IGNORE
    batch.reference_BT = (batch.old_BT + torch.randn(batch.old_BT.shape, generator=noise)) * learned_BT
    batch.reference_BT[learned_BT & (torch.rand(learned_BT.shape, generator=noise) < 0.05)] -= 15  # beyond the clamp
    batch.old_BT = (batch.old_BT + torch.randn(batch.old_BT.shape, generator=noise)) * learned_BT
    return batch


def naive(policy: Policy, batch: PolicyBatch, objective: Objective) -> tuple[Tensor, dict[str, float]]:
    layout = policy.processor.layout
    hidden_BTD = policy.model.encode(batch)
    total, facts = torch.zeros((), dtype=torch.float64), dict.fromkeys(["above", "below", "dual", "kl", "entropy"], 0.0)
    facts |= {"update_kl": 0.0, "sum": 0.0, "max": 0.0}
    allowed = torch.ones(layout.vocabulary.size, dtype=torch.bool)
    allowed[list(layout.vocabulary.banned_in_thought)] = False
    for b, t in (batch.labels_BT != IGNORE).nonzero().tolist():
        logits_V = policy.model.logits(hidden_BTD[b, t - 1])
        band = ~allowed if batch.slot_BT[b, t] else allowed
        band = band & (torch.arange(len(band)) != layout.vocabulary.eos_id)
        temperature = SAMPLING.action_temperature if batch.slot_BT[b, t] else SAMPLING.thought_temperature
        probs_V = torch.where(band, (logits_V / temperature).exp(), 0)
        probs_V = probs_V / probs_V.sum()
        log_prob = probs_V[batch.labels_BT[b, t]].log()
        advantage, weight = float(batch.advantage_BT[b, t]), float(batch.weight_BT[b, t])
        change = log_prob - float(batch.old_BT[b, t])
        ratio = change.exp()
        low, high = 1 - objective.clip_low, 1 + objective.clip_high
        if advantage > 0:
            value = -advantage * ratio if ratio <= high else torch.tensor(-advantage * high, dtype=torch.float64)
        elif ratio < low:
            value = torch.tensor(-advantage * low, dtype=torch.float64)
        elif objective.dual_clip is not None and ratio > objective.dual_clip:
            value = torch.tensor(-advantage * objective.dual_clip, dtype=torch.float64)
            facts["dual"] += 1
        else:
            value = -advantage * ratio
        facts["above"] += float(advantage > 0 and ratio > high)
        facts["below"] += float(advantage < 0 and ratio < low)
        if objective.kl_weight:
            d = (float(batch.reference_BT[b, t]) - log_prob).clamp(-10, 10)
            kl = {"k1": -d, "k2": d**2 / 2, "k3": d.exp() - d - 1}[objective.kl_estimator]
            value = value + objective.kl_weight * kl
            facts["kl"] += float(kl.detach())
        if objective.entropy_weight:
            entropy = -(probs_V[band] * probs_V[band].log()).sum()
            value = value - objective.entropy_weight * entropy
            facts["entropy"] += float(entropy.detach())
        facts["update_kl"] += float((ratio - 1 - change).detach())
        facts["sum"] += abs(float(change.detach()))
        facts["max"] = max(facts["max"], abs(float(change.detach())))
        total = total + weight * value
    return total, facts


def gradients(policy: Policy, objective: Tensor) -> list[Tensor]:
    policy.model.zero_grad()
    objective.backward()
    return [parameter.grad.clone() for parameter in policy.model.parameters()]


def total_of(policy: Policy, batches: Sequence[PolicyBatch], objective: Objective) -> ObjectiveSums:
    layout = policy.processor.layout
    sums = [policy_loss(policy.model, batch, layout, SAMPLING, objective) for batch in batches]
    total = sums[0]
    for one in sums[1:]:
        total = total + one
    return total


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_and_gradient_are_those_of_the_written_formula(policy: Policy, name: str) -> None:
    objective, samples = OBJECTIVES[name], encoded(policy, np.random.default_rng(1))
    batch = disturbed(policy, samples)
    expected, facts = naive(policy, batch, objective)
    expected_gradients = gradients(policy, expected)
    found = total_of(policy, [batch], objective)
    assert float(found.objective.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    for one, other in zip(gradients(policy, found.objective), expected_gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-10)
    counts = (found.clipped_above, found.clipped_below, found.dual_clipped)
    assert [int(count) for count in counts] == [facts["above"], facts["below"], facts["dual"]]
    assert facts["above"] > 5
    assert facts["below"] > 5
    assert (facts["dual"] > 5) == (objective.dual_clip is not None)
    for value, key in ((found.kl, "kl"), (found.entropy, "entropy"), (found.update_kl, "update_kl")):
        assert float(value) == pytest.approx(facts[key], rel=1e-9)
    assert float(found.log_ratio) == pytest.approx(facts["sum"], rel=1e-9)
    assert float(found.log_ratio_max) == pytest.approx(facts["max"], rel=1e-9)
    assert int(found.tokens) == batch.tokens == int(found.thought_tokens + found.action_tokens)
    assert int(found.action_tokens) == batch.action_tokens > 0


@pytest.mark.parametrize("name", ["published", "k3"])
def test_any_cut_gives_the_same_sums_and_gradient(policy: Policy, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, samples = OBJECTIVES[name], encoded(policy, np.random.default_rng(2))
    rng, count = np.random.default_rng(3), len(samples)
    advantages_B, weights_B = rng.normal(size=count), rng.uniform(0.1, 1, count)
    references = [
        example.old_log_probs + torch.from_numpy(rng.normal(size=example.tokens)) for example, _, _ in samples
    ]
    for example, _, _ in samples:
        example.old_T += torch.from_numpy(rng.normal(size=len(example.old_T)))

    def batch(part: np.ndarray, room: int | None = None) -> PolicyBatch:
        own = ([samples[i] for i in part], advantages_B[part], weights_B[part])
        return batch_of(policy, *own, references=[references[i] for i in part], pack_tokens=room)

    cuts: list[list[PolicyBatch]] = [[batch(np.arange(count))]]
    cuts += [[batch(part) for part in np.array_split(rng.permutation(count), parts)] for parts in (2, 5, count)]
    cuts += [[batch(part, 700) for part in np.array_split(rng.permutation(count), 4)]]
    found = []
    for index, cut in enumerate(cuts * 2):
        if index == len(cuts):
            monkeypatch.setattr(loss, "CHUNK_LOGITS", 5 * policy.model.lm_head.out_features)
        total = total_of(policy, cut, objective)
        sums = [getattr(total, field.name).detach().double() for field in fields(total)]
        found.append(sums + gradients(policy, total.objective))
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert torch.allclose(one, same, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("weighting", ["sequence", "token", "constant"])
def test_weightings_are_the_means_they_are_named_after(policy: Policy, weighting: str) -> None:
    """Three trajectories with unequal numbers of decisions; the token losses come one by one."""
    samples = encoded(policy, np.random.default_rng(4))[:9]
    owner_B = np.array([0, 0, 0, 0, 0, 1, 1, 1, 2])
    tokens_B = np.array([example.tokens for example, _, _ in samples])
    tokens_N = np.bincount(owner_B, tokens_B)
    weights_B = token_weights(tokens_N, weighting, 100.0)[owner_B]
    advantages_N = np.array([1.0, -0.5, 0.25])
    batch = batch_of(policy, samples, advantages_N[owner_B], weights_B)
    losses_N = -advantages_N * tokens_N  # ratios are 1
    expected = {
        "sequence": -advantages_N.mean(),
        "token": losses_N.sum() / tokens_N.sum(),
        "constant": losses_N.sum() / 3 / 100,
    }
    found = total_of(policy, [batch], Objective()).objective.detach()
    assert float(found) == pytest.approx(expected[weighting], abs=1e-5)


def test_the_first_step_is_the_plain_policy_gradient(policy: Policy) -> None:
    """At the weights that sampled: ratios 1, nothing clipped, gradient -sum of weight * advantage * grad log p."""
    samples = encoded(policy, np.random.default_rng(5))
    advantages_B = np.random.default_rng(6).normal(size=len(samples))
    batch = batch_of(policy, samples, advantages_B)
    found = total_of(policy, [batch], Objective())
    assert float(found.log_ratio_max) < 1e-5
    assert float(found.clipped_above + found.clipped_below + found.dual_clipped) == 0
    assert 0 <= float(found.update_kl) < 1e-10
    batch.old_BT = torch.zeros(batch.old_BT.shape, dtype=torch.float64)
    learned_BT = batch.labels_BT != IGNORE
    batch.old_BT[learned_BT] = token_log_probs(policy.model, batch, policy.processor.layout, SAMPLING)
    exact = gradients(policy, total_of(policy, [batch], Objective()).objective)
    linear = Objective(clip_low=1, clip_high=1e9, dual_clip=None)  # ratio * advantage at ratio 1
    for one, other in zip(exact, gradients(policy, total_of(policy, [batch], linear).objective), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_without_a_kl_weight_the_reference_is_not_looked_at(policy: Policy) -> None:
    batch = disturbed(policy, encoded(policy, np.random.default_rng(7)))
    with_kl = Objective(kl_weight=0.1)
    batch.reference_BT = torch.full_like(batch.old_BT, torch.nan)
    ignored = total_of(policy, [batch], Objective())
    assert torch.isnan(total_of(policy, [batch], with_kl).objective)
    batch.reference_BT = None
    assert torch.equal(ignored.objective, total_of(policy, [batch], Objective()).objective)
    assert float(ignored.kl) == 0
    with pytest.raises(ValueError, match="reference"):
        total_of(policy, [batch], with_kl)


@pytest.mark.parametrize("distance", [60.0, -60.0, 400.0, -400.0])
def test_ratios_beyond_all_bounds_leave_finite_gradients(policy: Policy, distance: float) -> None:
    policy.model.float()
    samples = encoded(policy, np.random.default_rng(8))
    advantages_B = np.random.default_rng(9).choice([-1.0, 0.0, 1.0], len(samples))
    batch = batch_of(policy, samples, advantages_B)
    batch.old_BT -= distance * (batch.labels_BT != IGNORE)
    batch.reference_BT = batch.old_BT
    for objective in (Objective(kl_weight=0.1), Objective(dual_clip=None, kl_weight=0.1, kl_estimator="k2")):
        total = total_of(policy, [batch], objective)
        assert total.objective.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients(policy, total.objective))
        assert float(total.log_ratio_max) == pytest.approx(abs(distance), abs=0.01)


def test_a_batch_without_any_learned_token_has_no_gradient(policy: Policy) -> None:
    """All weights still take part, since sharded ones are gathered by all ranks together."""
    samples = encoded(policy, np.random.default_rng(10))[:2]
    for example, _, _ in samples:
        example.labels_T[:] = IGNORE
    total = total_of(policy, [batch_of(policy, samples)], Objective(entropy_weight=0.1))
    assert float(total.objective) == float(total.log_ratio_max) == int(total.tokens) == 0
    assert not any(gradient.any() for gradient in gradients(policy, total.objective))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_shards_of_a_model_give_the_gradient_of_the_whole(policy: Policy, tmp_path: Path) -> None:
    """Two processes, FSDP2 on gloo; at one moment the second has actions only, at another nothing that is learned."""
    samples = encoded(policy, np.random.default_rng(13))
    for example, _, _ in samples[3:6]:
        example.labels_T[~example.slot_T] = IGNORE
    for example, _, _ in samples[9:12]:
        example.labels_T[:] = IGNORE
    parts = [batch_of(policy, samples[first : first + 3]) for first in (0, 3, 6, 9)]
    assert [part.action_tokens < part.tokens for part in parts] == [True, False, True, False]
    assert [part.tokens > 0 for part in parts] == [True, True, True, False]
    expected = gradients(policy, total_of(policy, parts, Objective(entropy_weight=0.1)).objective)
    policy.model.zero_grad(set_to_none=True)
    on_ranks(2, on_shards, policy, parts, tmp_path / "gradients.pt")
    for one, other in zip(torch.load(tmp_path / "gradients.pt"), expected, strict=True):
        assert (one - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))  # norms are in float32 there


def on_shards(rank: int, policy: Policy, parts: list[PolicyBatch], file: Path) -> None:
    torch.distributed.init_process_group("gloo")
    shard(policy.model, init_device_mesh("cpu", (2,)), "32-true")
    for part in parts[rank::2]:
        total_of(policy, [part], Objective(entropy_weight=0.1)).objective.backward()
    found = [2 * parameter.grad.full_tensor() for parameter in policy.model.parameters()]  # ranks are averaged
    if rank == 0:
        torch.save(found, file)
    torch.distributed.destroy_process_group()


def test_no_number_is_asked_of_the_device(policy: Policy) -> None:
    """Tensors on ``meta`` have none to give: a wait for a GPU would be an error here."""
    batch = disturbed(policy, encoded(policy, np.random.default_rng(11))).to("meta")
    policy.model.to("meta")
    total = total_of(policy, [batch], Objective(kl_weight=0.1, entropy_weight=0.1))
    total.objective.backward()
    assert all(parameter.grad is not None for parameter in policy.model.parameters())


def test_mixed_precision_keeps_the_objective_in_float32(policy: Policy) -> None:
    policy.model.float()
    batch = disturbed(policy, encoded(policy, np.random.default_rng(12)))
    exact = total_of(policy, [batch], Objective())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = total_of(policy, [batch], Objective())
    assert mixed.objective.dtype == torch.float32
    assert float(mixed.objective) == pytest.approx(float(exact.objective), rel=0.05)
    assert all(gradient.isfinite().all() for gradient in gradients(policy, mixed.objective))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"clip_low": -0.1}, "loss.clip_low"),
        ({"clip_low": 1.1}, "loss.clip_low"),
        ({"clip_high": -0.1}, "loss.clip_high"),
        ({"clip_high": math.nan}, "loss.clip_high"),
        ({"dual_clip": 1.0}, "loss.dual_clip"),
        ({"kl_weight": -1.0}, "kl.weight"),
        ({"kl_weight": math.inf}, "kl.weight"),
        ({"kl_estimator": "k4"}, "kl.estimator"),
        ({"entropy_weight": -0.1}, "loss.entropy"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, float], name: str) -> None:
    with pytest.raises(UserError, match=rf"^algorithm\.{name}: .*"):
        Objective(**settings)  # type: ignore[arg-type]


def test_all_estimators_are_tested() -> None:
    assert {objective.kl_estimator for objective in OBJECTIVES.values() if objective.kl_weight} == set(KL_ESTIMATORS)


def divergence_after_training(policy: Policy, target: float | None) -> tuple[float, float]:
    """Mean divergence of the last steps of a training that wants some tokens and not others, and the last KL weight."""
    samples, rng = encoded(policy, np.random.default_rng(1))[::3], np.random.default_rng(2)
    batch = batch_of(policy, samples, rng.normal(size=len(samples)), np.full(len(samples), 1 / len(samples)))
    learned_BT, layout = batch.labels_BT != IGNORE, policy.processor.layout
    objective, found = Objective(kl_weight=0.01), []
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=1e-3)
    for step in range(200):
        with torch.no_grad():  # each step is an iteration: its tokens are those of the policy as it is
            batch.old_BT[learned_BT] = token_log_probs(policy.model, batch, layout, SAMPLING).float()
            if step == 0:
                batch.reference_BT = batch.old_BT.clone()
        sums = policy_loss(policy.model, batch, layout, SAMPLING, objective)
        optimizer.zero_grad()
        sums.objective.backward()
        optimizer.step()
        found.append(float(sums.kl) / float(sums.tokens))
        if target is not None:
            objective = objective.towards(target, found[-1])
    return float(np.mean(found[-50:])), objective.kl_weight


def test_a_target_holds_the_policy_near_its_reference(make_policy: Callable[..., Policy]) -> None:
    free, unchanged = divergence_after_training(talkative(make_policy), None)
    held, weight = divergence_after_training(talkative(make_policy), 0.02)
    assert unchanged == 0.01 < weight
    assert free > 0.1
    assert held == pytest.approx(0.02, rel=0.5)
