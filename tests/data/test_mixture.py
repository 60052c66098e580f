"""Several datasets as one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dtvla.data.demonstrations import Demonstrations
from dtvla.data.frame_cache import FrameCache
from dtvla.data.frame_reader import FrameReader
from dtvla.data.images import ImagePipeline
from dtvla.data.normalization import Statistics
from dtvla.data.recording import write_dataset
from dtvla.data.staging import StagedEpisode
from dtvla.errors import UserError

from .conftest import make_episode
from .format_v2 import write_v2

BOTH = ImagePipeline(("agentview", "wrist"), 32)


@pytest.fixture(scope="module")
def roots(dataset_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A dataset of v3.0 and one of v2.1, which share one instruction and some thoughts."""
    rng = np.random.default_rng(11)
    other = write_v2(tmp_path_factory.mktemp("mixture") / "other", [make_episode(i, rng) for i in (1, 3, 5, 6)])
    return [dataset_root, other]


def test_everything_of_a_frame_is_that_of_its_own_dataset(roots: list[Path], tmp_path: Path) -> None:
    mixture, parts = Demonstrations(roots), [Demonstrations(root) for root in roots]
    assert [len(part) for part in mixture.parts] == [len(part) for part in parts]
    assert len(mixture) == sum(map(len, parts))
    assert mixture.episodes == 9
    caches = []
    for number, part in enumerate([mixture, *parts]):
        cache = FrameCache(part, BOTH, tmp_path / str(number))
        cache.build()
        caches.append(cache[np.arange(len(part))])
    reader = FrameReader(mixture, BOTH)
    for place, (frames, part) in enumerate(zip(mixture.parts, parts, strict=True)):
        for offset, frame in enumerate(frames):
            assert mixture.instruction(frame) == part.instruction(offset)
            assert mixture.thought(frame) == part.thought(offset)
        own = np.arange(len(part))
        np.testing.assert_array_equal(mixture.action_FD[frames], part.action_FD)
        np.testing.assert_array_equal(mixture.state_FD[frames], part.state_FD)
        np.testing.assert_array_equal(
            mixture.chunk_indices(own + frames.start, 9), part.chunk_indices(own, 9) + frames.start
        )
        assert torch.equal(caches[0][frames.start : frames.stop], caches[1 + place])
        assert torch.equal(reader[own + frames.start], caches[1 + place])
    assert mixture.texts() == sorted({*parts[0].texts(), *parts[1].texts()})
    assert len(set(mixture.thoughts)) == len(mixture.thoughts)
    assert len(set(mixture.instructions)) == len(mixture.instructions)


def test_statistics_are_pooled_over_all_frames(roots: list[Path]) -> None:
    mixture, parts = Demonstrations(roots), [Demonstrations(root) for root in roots]
    pooled = Statistics.from_frames(
        np.concatenate([part.state_FD for part in parts]), np.concatenate([part.action_FD for part in parts])
    )
    assert mixture.statistics == pooled
    assert pooled not in (parts[0].statistics, parts[1].statistics)
    assert mixture.statistics_file is None
    assert parts[0].statistics_file == roots[0] / "meta/norm_stats.json"


def test_each_dataset_holds_out_its_share_and_as_it_would_alone(roots: list[Path]) -> None:
    mixture = Demonstrations(roots)
    train, val = mixture.split(0.4, seed=3)
    assert sorted([*train, *val]) == list(range(len(mixture)))
    for frames, root in zip(mixture.parts, roots, strict=True):
        own = val[(val >= frames.start) & (val < frames.stop)] - frames.start
        np.testing.assert_array_equal(own, Demonstrations(root).split(0.4, seed=3)[1])
    assert len(mixture.split(0.0, seed=3)[1]) == 0


def test_the_order_counts_and_one_dataset_is_itself(roots: list[Path]) -> None:
    one, listed = Demonstrations(roots[0]), Demonstrations(roots[:1])
    assert one.fingerprint == listed.fingerprint
    assert one.root == listed.root == str(roots[0])
    assert one.parts == [range(len(one))]
    prints = {Demonstrations(order).fingerprint for order in (roots, roots[::-1], roots[:1], roots[1:])}
    assert len(prints) == 4
    assert str(roots[1]) in Demonstrations(roots).root
    assert len(Demonstrations(roots).sources) == 5


def test_datasets_that_do_not_fit_together_are_refused(
    roots: list[Path], episodes: list[StagedEpisode], tmp_path: Path
) -> None:
    slower = write_v2(tmp_path / "slower", episodes, fps=10)
    with pytest.raises(UserError, match=r"20.* frames a second.*slower has 10"):
        Demonstrations([roots[0], slower])
    import pyarrow as pa
    import pyarrow.parquet as pq

    narrow = tmp_path / "narrow"
    write_dataset(narrow, episodes, {})
    path = narrow / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    actions = np.stack(table["action"].to_numpy())[:, :6]
    column = pa.FixedSizeListArray.from_arrays(pa.array(actions.ravel()), 6)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), path)
    with pytest.raises(UserError, match=r"7 action dimensions.*narrow has 6"):
        Demonstrations([roots[0], narrow])
    with pytest.raises(UserError, match=r"narrow.*no pictures 'sideview'|five.*no pictures 'sideview'"):
        Demonstrations(narrow).camera_key("sideview")
    with pytest.raises(UserError, match="empty list"):
        Demonstrations([])
