import itertools
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dtvla.data.datamodule import DemonstrationDataModule
from dtvla.data.normalization import Statistics
from dtvla.errors import UserError
from dtvla.policy.layout import IGNORE, Batch, Segment

from .conftest import make_processor


def make_module(
    dataset_root: Path | list[Path],
    cache_dir: Path,
    start_step: int = 0,
    micro_batch_size: int | None = None,
    **options: Any,
) -> DemonstrationDataModule:
    settings = {"batch_size": 4, "val_fraction": 0.2, "seed": 3, "reasoning_dropout": 0.3} | options
    module = DemonstrationDataModule(dataset_root, cache_dir=cache_dir, **settings)
    demonstrations = module.demonstrations
    processor = make_processor(demonstrations.texts(), demonstrations.statistics)
    module.attach(processor, start_step, micro_batch_size=micro_batch_size)
    module.prepare_data()
    module.setup("fit")
    return module


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def take(module: DemonstrationDataModule, count: int) -> list[Batch]:
    return [part for parts in itertools.islice(module.train_dataloader(), count) for part in parts]


def by_length(module: DemonstrationDataModule, frames_B: np.ndarray) -> np.ndarray:
    """The longest first, as a pass has them."""
    demonstrations, layout = module.demonstrations, module.processor.layout
    texts = [(demonstrations.instruction(frame), demonstrations.thought(frame)) for frame in frames_B]
    return frames_B[np.argsort([-len(layout.encode(*text, None).input_ids_T) for text in texts], kind="stable")]


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for name, value in vars(a).items():
            other = getattr(b, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_interrupted_anywhere_sees_the_batches_of_an_uninterrupted_one(
    dataset_root: Path, cache_dir: Path, workers: int
) -> None:
    whole = take(make_module(dataset_root, cache_dir), 40)  # more than one epoch of about 100 frames
    for stop in (0, 1, 13, 27) if workers == 0 else (13,):
        before = take(make_module(dataset_root, cache_dir, num_workers=workers), stop) if stop else []
        after = take(make_module(dataset_root, cache_dir, start_step=stop, num_workers=workers), 40 - stop)
        assert_equal(before + after, whole)


def test_another_seed_gives_other_batches(dataset_root: Path, cache_dir: Path) -> None:
    first, second = (take(make_module(dataset_root, cache_dir, seed=seed), 1)[0] for seed in (3, 4))
    assert not torch.equal(first.actions_BSD, second.actions_BSD)


def test_samples_hold_their_frames_pixels_text_and_actions(dataset_root: Path, cache_dir: Path) -> None:
    module = make_module(dataset_root, cache_dir, augment=False, reasoning_dropout=0.0)
    demonstrations, processor = module.demonstrations, module.processor
    layout = processor.layout
    from dtvla.data.sampler import TrainSampler

    keys = itertools.islice(TrainSampler(module.train_frames, 4, seed=3), 5)
    for key, batch in zip(keys, take(module, 5), strict=True):
        assert batch.pixels_BNCHW.shape == (4, 2, 3, 32, 32)
        for i, frame in enumerate(by_length(module, key.frames_B)):
            expected = layout.encode(
                demonstrations.instruction(frame), demonstrations.thought(frame), batch.actions_BSD[i]
            )
            length = len(expected.input_ids_T)
            assert torch.equal(batch.input_ids_BT[i, :length], expected.input_ids_T)
            assert torch.equal(batch.labels_BT[i, :length], expected.labels_T)
            assert (batch.segment_BT[i, length:] == Segment.PAD).all()
            assert (batch.labels_BT[i, length:] == IGNORE).all()
            stop = demonstrations.stops_E[demonstrations.stops_E > frame].min()
            steps = [min(frame + s, stop - 1) for s in range(layout.chunk)]
            wanted = processor.normalizer.normalize(demonstrations.action_FD[steps])
            assert torch.equal(batch.actions_BSD[i], torch.from_numpy(wanted))


def test_validation_is_plain_and_covers_the_held_out_episodes(dataset_root: Path, cache_dir: Path) -> None:
    module = make_module(dataset_root, cache_dir, reasoning_dropout=1.0)
    thinking = module.processor.layout.vocabulary.think_start_id

    def thought_tokens(batch: Batch) -> torch.Tensor:
        assert (batch.input_ids_BT == thinking).any(1).all()
        return (batch.segment_BT == Segment.THINK).sum(1)

    batches = [part for parts in module.val_dataloader() for part in parts]
    assert sum(len(batch) for batch in batches) == len(module.val_frames) > 0
    assert all((thought_tokens(batch) > 2).all() for batch in batches)
    assert all((thought_tokens(batch) == 2).all() for batch in take(module, 3))  # the tags alone


def test_dropout_removes_about_its_share_of_thoughts(dataset_root: Path, cache_dir: Path) -> None:
    batches = take(make_module(dataset_root, cache_dir, reasoning_dropout=0.3, batch_size=16), 40)
    bare = torch.cat([(batch.segment_BT == Segment.THINK).sum(1) == 2 for batch in batches])
    assert 0.22 < bare.double().mean() < 0.38


def test_a_model_without_thoughts_gets_none(dataset_root: Path, cache_dir: Path) -> None:
    batch = take(make_module(dataset_root, cache_dir, thoughts=False), 1)[0]
    assert ((batch.segment_BT == Segment.THINK).sum(1) == 2).all()


def test_settings_out_of_range_are_named(tmp_path: Path) -> None:
    for setting in ({"batch_size": 0}, {"reasoning_dropout": 1.5}, {"num_workers": -1}):
        with pytest.raises(UserError, match=next(iter(setting))):
            DemonstrationDataModule(tmp_path, cache_dir=tmp_path, **setting)


def by_frame(batches: list[Batch]) -> list[bytes]:
    """What each sample holds, in a fixed order."""
    rows = [
        (batch.pixels_BNCHW[i], batch.input_ids_BT[i][batch.segment_BT[i] != Segment.PAD], batch.actions_BSD[i])
        for batch in batches
        for i in range(len(batch))
    ]
    return sorted(b"".join(part.numpy().tobytes() for part in row) for row in rows)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_ranks_share_the_batches_of_a_single_process(
    dataset_root: Path, cache_dir: Path, ranks: int, micro_batch_size: int | None
) -> None:
    """Also with augmentation and dropout, which belong to a sample and not to the rank that makes it."""
    alone = list(itertools.islice(make_module(dataset_root, cache_dir, batch_size=8).train_dataloader(), 4))
    shares = []
    for rank in range(ranks):
        module = make_module(dataset_root, cache_dir, micro_batch_size=micro_batch_size, batch_size=8)
        module.trainer = SimpleNamespace(world_size=ranks, global_rank=rank)  # type: ignore[assignment]
        shares.append(list(itertools.islice(module.train_dataloader(), 4)))
    for step, whole in enumerate(alone):
        assert len({len(share[step]) for share in shares}) == 1, "ranks make different numbers of forward passes"
        if micro_batch_size:
            assert all(len(part) <= micro_batch_size for share in shares for part in share[step])
        assert by_frame([part for share in shares for part in share[step]]) == by_frame(whole)


def test_validation_shows_each_held_out_frame_to_one_rank(dataset_root: Path, cache_dir: Path) -> None:
    alone = [part for parts in make_module(dataset_root, cache_dir).val_dataloader() for part in parts]
    shared, numbers = [], []
    for rank in range(3):
        module = make_module(dataset_root, cache_dir, micro_batch_size=1)
        module.trainer = SimpleNamespace(world_size=3, global_rank=rank)  # type: ignore[assignment]
        batches = list(module.val_dataloader())
        numbers.append([len(parts) for parts in batches])
        shared += [part for parts in batches for part in parts]
    assert numbers[0] == numbers[1] == numbers[2]
    assert by_frame(shared) == by_frame(alone)


def test_a_batch_that_ranks_can_not_share_is_refused(dataset_root: Path, cache_dir: Path) -> None:
    module = make_module(dataset_root, cache_dir)
    module.trainer = SimpleNamespace(world_size=3, global_rank=0)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"data.batch_size: 4 .* multiple of 3"):
        module.train_dataloader()


