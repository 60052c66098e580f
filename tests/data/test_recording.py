import json
from pathlib import Path

import numpy as np
import pytest

from dtvla.data.staging import CAMERA_KEYS, StagedEpisode
from dtvla.data.video import ClipJoiner, decode_frames, encode_clip

from .conftest import make_episode, make_pictures


def test_lerobot_itself_loads_the_dataset(dataset_root: Path, episodes: list[StagedEpisode]) -> None:
    from lerobot.datasets import LeRobotDataset

    dataset = LeRobotDataset("local/five", root=dataset_root, delta_timestamps={"action": [i / 20 for i in range(4)]})
    assert dataset.num_episodes == len(episodes)
    assert len(dataset) == sum(len(episode.state_F8) for episode in episodes)
    start = 0
    for index, episode in enumerate(episodes):
        count = len(episode.state_F8)
        for t in (0, 7, count - 1):
            item = dataset[start + t]
            assert item["task"] == episode.source.instruction
            assert item["reasoning"] == episode.thoughts[t]
            assert item["episode_index"] == index
            assert item["frame_index"] == t
            np.testing.assert_array_equal(item["observation.state"].numpy(), episode.state_F8[t])
            chunk = episode.action_F7[np.minimum(t + np.arange(4), count - 1)]
            np.testing.assert_array_equal(item["action"].numpy(), chunk)
            for camera, key in enumerate(CAMERA_KEYS.values()):
                shown = item[key].permute(1, 2, 0).numpy() * 255
                assert np.abs(shown - make_pictures(index, camera, count)[t].astype(float)).mean() < 6
        start += count


def test_metadata_has_the_form_that_lerobots_own_writer_gives(dataset_root: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq
    from lerobot.configs import RGBEncoderConfig
    from lerobot.datasets import LeRobotDataset

    info = json.loads((dataset_root / "meta/info.json").read_text())
    own = ("observation.images.image", "observation.images.wrist_image", "observation.state", "action", "reasoning")
    features = {key: {k: v for k, v in info["features"][key].items() if k != "info"} for key in own}
    encoder = RGBEncoderConfig(vcodec="h264", preset="veryfast", g=10)
    theirs = LeRobotDataset.create(
        "local/theirs",
        20,
        {k: {**v, "shape": tuple(v["shape"])} for k, v in features.items()},
        root=tmp_path / "theirs",
        robot_type="panda",
        streaming_encoding=True,
        rgb_encoder=encoder,
    )
    for _ in range(3):
        pictures = {key: np.zeros((64, 64, 3), np.uint8) for key in CAMERA_KEYS.values()}
        vectors = {"observation.state": np.zeros(8, np.float32), "action": np.zeros(7, np.float32)}
        theirs.add_frame({**pictures, **vectors, "reasoning": "so", "task": "do"})
    theirs.save_episode()
    theirs.finalize()
    reference = json.loads((tmp_path / "theirs/meta/info.json").read_text())
    assert info.keys() == reference.keys()
    assert info["codebase_version"] == reference["codebase_version"]
    assert {k: v["dtype"] for k, v in info["features"].items()} == {
        k: v["dtype"] for k, v in reference["features"].items()
    }
    for file in ("data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet"):
        ours, expected = (pq.read_schema(root / file) for root in (dataset_root, tmp_path / "theirs"))
        assert {field.name: field.type for field in ours} == {field.name: field.type for field in expected}, file
    stats, expected = (json.loads((r / "meta/stats.json").read_text()) for r in (dataset_root, tmp_path / "theirs"))
    assert {k: set(v) for k, v in stats.items()} == {k: set(v) for k, v in expected.items()}
    assert np.shape(stats["observation.images.image"]["mean"]) == (3, 1, 1)


def test_norm_stats_are_exact_and_sources_are_kept(dataset_root: Path, episodes: list[StagedEpisode]) -> None:
    stats = json.loads((dataset_root / "meta/norm_stats.json").read_text())
    actions = np.concatenate([episode.action_F7 for episode in episodes]).astype(np.float64)
    assert set(stats["action"]) == {"mean", "std", "min", "max", "q01", "q99"}
    np.testing.assert_allclose(stats["action"]["q99"], np.quantile(actions, 0.99, axis=0), rtol=1e-12)
    lines = [json.loads(line) for line in (dataset_root / "meta/episodes_source.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [episode.source.seed for episode in episodes]
    assert json.loads((dataset_root / "meta/collection.json").read_text()) == {"made": "for a test"}


def test_picture_statistics_come_from_the_pictures(dataset_root: Path) -> None:
    stats = json.loads((dataset_root / "meta/stats.json").read_text())["observation.images.wrist_image"]
    blue = np.concatenate([np.full(20 + 3 * e, 40 * e + 20) for e in range(5)]) / 255
    assert np.isclose(stats["mean"][2][0][0], blue.mean())
    assert np.isclose(stats["std"][2][0][0], blue.std())
    assert np.isclose(stats["max"][2][0][0], blue.max())


def test_a_staged_episode_survives_the_file_and_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    episode = make_episode(3, np.random.default_rng(1))
    path = tmp_path / "e.npz"
    episode.save(path)
    again = StagedEpisode.load(path)
    assert again.source == episode.source
    assert again.thoughts == episode.thoughts
    assert again.clips == episode.clips
    np.testing.assert_array_equal(again.action_F7, episode.action_F7)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match="damaged"):
        StagedEpisode.load(path)
    assert list(tmp_path.iterdir()) == [path]


def test_encoding_is_deterministic_and_joining_keeps_every_frame(tmp_path: Path) -> None:
    parts = [make_pictures(e, 0, frames) for e, frames in enumerate([9, 1, 24])]
    clips = [encode_clip(part, 20) for part in parts]
    assert clips == [encode_clip(part, 20) for part in parts]
    with ClipJoiner(tmp_path / "joined.mp4", 20) as joiner:
        for clip, part in zip(clips, parts, strict=True):
            joiner.append(clip, len(part))
        with pytest.raises(ValueError, match="9 frames"):
            joiner.append(clips[0], 10)
    joined = list(decode_frames(tmp_path / "joined.mp4"))
    separate = []
    for i, clip in enumerate(clips):
        (tmp_path / f"{i}.mp4").write_bytes(clip)
        separate += list(decode_frames(tmp_path / f"{i}.mp4"))
    np.testing.assert_array_equal(joined[: len(separate)], separate)


def test_full_video_files_are_followed_by_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dtvla.data import recording
    from dtvla.data.demonstrations import Demonstrations
    from dtvla.data.frame_cache import FrameCache
    from dtvla.data.images import ImagePipeline

    rng = np.random.default_rng(5)
    episodes = [make_episode(index, rng, frames=12) for index in range(3)]
    monkeypatch.setattr(recording, "VIDEO_FILE_MB", 1e-6)
    recording.write_dataset(tmp_path / "many", episodes, {})
    files = sorted((tmp_path / "many/videos/observation.images.image").rglob("*.mp4"))
    assert [file.name for file in files] == ["file-000.mp4", "file-001.mp4", "file-002.mp4"]
    pipeline = ImagePipeline(("wrist",), 64)
    cache = FrameCache(Demonstrations(tmp_path / "many"), pipeline, tmp_path / "cache")
    cache.build()
    for index in range(3):
        shown = cache[np.array([index * 12 + 5])][0, 0].permute(1, 2, 0).numpy()
        assert np.abs(shown.astype(float) - make_pictures(index, 1, 12)[5]).mean() < 6
