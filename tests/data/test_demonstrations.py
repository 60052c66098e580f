import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dtvla.data.demonstrations import Demonstrations
from dtvla.data.frame_cache import FrameCache
from dtvla.data.hub import locate
from dtvla.data.images import ImagePipeline
from dtvla.data.staging import StagedEpisode
from dtvla.errors import UserError

from .conftest import make_pictures


@pytest.fixture
def copy(dataset_root: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset_root, tmp_path / "copy"))


def edit_info(root: Path, **changes: object) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_frames_texts_and_statistics(dataset_root: Path, episodes: list[StagedEpisode]) -> None:
    demonstrations = Demonstrations(dataset_root)
    assert demonstrations.episodes == len(episodes)
    np.testing.assert_array_equal(demonstrations.action_FD, np.concatenate([e.action_F7 for e in episodes]))
    np.testing.assert_array_equal(demonstrations.state_FD, np.concatenate([e.state_F8 for e in episodes]))
    thoughts = [thought for episode in episodes for thought in episode.thoughts]
    assert [demonstrations.thought(f) for f in range(len(demonstrations))] == thoughts
    assert demonstrations.texts() == sorted({*thoughts, "pick up thing 0", "pick up thing 1"})
    assert demonstrations.instruction(int(demonstrations.starts_E[3])) == "pick up thing 1"
    assert [source["init_state"] for source in demonstrations.sources] == list(range(5))
    (stored := demonstrations.statistics).digest()
    from dtvla.data.normalization import Statistics

    assert stored == Statistics.from_frames(demonstrations.state_FD, demonstrations.action_FD)


def test_chunks_repeat_the_last_action_of_their_episode(dataset_root: Path) -> None:
    demonstrations = Demonstrations(dataset_root)
    frames = np.random.default_rng(0).integers(0, len(demonstrations), 200)
    for frame, chunk in zip(frames, demonstrations.chunk_indices(frames, 9), strict=True):
        end = next(stop for stop in demonstrations.stops_E if frame < stop)
        assert list(chunk) == [min(frame + s, end - 1) for s in range(9)]


def test_split_holds_out_whole_episodes_by_seed(dataset_root: Path) -> None:
    demonstrations = Demonstrations(dataset_root)
    train, val = demonstrations.split(0.4, seed=3)
    assert sorted([*train, *val]) == list(range(len(demonstrations)))
    episode_of = np.searchsorted(demonstrations.stops_E, np.arange(len(demonstrations)), side="right")
    assert len(set(episode_of[val])) == 2
    assert not set(episode_of[val]) & set(episode_of[train])
    assert np.array_equal(demonstrations.split(0.4, seed=3)[1], val)
    assert len({tuple(demonstrations.split(0.2, seed)[1]) for seed in range(20)}) > 1
    assert len(demonstrations.split(0.0, seed=3)[1]) == 0
    with pytest.raises(UserError, match="val_fraction"):
        demonstrations.split(0.99, seed=3)


def test_cached_pixels_belong_to_their_frames_and_are_reused(dataset_root: Path, tmp_path: Path) -> None:
    demonstrations = Demonstrations(dataset_root)
    pipeline = ImagePipeline(("wrist", "agentview"), 32)
    cache = FrameCache(demonstrations, pipeline, tmp_path)
    cache.build()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(times) == 2
    for episode in range(5):
        t = 4 * episode
        pixels = cache[np.array([demonstrations.starts_E[episode] + t])][0]
        pictures = [make_pictures(episode, camera, t + 1)[t] for camera in (1, 0)]
        expected = pipeline(dict(zip(pipeline.cameras, pictures, strict=True)))
        assert (pixels.double() - expected.double()).abs().mean() < 5
    FrameCache(demonstrations, ImagePipeline(("agentview",), 32), tmp_path).build()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    FrameCache(demonstrations, ImagePipeline(("agentview",), 48), tmp_path).build()
    assert len(list(tmp_path.iterdir())) == 3


