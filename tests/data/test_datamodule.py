import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from dtvla.data.datamodule import DemonstrationDataModule
from dtvla.errors import UserError
from dtvla.policy.layout import IGNORE, Batch, Segment

from .conftest import make_processor


def make_module(dataset_root: Path, cache_dir: Path, start_step: int = 0, **options: Any) -> DemonstrationDataModule:
    settings = {"batch_size": 4, "val_fraction": 0.2, "seed": 3, "reasoning_dropout": 0.3} | options
    module = DemonstrationDataModule(dataset_root, cache_dir=cache_dir, **settings)
    demonstrations = module.demonstrations
    module.attach(make_processor(demonstrations.texts(), demonstrations.statistics), start_step)
    module.prepare_data()
    module.setup("fit")
    return module


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def take(module: DemonstrationDataModule, count: int) -> list[Batch]:
    return list(itertools.islice(module.train_dataloader(), count))


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for name, value in vars(a).items():
            assert torch.equal(value, getattr(b, name)), name


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
        for i, frame in enumerate(key.frames_B):
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

    batches = list(module.val_dataloader())
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
