import bisect

import numpy as np
import pytest
import torch

from dtvla.policy.action_bins import ActionBins

PUBLISHED = ActionBins.at_end_of(257152, count=2048, skip=128)


def test_ids_are_the_published_ones() -> None:
    assert (PUBLISHED.first_id, PUBLISHED.last_id) == (254976, 257023)
    assert PUBLISHED.encode(torch.tensor([-1.0, 0.0, 1.0, -7.0, 7.0])).tolist() == [
        257023,
        255999,
        254976,
        257023,
        254976,
    ]


@pytest.mark.parametrize("count", [2, 3, 32, 256, 2048])
def test_encode_is_the_first_edge_not_below_the_value(count: int) -> None:
    rng = np.random.default_rng(count)
    bins = ActionBins(count=count, first_id=17)
    edges = torch.linspace(-1, 1, count, dtype=torch.float64).numpy()  # numpy rounds some edges the other way
    values = np.concatenate([rng.uniform(-1.2, 1.2, 500), edges, [-1.0, 1.0]])
    expected = [bins.last_id - bisect.bisect_left(edges.tolist(), min(max(v, -1.0), 1.0)) for v in values]
    assert bins.encode(torch.from_numpy(values)).tolist() == expected


@pytest.mark.parametrize("count", [2, 32, 256, 2048])
def test_fixed_decoding_is_within_half_a_bin_and_unbiased(count: int) -> None:
    bins = ActionBins(count=count, first_id=5)
    values = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (4000, 7))).float()
    error = (bins.decode(bins.encode(values)) - values).double() / bins.width
    assert error.abs().max() <= 0.5 + 1e-3
    assert abs(error.mean()) < 0.02


def test_published_decoding_reads_the_centre_above() -> None:
    published = ActionBins(2048, PUBLISHED.first_id, "published")
    edges = np.linspace(-1, 1, 2048)
    centres = (edges[1:] + edges[:-1]) / 2
    ids = torch.arange(published.first_id, published.last_id + 1)
    expected = centres[np.clip(257023 - ids.numpy(), 0, 2046)]
    np.testing.assert_allclose(published.decode(ids).numpy(), expected, atol=1e-7)
    assert published.decode(torch.tensor([257023, 254976])).tolist() == pytest.approx([-0.99951, 0.99951], abs=1e-5)
    values = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, 50000))
    error = (published.decode(published.encode(values)) - values) / published.width
    assert error.mean().item() == pytest.approx(1.0, abs=0.01)
    assert -0.5 - 1e-3 <= error.min().item() <= error.max().item() <= 1.5 + 1e-3


def test_band_lists_the_logits_by_bin() -> None:
    bins = ActionBins(count=6, first_id=3)
    logits = torch.arange(12.0)
    assert bins.band(logits).tolist() == [8, 7, 6, 5, 4, 3]
    values = bins.value(torch.arange(6))
    assert torch.equal(values, bins.decode(bins.last_id - torch.arange(6)))
    assert (values.diff()[1:] > 0).all()


@pytest.mark.parametrize("arguments", [{"count": 1, "first_id": 0}, {"count": 4, "first_id": 0, "mode": "exact"}])
def test_impossible_bins_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="action bins"):
        ActionBins(**arguments)


def test_of_equal_logits_the_lowest_id_is_taken_as_the_published_arg_max_does() -> None:
    bins = ActionBins(count=8, first_id=100)
    logits_V = torch.zeros(120)
    assert bins.last_id - int(bins.most_likely(bins.band(logits_V))) == 100
    logits_V[[103, 105]] = 1.0
    assert bins.last_id - int(bins.most_likely(bins.band(logits_V))) == 103
