"""Writes datasets of LeRobot v2.1 as lerobot's recorder left them: its table features, file names and JSON lines."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from dtvla.data.recording import ACTION_NAMES, INDEX_KEYS, STATE_NAMES
from dtvla.data.staging import CAMERA_KEYS, StagedEpisode
from dtvla.data.summaries import describe

DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
Tokenize = Callable[[str], list[int]]


def write_v2(
    root: Path,
    episodes: Sequence[StagedEpisode],
    *,
    tokenize: Tokenize | None = None,
    length: int = 40,
    pictures: dict[str, list[np.ndarray]] | None = None,
    fps: int = 20,
    chunk: int = 2,
) -> Path:
    """A v2.1 dataset.

    Args:
        root: new folder.
        episodes: of which the clips are stored as they are.
        tokenize: of whole thoughts with tags; None stores ``reasoning`` as text.
        length: of the rows of token ids.
        pictures: by camera and episode uint8 (F, H, W, 3), stored as png in the tables instead of the clips.
        fps: frames a second.
        chunk: episodes a folder.
    """
    features = make_features(episodes, length if tokenize else None, "image" if pictures else "video")
    (root / "meta").mkdir(parents=True)
    tasks = list(dict.fromkeys(episode.source.instruction for episode in episodes))
    rows: dict[str, list[Any]] = {"episodes": [], "episodes_stats": []}
    first = 0
    for index, episode in enumerate(episodes):
        count = len(episode.state_F8)
        columns = {
            "observation.state": episode.state_F8,
            "action": episode.action_F7,
            "timestamp": (np.arange(count) / fps).astype(np.float32),
            "frame_index": np.arange(count),
            "episode_index": np.full(count, index),
            "index": np.arange(first, first + count),
            "task_index": np.full(count, tasks.index(episode.source.instruction)),
        }
        stats = {key: {k: v for k, v in describe(values).items() if k[0] != "q"} for key, values in columns.items()}
        place = {"episode_chunk": index // chunk, "episode_index": index}
        extra = {key: [png(p) for p in pictures[c][index]] for c, key in CAMERA_KEYS.items()} if pictures else {}
        if not pictures:
            for camera, clip in episode.clips.items():
                write(root / VIDEO_PATH.format(video_key=CAMERA_KEYS[camera], **place), clip)
        thoughts: list[Any] = list(episode.thoughts)
        if tokenize:
            thoughts = [padded(tokenize(f"<think>{text}</think>") if text else [], length) for text in thoughts]
        write_table(root / DATA_PATH.format(**place), features, {**columns, "reasoning": thoughts, **extra})
        rows["episodes"].append({"episode_index": index, "tasks": [episode.source.instruction], "length": count})
        rows["episodes_stats"].append({"episode_index": index, "stats": stats})
        first += count
    rows["tasks"] = [{"task_index": i, "task": task} for i, task in enumerate(tasks)]
    for name, lines in rows.items():
        (root / f"meta/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    info = {
        "codebase_version": "v2.1",
        "robot_type": "panda",
        "total_episodes": len(episodes),
        "total_frames": first,
        "total_tasks": len(tasks),
        "total_videos": 0 if pictures else 2 * len(episodes),
        "total_chunks": -(-len(episodes) // chunk),
        "chunks_size": chunk,
        "fps": fps,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": DATA_PATH,
        "video_path": None if pictures else VIDEO_PATH,
        "features": features,
    }
    (root / "meta/info.json").write_text(json.dumps(info, indent=4))
    return root


def make_features(episodes: Sequence[StagedEpisode], ids: int | None, pictures: str) -> dict[str, Any]:
    with av.open(io.BytesIO(next(iter(episodes[0].clips.values())))) as clip:
        shape = [clip.streams.video[0].height, clip.streams.video[0].width, 3]
    camera: dict[str, Any] = {"dtype": pictures, "shape": shape, "names": ["height", "width", "channels"]}
    if pictures == "video":
        camera["info"] = {"video.fps": 20, "video.codec": "h264", "video.pix_fmt": "yuv420p", "has_audio": False}
    reasoning = {"dtype": "int64", "shape": [ids]} if ids else {"dtype": "string", "shape": [1]}
    return {
        **{key: camera for key in CAMERA_KEYS.values()},
        "observation.state": {"dtype": "float32", "shape": [8], "names": STATE_NAMES},
        "action": {"dtype": "float32", "shape": [7], "names": ACTION_NAMES},
        "reasoning": reasoning | {"names": None},
        "timestamp": {"dtype": "float32", "shape": [1], "names": None},
        **{key: {"dtype": "int64", "shape": [1], "names": None} for key in INDEX_KEYS},
    }


def write_table(path: Path, features: dict[str, Any], columns: dict[str, Any]) -> None:
    """Through the library and the feature types that lerobot 2.1 used."""
    from datasets import Dataset, Features, List, Value, disable_progress_bars
    from datasets import Image as ImageFeature

    disable_progress_bars()
    kinds: dict[str, Any] = {}
    for key, feature in features.items():
        if feature["dtype"] == "image":
            kinds[key] = ImageFeature()
        elif feature["dtype"] != "video":
            value = Value(feature["dtype"])
            kinds[key] = value if feature["shape"] == [1] else List(value, length=feature["shape"][0])
    path.parent.mkdir(parents=True, exist_ok=True)
    lists = {key: list(columns[key]) for key in kinds}
    Dataset.from_dict(lists, features=Features(kinds)).to_parquet(path)


def png(picture_HWC: np.ndarray) -> dict[str, Any]:
    """A picture as lerobot embeds it."""
    target = io.BytesIO()
    Image.fromarray(picture_HWC).save(target, "PNG")
    return {"bytes": target.getvalue(), "path": "frame.png"}


def padded(ids: list[int], length: int) -> list[int]:
    assert len(ids) <= length
    return ids + [0] * (length - len(ids))


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
