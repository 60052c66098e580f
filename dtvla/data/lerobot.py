"""What LeRobot's dataset formats have in common: the description in ``meta/info.json`` and the list of episodes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dtvla.errors import UserError


@dataclass(frozen=True)
class Episode:
    """Where an episode's frames are.

    Attributes:
        number: its ``episode_index``.
        length: number of frames.
        data: the parquet file with its rows; rows of several episodes follow each other in the order of the episodes.
        videos: by dataset key, the video file and the position of the episode's first picture in it.
    """

    number: int
    length: int
    data: Path
    videos: Mapping[str, tuple[Path, int]]


@dataclass(frozen=True)
class Contents:
    """The metadata of a dataset, whatever the version of its format.

    Attributes:
        episodes: by number.
        tasks: instruction by ``task_index``.
        tables: the files that say so.
    """

    episodes: list[Episode]
    tasks: dict[int, str]
    tables: list[Path]


def read_info(root: Path) -> dict[str, Any]:
    """The description of a dataset; :class:`UserError` when the folder holds none."""
    path = root / "meta/info.json"
    if not root.is_dir():
        if Path(f"{root}.partial").is_dir():
            raise UserError(f"{root}: its collection is not finished; run the same `python -m dtvla.collect` again")
        raise UserError(f"{root}: no such dataset; make it with `python -m dtvla.collect` or name another folder")
    try:
        info = dict(json.loads(path.read_text()))
        needed = ("codebase_version", "fps", "features", "total_episodes", "total_frames", "data_path")
        missing = [key for key in needed if key not in info]
    except FileNotFoundError:
        raise UserError(f"{root}: no LeRobot dataset (meta/info.json is missing); set data.root to one") from None
    except (ValueError, TypeError):
        raise UserError(f"{path}: damaged; copy or collect the dataset again") from None
    if missing:
        raise UserError(f"{path}: damaged, {', '.join(missing)} missing; copy or collect the dataset again")
    return info


def video_keys(info: Mapping[str, Any]) -> list[str]:
    """Dataset keys of the cameras whose pictures are video files."""
    return [key for key, feature in info["features"].items() if feature["dtype"] == "video"]


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read these columns of a file (None: all); :class:`UserError` when it is damaged or lacks one."""
    try:
        table = pq.ParquetFile(path).read(columns=columns)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; copy or collect the dataset again") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}); copy or collect the dataset again") from None
    if absent := [name for name in columns or () if name not in table.column_names]:
        raise UserError(f"{path}: columns {absent} are missing, though info.json names them; copy the dataset again")
    return table


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file with one JSON object a line; :class:`UserError` when it is absent or damaged."""
    try:
        return [dict(json.loads(line)) for line in path.read_text().splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{path}: missing; copy the dataset again") from None
    except (ValueError, TypeError):
        raise UserError(f"{path}: damaged; copy the dataset again") from None


def read_json(path: Path) -> dict[str, Any]:
    """A file with one JSON object; :class:`UserError` when it is damaged."""
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{path}: damaged; copy the dataset again") from None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a readable JSON file."""
    path.write_text(json.dumps(values, indent=2) + "\n")
