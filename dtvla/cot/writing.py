"""Writes an annotated dataset: the source's files, with another column ``reasoning``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dtvla.data.dataset_folder import FORMATS
from dtvla.data.lerobot import read_info, read_json, read_lines, read_parquet, write_json
from dtvla.data.thoughts import COLUMN

FEATURE = {"dtype": "string", "shape": [1], "names": None}
RECORD, TABLE, REPORT = "meta/annotation.json", "meta/annotations.parquet", "annotation"


def write_annotated(source: Path, target: Path, thoughts_F: Sequence[str]) -> None:
    """Write the dataset at ``source`` anew into the new folder ``target``, in the same version of the format.

    Tables and metadata are written, everything else (videos, above all) is hard-linked, or copied where that fails.

    Args:
        source: a LeRobot dataset.
        target: folder that does not exist.
        thoughts_F: a thought for every frame of the source, "" for none.

    Raises:
        OSError: the disk is full.
    """
    info = read_info(source)
    episodes = FORMATS[str(info["codebase_version"])[:3]](source, info).episodes
    _copy_files(source, target, {episode.data for episode in episodes})
    start = 0
    for path, inside in groupby(episodes, key=lambda episode: episode.data):
        stop = start + sum(episode.length for episode in inside)
        _write_table(path, target / path.relative_to(source), pa.array(thoughts_F[start:stop], pa.string()))
        start = stop
    assert start == len(thoughts_F), (start, len(thoughts_F))
    info["features"][COLUMN] = FEATURE
    _forget_statistics(target)
    write_json(target / "meta/info.json", info)


def _copy_files(source: Path, target: Path, tables: set[Path]) -> None:
    """Everything but tables of frames, what an earlier annotation said, and hidden folders."""
    for place, folders, names in os.walk(source, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        for path in (Path(place) / name for name in sorted(names)):
            inner = path.relative_to(source)
            if path in tables or str(inner) in (RECORD, TABLE) or inner.parts[0] == REPORT:
                continue
            copy = target / inner
            copy.parent.mkdir(parents=True, exist_ok=True)
            if inner.parts[0] == "meta":
                shutil.copyfile(path, copy)
                continue
            try:
                os.link(path.resolve(), copy)  # the file itself, where the source has a link into a cache
            except OSError:
                shutil.copyfile(path, copy)


def _write_table(source: Path, target: Path, thoughts: pa.Array) -> None:
    """Write a file of frames group by group, so that pictures in it never fill the memory."""
    file = pq.ParquetFile(source)
    done, writer = 0, None
    target.parent.mkdir(parents=True, exist_ok=True)
    for group in range(file.num_row_groups):
        table = file.read_row_group(group)
        table = _with_thoughts(table, thoughts[done : done + len(table)])
        done += len(table)
        writer = writer or pq.ParquetWriter(target, table.schema)
        writer.write_table(table)
    if writer:
        writer.close()


def _with_thoughts(table: pa.Table, thoughts: pa.Array) -> pa.Table:
    """Replace or add the column, and say so in the description that the library ``datasets`` leaves in its files."""
    if COLUMN in table.column_names:
        table = table.set_column(table.column_names.index(COLUMN), COLUMN, thoughts)
    else:
        table = table.append_column(COLUMN, thoughts)
    metadata = dict(table.schema.metadata or {})
    described = json.loads(metadata.get(b"huggingface", b"{}"))
    if "info" in described:
        described["info"]["features"][COLUMN] = {"dtype": "string", "_type": "Value"}
        metadata[b"huggingface"] = json.dumps(described).encode()
    return table.replace_schema_metadata(metadata)


def _forget_statistics(root: Path) -> None:
    """Remove statistics of token ids that the column held before; texts have none."""
    path = root / "meta/stats.json"
    if path.exists() and COLUMN in (stats := read_json(path)):
        write_json(path, {name: value for name, value in stats.items() if name != COLUMN})
    path = root / "meta/episodes_stats.jsonl"
    if path.exists():
        rows = read_lines(path)
        for row in rows:
            row.get("stats", {}).pop(COLUMN, None)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in sorted((root / "meta/episodes").rglob("*.parquet")):
        table = read_parquet(path)
        if names := [name for name in table.column_names if name.startswith(f"stats/{COLUMN}/")]:
            pq.write_table(table.drop_columns(names), path)
