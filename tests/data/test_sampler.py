import itertools

import numpy as np
import pytest

from dtvla.data.sampler import TrainSampler, ValidationSampler, batch_positions


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
