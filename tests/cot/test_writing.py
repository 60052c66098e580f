"""Protects the written dataset: another column of thoughts, everything else as it was, in either format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from annotating import SIDE, staged, write
from digests import digests

from dtvla.cot.episodes import AnnotatedFrames
from dtvla.cot.writing import write_annotated
from dtvla.data.demonstrations import Demonstrations
from dtvla.data.lerobot import read_info
from dtvla.data.staging import CAMERA_KEYS


def pictures_in_tables() -> dict[str, list[np.ndarray]]:
    counts = [len(staged(number).state_F8) for number in range(4)]
    return {
        camera: [
            np.stack([np.full((SIDE, SIDE, 3), [60 * c, 40 * number, t], np.uint8) for t in range(count)])
            for number, count in enumerate(counts)
        ]
        for c, camera in enumerate(CAMERA_KEYS)
    }


KINDS: dict[str, dict[str, Any]] = {
    "v3.0": {"version": "v3.0"},
    "v2.1": {"version": "v2.1"},
    "v2.1 with token ids": {"version": "v2.1", "tokenize": lambda text: [7, 8, 9], "length": 6},
    "v2.1 with pictures in tables": {"version": "v2.1", "pictures": pictures_in_tables()},
}


def same_but_thoughts(ours: Demonstrations, theirs: Demonstrations) -> None:
    for name in ("state_FD", "action_FD", "task_index_F", "starts_E", "stops_E"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert ours.instructions == theirs.instructions
    assert ours.sources == theirs.sources
    assert ours.statistics.to_dict() == theirs.statistics.to_dict()


def new_thoughts(count: int) -> list[str]:
    return ["" if frame % 3 == 1 else f"thought {frame // 2}" for frame in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_thoughts_change_and_the_source_does_not(kind: str, tmp_path: Path) -> None:
    source = write(tmp_path / "set", **KINDS[kind])
    before, data = digests(source), Demonstrations(source, thoughts=False)
    thoughts = new_thoughts(len(data))
    write_annotated(source, tmp_path / "new", thoughts)
    new = Demonstrations(tmp_path / "new")
    assert [new.thought(frame) or "" for frame in range(len(new))] == thoughts
    same_but_thoughts(new, data)
    assert digests(source) == before
    old_frames, new_frames = AnnotatedFrames(source), AnnotatedFrames(tmp_path / "new")
    for number in (0, 3):
        for camera in CAMERA_KEYS:
            np.testing.assert_array_equal(new_frames[number].picture(camera, 5), old_frames[number].picture(camera, 5))
    files = {path.relative_to(source): path for path in source.rglob("*.mp4")}
    assert all((tmp_path / "new" / inner).stat().st_ino == path.stat().st_ino for inner, path in files.items())
    assert read_info(tmp_path / "new")["features"]["reasoning"] == {"dtype": "string", "shape": [1], "names": None}
    assert set(digests(tmp_path / "new")) == set(before)


def test_a_dataset_without_thoughts_gets_the_column(tmp_path: Path) -> None:
    source = write(tmp_path / "set")
    (path,) = (source / "data").rglob("*.parquet")
    pq.write_table(pq.read_table(path).drop_columns(["reasoning"]), path)
    info = read_info(source)
    del info["features"]["reasoning"]
    (source / "meta/info.json").write_text(json.dumps(info))
    count = info["total_frames"]
    write_annotated(source, tmp_path / "new", new_thoughts(count))
    new = Demonstrations(tmp_path / "new")
    assert [new.thought(frame) or "" for frame in range(count)] == new_thoughts(count)


def test_the_description_inside_the_tables_tells_of_texts(tmp_path: Path) -> None:
    from datasets import Features, Value

    source = write(tmp_path / "set", **KINDS["v2.1 with token ids"])
    write_annotated(source, tmp_path / "new", new_thoughts(read_info(source)["total_frames"]))
    for path in (tmp_path / "new/data").rglob("*.parquet"):
        schema = pq.read_schema(path)
        assert b"huggingface" in schema.metadata
        assert Features.from_arrow_schema(schema)["reasoning"] == Value("string")


def test_groups_of_rows_stay_small_where_pictures_are_in_the_table(tmp_path: Path) -> None:
    source = write(tmp_path / "set", **KINDS["v2.1 with pictures in tables"])
    path = source / "data/chunk-000/episode_000001.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=10)
    write_annotated(source, tmp_path / "new", new_thoughts(read_info(source)["total_frames"]))
    old, new = (pq.ParquetFile(file).metadata for file in (path, tmp_path / "new" / path.relative_to(source)))
    sizes = [[m.row_group(g).num_rows for g in range(m.num_row_groups)] for m in (old, new)]
    assert len(sizes[0]) > 3
    assert sizes[0] == sizes[1]


def test_a_link_into_a_cache_is_followed_and_hidden_folders_stay(tmp_path: Path) -> None:
    source = write(tmp_path / "set")
    video = next(source.rglob("*.mp4"))
    shutil.move(video, tmp_path / "blob")
    video.symlink_to(tmp_path / "blob")
    (source / ".cache").mkdir()
    (source / ".cache/x").write_text("x")
    write_annotated(source, tmp_path / "new", new_thoughts(read_info(source)["total_frames"]))
    copy = tmp_path / "new" / video.relative_to(source)
    assert not copy.is_symlink()
    assert copy.read_bytes() == (tmp_path / "blob").read_bytes()
    assert not (tmp_path / "new/.cache").exists()


def test_statistics_of_token_ids_are_forgotten(tmp_path: Path) -> None:
    source = write(tmp_path / "set", "v2.1")
    path = source / "meta/episodes_stats.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["stats"]["reasoning"] = {"min": [0], "max": [9]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_annotated(source, tmp_path / "new", new_thoughts(read_info(source)["total_frames"]))
    new = [json.loads(line) for line in (tmp_path / "new/meta/episodes_stats.jsonl").read_text().splitlines()]
    assert all("reasoning" not in row["stats"] and "action" in row["stats"] for row in new)


@pytest.mark.slow
def test_lerobot_itself_loads_what_was_written(tmp_path: Path) -> None:
    from lerobot.datasets import LeRobotDataset

    source = write(tmp_path / "set")
    data = Demonstrations(source)
    thoughts = new_thoughts(len(data))
    write_annotated(source, tmp_path / "new", thoughts)
    dataset, frames = LeRobotDataset("local/new", root=tmp_path / "new"), AnnotatedFrames(source)
    assert (dataset.num_episodes, len(dataset)) == (4, len(data))
    for row in (0, len(data) // 2, len(data) - 1):
        item, number = dataset[row], int(np.searchsorted(data.stops_E, row, side="right"))
        assert item["reasoning"] == thoughts[row]
        assert item["episode_index"] == number
        np.testing.assert_array_equal(item["action"].numpy(), data.action_FD[row])
        picture = frames[number].picture("agentview", row - int(data.starts_E[number]))
        shown = item[CAMERA_KEYS["agentview"]].permute(1, 2, 0).numpy() * 255
        assert np.abs(shown - picture.astype(float)).mean() < 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v2.1 with token ids", "v2.1 with pictures in tables"])
def test_lerobots_own_converter_takes_an_annotated_v21(kind: str, tmp_path: Path) -> None:
    from lerobot.scripts.convert_dataset_v21_to_v30 import convert_dataset

    source = write(tmp_path / "set", **KINDS[kind])
    thoughts = new_thoughts(read_info(source)["total_frames"])
    write_annotated(source, tmp_path / "new", thoughts)
    convert_dataset("local/new", root=tmp_path / "new", push_to_hub=False)
    converted = Demonstrations(tmp_path / "new")
    assert [converted.thought(frame) or "" for frame in range(len(converted))] == thoughts
