import numpy as np
import pytest
import torch

from dtvla.policy.attention import Rule, Segment, block_mask, mask_mod, positions, visible


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


def published(rows: list[list[int]]) -> np.ndarray:
    """The published construction step by step, with its leak: padding has token type 0, as the prompt has."""
    length = len(rows[0])
    result = np.zeros((len(rows), length, length), dtype=bool)
    for b, row in enumerate(rows):
        prompt, real = row.count(Segment.PREFIX), length - row.count(Segment.PAD)
        result[b] = np.tril(np.ones((length, length), dtype=bool))
        result[b][:, real:] = False
        token_type_0 = np.array([t < prompt or t >= real for t in range(length)])
        result[b][:, token_type_0] = True
        action = row.index(Segment.ACT) if Segment.ACT in row else length
        result[b][action:] = result[b][-1]
    return result


def padded_rows(rng: np.random.Generator, count: int = 4) -> list[list[int]]:
    rows = [random_row(rng, rng.integers(0, 4)) for _ in range(count)]
    longest = max(map(len, rows))
    return [row + [Segment.PAD] * (longest - len(row)) for row in rows]


@pytest.mark.parametrize("seed", range(10))
def test_pads_visible_is_the_published_mask_also_for_the_rows_of_padding(seed: int) -> None:
    rows = padded_rows(np.random.default_rng(seed))
    rule = Rule(pads_visible=True)
    assert np.array_equal(visible(torch.tensor(rows), rule=rule).numpy(), published(rows))
    assert positions(torch.tensor(rows), rule=rule).tolist() == [list(range(1, len(row) + 1)) for row in rows]


def test_unpadded_rows_do_not_know_whether_padding_is_visible() -> None:
    segment_BT = torch.tensor([random_row(np.random.default_rng(11), 0)])
    rule = Rule(pads_visible=True)
    assert torch.equal(visible(segment_BT, rule=rule), visible(segment_BT))
    assert torch.equal(positions(segment_BT, rule=rule), positions(segment_BT))


@pytest.mark.parametrize("seed", range(5))
def test_causal_actions_see_the_prefix_and_the_past(seed: int) -> None:
    rows = padded_rows(np.random.default_rng(seed))
    mask = visible(torch.tensor(rows), rule=Rule(causal_actions=True)).numpy()
    for row, seen in zip(rows, mask, strict=True):
        prompt, real = row.count(Segment.PREFIX), len(row) - row.count(Segment.PAD)
        for q in range(real):
            assert seen[q].tolist() == [k < real and (k < prompt or k <= q) for k in range(len(row))]


@pytest.mark.parametrize("seed", range(20))
def test_dense_mask_equals_a_triple_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = padded_rows(rng)
    mask, expected = visible(torch.tensor(rows)).numpy(), brute_force(rows)
    real = np.array(rows) != Segment.PAD
    assert np.array_equal(mask[real], expected[real])
    assert not mask[:, :, :][np.broadcast_to(~real[:, None, :], mask.shape)].any()


@pytest.mark.parametrize("rule", [Rule(), Rule(causal_actions=True), Rule(pads_visible=True), Rule(True, True)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_flex_mask_equals_dense_mask(seed: int, packed: bool, rule: Rule) -> None:
    rng = np.random.default_rng(seed)
    rows = [random_row(rng, 0) + random_row(rng, 3) for _ in range(3)]
    longest = max(map(len, rows))
    segment_BT = torch.tensor([row + [Segment.PAD] * (longest - len(row)) for row in rows])
    sample_BT = torch.from_numpy(np.sort(rng.integers(0, 3, (3, longest)), axis=1)) if packed else None
    see, dense = mask_mod(segment_BT, sample_BT, rule), visible(segment_BT, sample_BT, rule=rule)
    index = [torch.tensor(i) for i in range(max(3, longest))]
    elementwise = torch.tensor(
        [
            [[bool(see(index[b], index[0], index[q], index[k])) for k in range(longest)] for q in range(longest)]
            for b in range(3)
        ]
    )
    assert torch.equal(elementwise, dense)
    assert block_mask(segment_BT, sample_BT, rule).shape == (3, 1, longest, longest)


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


def test_positions_are_one_based_and_skip_padding() -> None:
    pad, prefix, think = Segment.PAD, Segment.PREFIX, Segment.THINK
    rows = torch.tensor([[prefix, prefix, pad, pad, think, pad, think]])
    assert positions(rows).tolist() == [[1, 2, 2, 2, 3, 3, 4]]


def test_samples_of_a_packed_row_count_from_one() -> None:
    rng = np.random.default_rng(8)
    for _ in range(20):
        lengths = rng.integers(1, 9, rng.integers(1, 5)).tolist()
        pad = int(rng.integers(0, 4))
        segment = [Segment.PREFIX] * sum(lengths) + [Segment.PAD] * pad
        sample = [index for index, length in enumerate(lengths) for _ in range(length)] + [-1] * pad
        found = positions(torch.tensor([segment]), torch.tensor([sample]))[0].tolist()
        assert found[: sum(lengths)] == [place for length in lengths for place in range(1, length + 1)]
        assert min(found) >= 1
