"""A small annotated dataset to review, and parts of a review of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from training_data import write_demonstrations

from dtvla.cot.labels import ANNOTATED, CARRIED, NONE, REVIEWED
from dtvla.cot.review.decisions import DecisionLog
from dtvla.cot.review.material import DatasetMaterial, Material
from dtvla.cot.review.server import create_app, make_review_server
from dtvla.cot.review.session import Review
from dtvla.cot.writing import TABLE
from dtvla.review import check_of

EPISODES, FRAMES = 3, 24
KEYS = (0, 9, 17, 23)
REVIEWED_KEY = (2, 23)
FAILED_KEY = (1, 9)
STRIP = (-6, -3, 3, 6)


def thought(episode: int, frame: int) -> str:
    """The thought of a labelled frame; it passes the checks."""
    return f"the alphabet soup stands at place {episode} of the table. next, move {frame} steps nearer to the basket."


def write_annotated(root: Path, seed: int = 0, mark: str = "") -> Path:
    """Demonstrations with thoughts at KEYS, carried forward one frame, and the table that says so."""
    write_demonstrations(root, EPISODES, FRAMES, seed)
    rows = []
    for episode in range(EPISODES):
        for frame in range(FRAMES):
            own, carried = frame in KEYS, frame - 1 in KEYS
            origin = (
                REVIEWED if (episode, frame) == REVIEWED_KEY else ANNOTATED if own else CARRIED if carried else NONE
            )
            text = thought(episode, frame - (not own)) + mark if own or carried else ""
            checks = ["length"] if (episode, frame) == FAILED_KEY else []
            rows.append({"episode": episode, "frame": frame, "origin": origin, "failed_checks": checks, "text": text})
    (path,) = root.glob("data/*/*.parquet")
    table = pq.read_table(path)
    column = pa.array([row.pop("text") for row in rows])
    pq.write_table(table.set_column(table.column_names.index("reasoning"), "reasoning", column), path)
    kinds = pa.schema(
        {"episode": pa.int64(), "frame": pa.int64(), "origin": pa.string(), "failed_checks": pa.list_(pa.string())}
    )
    pq.write_table(pa.Table.from_pylist(rows, kinds), root / TABLE)
    return root


def keys() -> list[tuple[int, int]]:
    """Frames that are shown, in order."""
    return [(episode, frame) for episode in range(EPISODES) for frame in KEYS]


@contextmanager
def reviewing(
    material: Material,
    decisions: Path,
    *,
    reviewer: str = "ann",
    show: str = "unreviewed",
    strip: tuple[int, ...] = STRIP,
) -> Iterator[Review]:
    """A review with the real checks."""
    with DecisionLog(decisions) as log:
        yield Review(material, log, check_of(material.schema), reviewer=reviewer, strip=strip, show=show)


@contextmanager
def serving(review: Review) -> Iterator[str]:
    """The address of the review's page on a free port."""
    server = make_review_server(create_app(review), "127.0.0.1", 0)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def raw_picture(material: DatasetMaterial, camera: str, episode: int, frame: int) -> np.ndarray:
    """uint8 (H, W, 3), as the dataset has it."""
    return material._dataset[episode].picture(camera, frame)