def test_missing_unfinished_and_foreign_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.*dtvla.collect"):
        Demonstrations(tmp_path / "absent")
    (tmp_path / "begun.partial").mkdir()
    with pytest.raises(UserError, match="not finished"):
        Demonstrations(tmp_path / "begun")
    with pytest.raises(UserError, match=r"meta/info.json is missing"):
        Demonstrations(tmp_path)


@pytest.mark.parametrize(
    "file", ["data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet"]
)
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_missing_and_truncated_tables_are_named(copy: Path, file: str, damage: str) -> None:
    path = copy / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=file.split("/chunk")[0]):
        Demonstrations(copy)


def test_fewer_frames_or_episodes_than_promised_are_noticed(copy: Path) -> None:
    import pyarrow.parquet as pq

    path = copy / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path)[:-3], path)
    with pytest.raises(UserError, match="truncated"):
        Demonstrations(copy)
    edit_info(copy, total_episodes=6)
    with pytest.raises(UserError, match="5 episodes"):
        Demonstrations(copy)


@pytest.mark.parametrize("damage", ["missing", "half", "tail", "not a video"])
def test_a_video_that_does_not_decode_is_named(copy: Path, tmp_path: Path, damage: str) -> None:
    video = copy / "videos/observation.images.wrist_image/chunk-000/file-000.mp4"
    if damage == "missing":
        video.unlink()
    else:
        keep = {"half": 0.5, "tail": 0.98}.get(damage)
        video.write_bytes(video.read_bytes()[: int(video.stat().st_size * keep)] if keep else b"x" * 1000)
    with pytest.raises(UserError, match="wrist_image"):
        FrameCache(Demonstrations(copy), ImagePipeline(("agentview", "wrist"), 32), tmp_path / "cache").build()
    assert not [path for path in (tmp_path / "cache").glob("*") if path.suffix == ".tmp"]


def test_a_thinking_model_needs_the_column_reasoning(copy: Path) -> None:
    import pyarrow.parquet as pq

    path = copy / "data/chunk-000/file-000.parquet"
    info = json.loads((copy / "meta/info.json").read_text())
    features = info["features"]
    table = pq.read_table(path)
    place = table.column_names.index("reasoning")
    pq.write_table(table.set_column(place, "reasoning", table["task_index"]), path)
    with pytest.raises(UserError, match=r"'reasoning' holds int64, expected text or token ids"):
        Demonstrations(copy)
    pq.write_table(pq.read_table(path).drop_columns("reasoning"), path)
    edit_info(copy, features={k: v for k, v in features.items() if k != "reasoning"})
    with pytest.raises(UserError, match=r"no column 'reasoning'.*cot=none"):
        Demonstrations(copy)
    without = Demonstrations(copy, thoughts=False)
    assert without.thought(0) is None
    assert without.texts() == ["pick up thing 0", "pick up thing 1"]


def test_values_that_are_not_finite_name_the_episode(copy: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = copy / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    actions = np.stack(table["action"].to_numpy())
    actions[30, 2] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(actions.ravel()), 7)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), path)
    with pytest.raises(UserError, match="episode 1 "):
        Demonstrations(copy)


def test_a_camera_that_the_dataset_lacks_is_named(dataset_root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sideview"):
        FrameCache(Demonstrations(dataset_root), ImagePipeline(("sideview",), 32), tmp_path)


def test_a_hub_id_without_a_network_says_what_to_download_where(tmp_path: Path) -> None:
    command = rf"hf download someone/libero_things --repo-type dataset --local-dir {tmp_path}/someone--libero_things"
    with pytest.raises(UserError, match=command):
        locate("someone/libero_things", tmp_path)
    (tmp_path / "someone--libero_things").mkdir()
    assert locate("someone/libero_things", tmp_path) == tmp_path / "someone--libero_things"
    assert locate(tmp_path / "anything", tmp_path) == tmp_path / "anything"