def test_thoughts_beyond_the_limit_are_counted_and_cut_only_on_request(dataset_root: Path, cache_dir: Path) -> None:
    module = make_module(dataset_root, cache_dir)
    demonstrations, processor = module.demonstrations, module.processor
    counts = [len(processor.layout.tokens([demonstrations.thought(f) or ""])[0]) for f in range(len(demonstrations))]
    limit = int(np.median(counts)) - 1
    over = sum(count > limit for count in counts)
    short = copy(processor)
    short.layout = replace(processor.layout, max_thought_tokens=limit)
    with pytest.raises(UserError, match=rf"thoughts of {over} of {len(counts)} .* has {max(counts)}.*truncate"):
        module.attach(short)
    module.long_thoughts = "truncate"
    module.attach(short)
    batches = [part for parts in itertools.islice(module.train_dataloader(), 5) for part in parts]
    assert max(int((batch.segment_BT == Segment.THINK).sum(1).max()) for batch in batches) == limit + 2


def test_a_policy_with_statistics_of_other_units_is_refused(dataset_root: Path, cache_dir: Path) -> None:
    module = make_module(dataset_root, cache_dir)
    demonstrations = module.demonstrations
    other = Statistics.from_frames(demonstrations.state_FD, demonstrations.action_FD * 0.05)
    with pytest.raises(UserError, match=r"model.checkpoint: .* of action dimension 0 lies outside"):
        module.attach(make_processor(demonstrations.texts(), other))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_shows_each_dataset_with_its_share(dataset_root: Path, cache_dir: Path, workers: int) -> None:
    """Here the same dataset twice, three to one; pictures straight from the videos."""
    options = {"weights": [3, 1], "cache": False, "batch_size": 40, "augment": False, "num_workers": workers}
    options["reasoning_dropout"] = 0.0
    module = make_module([dataset_root, dataset_root], cache_dir, **options)
    alone = make_module(dataset_root, cache_dir, augment=False)
    half = len(alone.demonstrations)
    assert len(module.demonstrations) == 2 * half
    keys = list(itertools.islice(module._train_sampler(), 25))
    assert sum((key.frames_B < half).sum() for key in keys) == 750
    [[batch]] = itertools.islice(module.train_dataloader(), 1)
    frames_B = by_length(module, keys[0].frames_B)
    assert torch.equal(batch.pixels_BNCHW, alone.pictures[frames_B % half])
