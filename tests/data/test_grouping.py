"""Protects the cut of a step: every sample once, the same number of passes on every rank, little padding."""

import numpy as np
import pytest

from dtvla.data.grouping import Cut
from dtvla.errors import UserError


@pytest.mark.parametrize("trial", range(40))
def test_every_sample_is_in_one_pass_and_ranks_make_as_many(trial: int) -> None:
    rng = np.random.default_rng(trial)
    ranks, samples = int(rng.integers(1, 6)), int(rng.integers(6, 60))
    lengths = rng.integers(30, 90, samples)
    sizes = [{"micro_batch_size": int(rng.integers(1, 9))}, {"pack_tokens": int(rng.integers(90, 400))}, {}]
    for size in sizes:
        if "pack_tokens" in size:
            lengths = lengths[: samples // ranks * ranks]
        shares = [Cut(**size, ranks=ranks, rank=rank).passes(lengths) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        passes = [part for share in shares for part in share]
        assert sorted(np.concatenate(passes)) == list(range(len(lengths)))
        assert min(len(part) for part in passes) >= 1
        if "pack_tokens" in size:
            assert max(lengths[part].sum() for part in passes) <= size["pack_tokens"]
        if "micro_batch_size" in size and len(lengths) % ranks == 0:
            assert max(len(part) for part in passes) <= size["micro_batch_size"]


def test_a_single_process_makes_no_more_passes_than_needed() -> None:
    lengths = np.random.default_rng(0).integers(30, 90, 32)
    assert [len(part) for part in Cut(micro_batch_size=8).passes(lengths)] == [8, 8, 8, 8]
    assert len(Cut().passes(lengths)) == 1
    packed = Cut(pack_tokens=500).passes(lengths)
    assert len(packed) <= 1.2 * lengths.sum() / 500 + 1


def test_samples_of_like_length_go_together() -> None:
    lengths = np.random.default_rng(1).integers(30, 90, 64)
    sorted_waste = sum(len(part) * lengths[part].max() for part in Cut(micro_batch_size=8).passes(lengths))
    plain_waste = sum(8 * part.max() for part in lengths.reshape(8, 8))
    assert sorted_waste - lengths.sum() < 0.3 * (plain_waste - lengths.sum())


@pytest.mark.parametrize(
    "cut", [{"micro_batch_size": 0}, {"pack_tokens": 0}, {"micro_batch_size": 2, "pack_tokens": 9}]
)
def test_impossible_sizes_are_refused(cut: dict[str, int]) -> None:
    with pytest.raises(UserError, match="algorithm"):
        Cut(**cut)


def test_a_sample_that_does_not_fit_and_a_batch_smaller_than_the_ranks_are_refused() -> None:
    with pytest.raises(UserError, match=r"algorithm.pack_tokens: 50, but a sample has 60"):
        Cut(pack_tokens=50).passes(np.array([40, 60]))
    with pytest.raises(UserError, match=r"data.batch_size: a batch of 2 samples for 3 ranks"):
        Cut(ranks=3).passes(np.array([40, 60]))
