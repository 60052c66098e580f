"""Pictures decoded on demand are the cached ones, whatever the order, the process and the kind of video."""

import pickle
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from dtvla.data import frame_reader
from dtvla.data.demonstrations import Demonstrations
from dtvla.data.frame_cache import FrameCache
from dtvla.data.frame_reader import FrameReader
from dtvla.data.images import ImagePipeline
from dtvla.data.staging import StagedEpisode
from dtvla.data.video import ClipJoiner, VideoReader, decode_frames
from dtvla.errors import UserError

from .conftest import make_pictures
from .format_v2 import write_v2

PIPELINE = ImagePipeline(("wrist", "agentview"), 32)


@pytest.fixture(params=["v3", "v2"], scope="module")
def root(
    request: pytest.FixtureRequest,
    dataset_root: Path,
    episodes: list[StagedEpisode],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    return dataset_root if request.param == "v3" else write_v2(tmp_path_factory.mktemp("v2") / "five", episodes)


@pytest.fixture(scope="module")
def cached(root: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    demonstrations = Demonstrations(root)
    cache = FrameCache(demonstrations, PIPELINE, tmp_path_factory.mktemp("cache"))
    cache.build()
    return cache[np.arange(len(demonstrations))]


@pytest.mark.parametrize("kept_open", [1, 64])
def test_any_frames_in_any_order_are_those_of_the_cache(
    root: Path, cached: torch.Tensor, kept_open: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_reader, "OPEN_FILES", kept_open)
    reader = FrameReader(Demonstrations(root), PIPELINE)
    reader.build()
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, len(cached), 16) for _ in range(8)]
    batches += [np.array([3, 3, 2, 3]), np.arange(len(cached)), np.array([len(cached) - 1, 0]), np.array([7])]
    for frames_B in batches:
        assert torch.equal(reader[frames_B], cached[frames_B])
    assert len(reader._files) <= kept_open


class Frames(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, reader: FrameReader) -> None:
        self.reader = reader

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.reader[np.array([index, 2 * index, 40 - index])]

    def __len__(self) -> int:
        return 40


def test_forked_workers_read_for_themselves_after_the_parent_has_read(root: Path, cached: torch.Tensor) -> None:
    reader = FrameReader(Demonstrations(root), PIPELINE)
    assert torch.equal(reader[np.array([50])], cached[[50]])
    loader = DataLoader(Frames(reader), batch_size=None, num_workers=2, multiprocessing_context="fork")
    for index, pixels in enumerate(loader):
        assert torch.equal(pixels, cached[[index, 2 * index, 40 - index]])
    assert torch.equal(reader[np.array([51])], cached[[51]])


def test_pickling_carries_paths_only(root: Path, cached: torch.Tensor) -> None:
    reader = FrameReader(Demonstrations(root), PIPELINE)
    assert torch.equal(reader[np.array([50])], cached[[50]])
    content = pickle.dumps(reader)
    assert len(content) < 20_000
    assert torch.equal(pickle.loads(content)[np.array([50, 4])], cached[[50, 4]])


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("h264", {"g": "10", "bf": "0"}),
        ("h264", {"g": "48", "bf": "3"}),  # frames are stored in another order than shown
        ("libsvtav1", {"g": "2", "crf": "30"}),  # as lerobot encodes
    ],
)
@pytest.mark.parametrize("fps", [10, 30])
def test_seeking_finds_exactly_the_frames_of_sequential_decoding(
    codec: str, options: dict[str, str], fps: int, tmp_path: Path
) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no {codec}")
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, fps)
        for picture in make_pictures(1, 0, 100):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    expected = list(decode_frames(path))
    assert len(expected) == 100
    reader = VideoReader(path, fps)
    rng = np.random.default_rng(0)
    for positions in ([99], [0], [50, 51, 53], *(np.unique(rng.integers(0, 100, 6)).tolist() for _ in range(10))):
        found = list(reader.read(positions))
        np.testing.assert_array_equal(found, [expected[position] for position in positions])
    assert len(list(reader.read([98, 99, 100]))) == 2
    assert reader.holds(100)
    assert not reader.holds(101)
    reader.close()


@pytest.mark.parametrize("damage", ["missing", "half", "tail", "not a video"])
def test_a_video_that_does_not_decode_names_its_episode(
    episodes: list[StagedEpisode], tmp_path: Path, damage: str
) -> None:
    root = write_v2(tmp_path / "v2", episodes)
    video = root / "videos/chunk-001/observation.images.wrist_image/episode_000003.mp4"
    content = video.read_bytes()
    keep = {"half": 0.5, "tail": 0.98}.get(damage)
    if damage == "tail":  # of the pictures: their index comes first in this file
        with ClipJoiner(video, 20) as joiner:
            joiner.append(content, len(episodes[3].state_F8))
        content = video.read_bytes()
    if damage == "missing":
        video.unlink()
    else:
        video.write_bytes(content[: int(len(content) * keep)] if keep else b"x" * 1000)
    demonstrations = Demonstrations(root)
    for source in (FrameReader(demonstrations, PIPELINE), FrameCache(demonstrations, PIPELINE, tmp_path / "cache")):
        with pytest.raises(UserError, match=r"episode_000003\.mp4: episode 3: "):
            source.build()
    with pytest.raises(UserError, match=r"episode_000003\.mp4: episode 3: "):
        FrameReader(demonstrations, PIPELINE)[np.array([2, demonstrations.stops_E[3] - 1])]


def test_a_video_with_fewer_frames_than_its_episode_names_it(episodes: list[StagedEpisode], tmp_path: Path) -> None:
    root = write_v2(tmp_path / "v2", episodes)
    videos = root / "videos/chunk-000/observation.images.image"
    shutil.copy(videos / "episode_000000.mp4", videos / "episode_000001.mp4")
    demonstrations = Demonstrations(root)
    for source in (FrameReader(demonstrations, PIPELINE), FrameCache(demonstrations, PIPELINE, tmp_path / "cache")):
        with pytest.raises(UserError, match=r"episode 1: the file is shorter"):
            source.build()
