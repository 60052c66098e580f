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
from dtvla.errors import UserError


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


# -- episodes left out -----------------------------------------------------------------------------------------------


def test_episodes_left_out_leave_no_gap(tmp_path: Path) -> None:
    source = write(tmp_path / "set")
    whole, frames = Demonstrations(source), AnnotatedFrames(source)
    kept = [0, 2]
    write_annotated(source, tmp_path / "new", [whole.thought(f) or "" for f in range(len(whole))], [1, 3])
    new, new_frames = Demonstrations(tmp_path / "new"), AnnotatedFrames(tmp_path / "new")
    rows = whole.frames_of(np.array(kept))
    np.testing.assert_array_equal(new.action_FD, whole.action_FD[rows])
    assert [new.thought(f) for f in range(len(new))] == [whole.thought(f) for f in rows.tolist()]
    table = pq.read_table(tmp_path / "new/data/chunk-000/file-000.parquet")
    assert table["index"].to_pylist() == list(range(len(rows)))
    lengths = [len(staged(number).state_F8) for number in kept]
    assert table["episode_index"].to_pylist() == [0] * lengths[0] + [1] * lengths[1]
    for place, number in enumerate(kept):
        assert (new_frames[place].source["seed"], new_frames[place].source["episode_index"]) == (100 + number, place)
        picture = new_frames[place].picture("agentview", lengths[place] - 1)
        np.testing.assert_array_equal(picture, frames[number].picture("agentview", lengths[place] - 1))
    assert new.statistics.to_dict()["action"]["q99"] == pytest.approx(np.quantile(new.action_FD, 0.99, axis=0).tolist())
    assert read_info(tmp_path / "new")["splits"] == {"train": "0:2"}
    episodes = pq.read_table(tmp_path / "new/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["stats/index/min"][0] for row in episodes] == [0, lengths[0]]
    assert [row["stats/episode_index/max"][0] for row in episodes] == [0, 1]
    stats = json.loads((tmp_path / "new/meta/stats.json").read_text())
    np.testing.assert_allclose(stats["action"]["mean"], new.action_FD.astype(float).mean(0), rtol=1e-6)
    assert stats["index"]["max"] == [len(rows) - 1]


def test_dropping_is_refused_where_files_are_numbered_by_episode_and_where_nothing_stays(tmp_path: Path) -> None:
    v2, v3 = write(tmp_path / "v2", "v2.1"), write(tmp_path / "v3")
    count = read_info(v3)["total_frames"]
    with pytest.raises(UserError, match="drop_episode needs LeRobot v3.0, the dataset is v2.1"):
        write_annotated(v2, tmp_path / "a", [""] * count, [1])
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="leaves none"):
        write_annotated(v3, tmp_path / "b", [""] * count, [0, 1, 2, 3])


@pytest.mark.slow
@pytest.mark.parametrize("dropped", [(), (1,), (0, 3)])
def test_lerobot_itself_loads_what_was_written(dropped: tuple[int, ...], tmp_path: Path) -> None:
    from lerobot.datasets import LeRobotDataset

    source = write(tmp_path / "set")
    data = Demonstrations(source)
    thoughts = new_thoughts(len(data))
    write_annotated(source, tmp_path / "new", thoughts, dropped)
    dataset, frames = LeRobotDataset("local/new", root=tmp_path / "new"), AnnotatedFrames(source)
    kept = [number for number in range(4) if number not in dropped]
    rows = data.frames_of(np.array(kept)).tolist()
    assert (dataset.num_episodes, len(dataset)) == (len(kept), len(rows))
    for place in (0, len(rows) // 2, len(rows) - 1):
        item, row = dataset[place], rows[place]
        number = int(np.searchsorted(data.stops_E, row, side="right"))
        assert item["reasoning"] == thoughts[row]
        assert item["episode_index"] == kept.index(number)
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
