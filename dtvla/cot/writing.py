"""Writes an annotated dataset: the source's files, with another column ``reasoning`` and without dropped episodes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dtvla.cot.dropping import check_dropping, drop_from_metadata, episode_tables, write_json
from dtvla.data.dataset_folder import FORMATS
from dtvla.data.lerobot import Episode, read_info, read_lines, read_parquet
from dtvla.data.thoughts import COLUMN

FEATURE = {"dtype": "string", "shape": [1], "names": None}
RECORD, TABLE, REPORT = "meta/annotation.json", "meta/annotations.parquet", "annotation"


def write_annotated(source: Path, target: Path, thoughts_F: Sequence[str], dropped: Sequence[int] = ()) -> None:
    """Write the dataset at ``source`` anew into the new folder ``target``, in the same version of the format.

    Tables and metadata are written, everything else (videos, above all) is hard-linked, or copied where that fails.

    Args:
        source: a LeRobot dataset.
        target: folder that does not exist.
        thoughts_F: a thought for every frame of the source, "" for none.
        dropped: places of episodes that are left out, ascending; the rest is numbered anew.

    Raises:
        UserError: episodes are dropped from another format than v3.0.
        OSError: the disk is full.
    """
    info = read_info(source)
    check_dropping(info, bool(dropped))
    episodes = FORMATS[str(info["codebase_version"])[:3]](source, info).episodes
    left_out = {episodes[place].number for place in dropped}
    _copy_files(source, target, {episode.data for episode in episodes})
    start, kept_rows = 0, 0
    for path, group in groupby(episodes, key=lambda episode: episode.data):
        inside = list(group)
        stop = start + sum(episode.length for episode in inside)
        thoughts = pa.array(thoughts_F[start:stop], pa.string())
        kept_rows += _write_table(path, target / path.relative_to(source), thoughts, episodes, left_out, kept_rows)
        start = stop
    assert start == len(thoughts_F), (start, len(thoughts_F))
    info["features"][COLUMN] = FEATURE
    _forget_statistics(target)
    if left_out:
        info = drop_from_metadata(target, info, episodes, left_out, kept_rows)
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


def _write_table(
    source: Path, target: Path, thoughts: pa.Array, episodes: Sequence[Episode], left_out: set[int], first: int
) -> int:
    """Write a file of frames group by group, so that pictures in it never fill the memory; returns rows written."""
    numbers = {e.number: i for i, e in enumerate(e for e in episodes if e.number not in left_out)}
    file = pq.ParquetFile(source)
    done, written, writer = 0, 0, None
    target.parent.mkdir(parents=True, exist_ok=True)
    for group in range(file.num_row_groups):
        table = file.read_row_group(group)
        table = _with_thoughts(table, thoughts[done : done + len(table)])
        done += len(table)
        if left_out:
            table = table.filter(pc.invert(pc.is_in(table["episode_index"], pa.array(sorted(left_out), pa.int64()))))
            renumbered = [numbers[number] for number in table["episode_index"].to_pylist()]
            indices = np.arange(first + written, first + written + len(table))
            for name, values in (("episode_index", renumbered), ("index", indices)):
                place = table.column_names.index(name)
                table = table.set_column(
                    place, table.schema.field(name), pa.array(values, table.schema.field(name).type)
                )
        if len(table):
            writer = writer or pq.ParquetWriter(target, table.schema)
            writer.write_table(table)
            written += len(table)
    if writer:
        writer.close()
    return written


def _with_thoughts(table: pa.Table, thoughts: pa.Array) -> pa.Table:
    """Replace or add the column, and say so in the description that the library ``datasets`` leaves in its files."""
    if COLUMN in table.column_names:
        table = table.set_column(table.column_names.index(COLUMN), COLUMN, thoughts)
    else:
        table = table.append_column(COLUMN, thoughts)
    metadata = dict(table.schema.metadata or {})
    if b"huggingface" in metadata:
        described = json.loads(metadata[b"huggingface"])
        described["info"]["features"][COLUMN] = {"dtype": "string", "_type": "Value"}
        metadata[b"huggingface"] = json.dumps(described).encode()
    return table.replace_schema_metadata(metadata)


def _forget_statistics(root: Path) -> None:
    """Remove statistics of token ids that the column held before; texts have none."""
    path = root / "meta/stats.json"
    if path.exists() and COLUMN in (stats := json.loads(path.read_text())):
        write_json(path, {name: value for name, value in stats.items() if name != COLUMN})
    path = root / "meta/episodes_stats.jsonl"
    if path.exists():
        rows = read_lines(path)
        for row in rows:
            row["stats"].pop(COLUMN, None)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in episode_tables(root):
        table = read_parquet(path)
        if names := [name for name in table.column_names if name.startswith(f"stats/{COLUMN}/")]:
            pq.write_table(table.drop_columns(names), path)
