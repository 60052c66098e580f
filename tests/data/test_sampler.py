import itertools

import numpy as np
import pytest

from dtvla.data.sampler import BLOCK, MixtureSampler, TrainSampler, ValidationSampler, batch_positions
from dtvla.errors import UserError


@pytest.mark.parametrize(("count", "size"), [(17, 5), (64, 16), (3, 8)])
def test_every_epoch_shows_each_frame_once(count: int, size: int) -> None:
    epochs = 4
    steps = -(-count * epochs // size)
    chain = np.concatenate([batch_positions(11, step, size, count) for step in range(steps)])[: count * epochs]
    for epoch in chain.reshape(epochs, count):
        assert sorted(epoch) == list(range(count))
    assert not np.array_equal(chain[:count], chain[count : 2 * count])


def test_a_sampler_that_starts_later_continues_the_same_sequence() -> None:
    frames = np.random.default_rng(0).permutation(100)[:23]
    whole = list(itertools.islice(TrainSampler(frames, 4, seed=5), 20))
    for start in (0, 3, 7, 19):
        later = next(iter(TrainSampler(frames, 4, seed=5, start_step=start)))
        assert later.step == start
        assert np.array_equal(later.frames_B, whole[start].frames_B)
    other = next(iter(TrainSampler(frames, 4, seed=6)))
    assert not np.array_equal(other.frames_B, whole[0].frames_B)


def test_validation_shows_each_frame_once_in_a_fixed_order() -> None:
    frames = np.arange(50, 73)
    first, second = (list(ValidationSampler(frames, 5, seed=1)) for _ in range(2))
    assert len(first) == len(ValidationSampler(frames, 5, seed=1)) == 5
    assert sorted(np.concatenate([key.frames_B for key in first])) == list(frames)
    assert all(np.array_equal(a.frames_B, b.frames_B) for a, b in zip(first, second, strict=True))


def test_a_last_validation_batch_with_fewer_samples_than_ranks_joins_the_one_before() -> None:
    keys = list(ValidationSampler(np.arange(13), 4, seed=1, least=2))
    assert [len(key.frames_B) for key in keys] == [4, 4, 5]
    assert [len(key.frames_B) for key in ValidationSampler(np.arange(1), 4, seed=1, least=2)] == [1]


def test_parts_of_a_mixture_have_their_shares_and_show_all_frames_before_one_again() -> None:
    parts, weights, size = [np.arange(100), np.arange(100, 107)], [3, 1], 50
    keys = list(itertools.islice(MixtureSampler(parts, weights, size, seed=2), 4 * BLOCK // size))
    drawn = np.concatenate([key.frames_B for key in keys])
    for block in drawn.reshape(4, BLOCK):
        assert ((block >= 100).sum(), (block < 100).sum()) == (BLOCK // 4, 3 * BLOCK // 4)
    for part in parts:
        own = drawn[np.isin(drawn, part)]
        for epoch in own[: len(own) // len(part) * len(part)].reshape(-1, len(part)):
            assert sorted(epoch) == list(part)
    assert not np.array_equal(drawn[:BLOCK], drawn[BLOCK : 2 * BLOCK])
    later = next(iter(MixtureSampler(parts, weights, size, seed=2, start_step=33)))
    assert np.array_equal(later.frames_B, keys[33].frames_B)


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")], [1, 1e-5]])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(UserError, match="data.weights"):
        MixtureSampler([np.arange(5), np.arange(5, 9)], weights, 4, seed=0)
