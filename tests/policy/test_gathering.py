"""Protects decisions with sharded weights: two real processes (gloo), FSDP2, an adapter, tied embeddings."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from dtvla.data.normalization import Statistics
from dtvla.policy import adapters
from dtvla.policy.cot import CotMode
from dtvla.policy.gathering import gathered
from dtvla.policy.policy import Decision, Policy, build_policy

from .conftest import SENTENCE, SETTINGS, make_batch, random_example, random_observation

RANKS = 2
LORA = {"r": 2, "alpha": 4, "dropout": 0.0}


def test_an_unsharded_policy_is_lent_as_it_is(policy: Policy) -> None:
    with gathered(policy) as lent:
        assert lent is policy


@pytest.mark.slow
def test_each_weight_is_gathered_once_and_ranks_decide_at_their_own_pace(
    statistics: Statistics, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(
        _on_rank, args=(port, statistics, str(tmp_path)), nprocs=RANKS
    )  # raises what they raise
    assert (tmp_path / "done-0").exists()
    assert (tmp_path / "done-1").exists()


def _on_rank(rank: int, port: int, statistics: Statistics, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    try:
        _check_decisions(rank, statistics, Path(folder))
        _check_adapted(statistics)
        (Path(folder) / f"done-{rank}").touch()
    finally:
        torch.distributed.destroy_process_group()


def _check_decisions(rank: int, statistics: Statistics, folder: Path) -> None:
    plain, sharded = (build_policy(SETTINGS, [SENTENCE], statistics) for _ in range(2))
    expected = _decide(plain)
    _shard(sharded)
    rows = sharded.model.lm_head.weight
    assert isinstance(rows, DTensor)
    assert rows.to_local().shape[0] < rows.shape[0]
    rng = np.random.default_rng(4)
    with torch.no_grad():  # as a validation does, which leaves the outermost weights gathered
        sharded.model(make_batch(sharded, [random_example(sharded, rng)]))
    with ExitStack() as loan:
        with CommDebugMode() as operations:
            whole = loan.enter_context(gathered(sharded))
        assert sum(operations.get_comm_counts().values()) == len(list(plain.model.parameters()))
        assert type(whole.model) is type(plain.model)
        assert whole.model.lm_head.weight is whole.model.model.language_model.embed_tokens.weight
        for _ in range(1 + 2 * rank):  # would hang if a decision waited for the other rank
            _assert_same(_decide(whole), expected)
        if rank == 0:  # as in training; the other rank does not wait
            whole.save(folder / "gathered")
            plain.save(folder / "plain")
            ours, theirs = (load_file(folder / name / "model.safetensors") for name in ("gathered", "plain"))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    _train(plain, sharded)
    with gathered(sharded) as later:
        trained = dict(plain.model.named_parameters())
        for name, weight in later.model.named_parameters():
            torch.testing.assert_close(weight, trained[name], rtol=0, atol=1e-6)
        assert not torch.equal(later.model.lm_head.weight, whole.model.lm_head.weight)


def _check_adapted(statistics: Statistics) -> None:
    policies = [build_policy(SETTINGS, [SENTENCE], statistics) for _ in range(2)]
    for policy in policies:
        adapters.attach(policy.model, LORA)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():  # a fresh adapter changes nothing
            for name, weight in policy.model.named_parameters():
                if adapters.is_adapter(name):
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    plain, sharded = policies
    expected = _decide(plain)
    with adapters.disabled(plain.model):
        unadapted = _decide(plain)
    assert any(not np.array_equal(a.action_bins_A, b.action_bins_A) for a, b in zip(expected, unadapted, strict=True))
    _shard(sharded)
    with gathered(sharded) as whole:
        _assert_same(_decide(whole), expected)


def _shard(policy: Policy) -> None:
    model: Any = policy.model
    for layer in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layers):
        fully_shard(layer)
    fully_shard(model)
    assert isinstance(model, FSDPModule)


def _decide(policy: Policy) -> list[Decision]:
    rng = np.random.default_rng(5)
    return policy.act([random_observation(policy, rng) for _ in range(2)], CotMode(max_tokens=12))


def _assert_same(ours: list[Decision], theirs: list[Decision]) -> None:
    for own, other in zip(ours, theirs, strict=True):
        assert own.thought_ids == other.thought_ids
        assert own.thought_log_probs == other.thought_log_probs
        assert np.array_equal(own.action_bins_A, other.action_bins_A)


def _train(plain: Policy, sharded: Policy) -> None:
    """One step on the same batch on both: sharded training goes on undisturbed behind a loan."""
    rng = np.random.default_rng(6)
    batch = make_batch(plain, [random_example(plain, rng) for _ in range(2)])
    for policy in (plain, sharded):
        policy.model.train()
        policy.model(batch).logsumexp(-1).mean().backward()
        torch.optim.SGD(policy.model.parameters(), lr=0.1).step()
