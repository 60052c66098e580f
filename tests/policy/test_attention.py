import numpy as np
import pytest
import torch

from dtvla.policy.attention import Segment, mask_mod, positions, visible


def random_row(rng: np.random.Generator, padding: int) -> list[int]:
    prefix, thought, act = rng.integers(1, 7), rng.integers(0, 7), rng.integers(0, 6)
    return [Segment.PREFIX] * prefix + [Segment.THINK] * thought + [Segment.ACT] * act + [Segment.PAD] * padding


def brute_force(rows: list[list[int]]) -> np.ndarray:
    """The published mask, row by row of its table, for unpadded lengths; padding is seen by nobody."""
    length = len(rows[0])
    result = np.zeros((len(rows), length, length), dtype=bool)
    for b, row in enumerate(rows):
        prefix, real = row.count(Segment.PREFIX), length - row.count(Segment.PAD)
        for q in range(real):
            for k in range(real):
                if q < prefix:
                    result[b, q, k] = k < prefix
                elif row[q] == Segment.ACT:
                    result[b, q, k] = True
                else:
                    result[b, q, k] = k <= q
    return result


@pytest.mark.parametrize("seed", range(20))
def test_dense_mask_equals_a_triple_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = [random_row(rng, rng.integers(0, 4)) for _ in range(4)]
    longest = max(map(len, rows))
    rows = [row + [Segment.PAD] * (longest - len(row)) for row in rows]
    mask, expected = visible(torch.tensor(rows)).numpy(), brute_force(rows)
    real = np.array(rows) != Segment.PAD
    assert np.array_equal(mask[real], expected[real])
    assert not mask[:, :, :][np.broadcast_to(~real[:, None, :], mask.shape)].any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_flex_mask_equals_dense_mask(seed: int, packed: bool) -> None:
    rng = np.random.default_rng(seed)
    rows = [random_row(rng, 0) + random_row(rng, 3) for _ in range(3)]
    longest = max(map(len, rows))
    segment_BT = torch.tensor([row + [Segment.PAD] * (longest - len(row)) for row in rows])
    sample_BT = torch.from_numpy(np.sort(rng.integers(0, 3, (3, longest)), axis=1)) if packed else None
    see, dense = mask_mod(segment_BT, sample_BT), visible(segment_BT, sample_BT)
    index = [torch.tensor(i) for i in range(max(3, longest))]
    elementwise = torch.tensor(
        [
            [[bool(see(index[b], index[0], index[q], index[k])) for k in range(longest)] for q in range(longest)]
            for b in range(3)
        ]
    )
    assert torch.equal(elementwise, dense)


def test_packed_samples_do_not_see_each_other() -> None:
    rng = np.random.default_rng(3)
    first, second = random_row(rng, 0), random_row(rng, 0)
    segment_BT = torch.tensor([first + second])
    sample_BT = torch.tensor([[0] * len(first) + [1] * len(second)])
    mask = visible(segment_BT, sample_BT)[0]
    n = len(first)
    assert not mask[:n, n:].any()
    assert not mask[n:, :n].any()
    assert torch.equal(mask[:n, :n], visible(torch.tensor([first]))[0])
    assert torch.equal(mask[n:, n:], visible(torch.tensor([second]))[0])


def test_rows_of_later_queries_are_the_rows_of_the_full_mask() -> None:
    segment_BT = torch.tensor([random_row(np.random.default_rng(4), 2)])
    full = visible(segment_BT)
    for first in range(segment_BT.shape[1]):
        assert torch.equal(visible(segment_BT, first_query=first), full[:, first:])


def test_positions_are_one_based_and_skip_padding() -> None:
    pad, prefix, think = Segment.PAD, Segment.PREFIX, Segment.THINK
    rows = torch.tensor([[prefix, prefix, pad, pad, think, pad, think]])
    assert positions(rows).tolist() == [[1, 2, 2, 2, 3, 3, 4]]
