"""Protects bundles: elsewhere the review looks as at home, and its decisions come home."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path

import pytest
from review_data import REVIEWED_KEY, STRIP, keys, reviewing, thought, write_annotated

from dtvla.cot.review.bundle import HEAD, BundleMaterial, write_bundle
from dtvla.cot.review.decisions import DecisionLog, read_decisions
from dtvla.cot.review.material import DatasetMaterial
from dtvla.cot.review.merging import merge
from dtvla.cot.review.server import create_app
from dtvla.errors import UserError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetMaterial:
    return DatasetMaterial(write_annotated(tmp_path_factory.mktemp("data") / "soup"))


@pytest.fixture(scope="module")
def bundle(dataset: DatasetMaterial, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "soup.zip"
    write_bundle(path, dataset, dataset.frames, STRIP)
    return path


def test_a_bundle_answers_like_its_dataset(dataset: DatasetMaterial, bundle: Path, tmp_path: Path) -> None:
    elsewhere = BundleMaterial(bundle)
    with (
        reviewing(dataset, tmp_path / "a.jsonl") as home,
        reviewing(elsewhere, tmp_path / "b.jsonl", strip=tuple(elsewhere.strip)) as away,
    ):
        here, there = create_app(home).test_client(), create_app(away).test_client()
        info = here.get("/api/frames").get_json()
        paths = ["/api/frames", *(f"/api/episodes/{episode}" for episode in range(3))]
        for episode, frame in keys():
            shown = here.get(f"/api/frames/{episode}/{frame}").get_json()
            seen = {(camera, frame) for camera in info["cameras"]}
            seen |= {(info["cameras"][0], near) for near in shown["strip"] if near is not None}
            paths.append(f"/api/frames/{episode}/{frame}")
            paths += [f"/pictures/{info['digest']}/{episode}/{number}/{camera}.jpg" for camera, number in seen]
        for path in paths:
            ours, theirs = here.get(path), there.get(path)
            assert ours.status_code == theirs.status_code == 200, path
            assert ours.data == theirs.data, path


def test_decisions_of_elsewhere_come_home(dataset: DatasetMaterial, bundle: Path, tmp_path: Path) -> None:
    rng = random.Random(5)
    elsewhere = BundleMaterial(bundle)
    with reviewing(elsewhere, tmp_path / "away.jsonl", reviewer="bob") as review:
        for key in keys():
            kind = rng.choice(("accept", "edit", "reject"))
            review.decide(key, kind, thought(*key) + " go on." * (kind == "edit"), thought(*key), "", "page")
    with DecisionLog(tmp_path / "home.jsonl") as log:
        merged = merge(log, tmp_path / "away.jsonl", {frame.key: frame.thought for frame in dataset.frames})
    assert (merged.taken, merged.conflicts, merged.foreign) == (len(keys()), [], 0)
    assert read_decisions(tmp_path / "home.jsonl") == read_decisions(tmp_path / "away.jsonl")
    with reviewing(dataset, tmp_path / "home.jsonl") as review:
        assert not review.chosen()


def test_what_is_reviewed_already_need_not_be_exported(dataset: DatasetMaterial, tmp_path: Path) -> None:
    with reviewing(dataset, tmp_path / "d.jsonl") as review:
        review.decide(keys()[0], "reject", "", thought(*keys()[0]), "", "page")
        write_bundle(tmp_path / "rest.zip", dataset, review.chosen(), STRIP)
    rest = BundleMaterial(tmp_path / "rest.zip")
    assert {frame.key for frame in rest.frames} == set(keys()) - {keys()[0], REVIEWED_KEY}
    with pytest.raises(UserError, match="export: every frame is reviewed"):
        write_bundle(tmp_path / "none.zip", dataset, [], STRIP)


def test_an_export_overwrites_nothing_and_leaves_nothing_half_written(bundle: Path, tmp_path: Path) -> None:
    dataset = DatasetMaterial(write_annotated(tmp_path / "soup"))
    before = bundle.read_bytes()
    for path in (bundle, tmp_path / "frames.tar"):
        with pytest.raises(UserError, match="export: .* choose another"):
            write_bundle(path, dataset, dataset.frames, STRIP)
    assert bundle.read_bytes() == before
    film = min((tmp_path / "soup").glob("videos/*/*/*.mp4"))
    film.write_bytes(film.read_bytes()[:200])
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="can't be decoded"):
        write_bundle(tmp_path / "out/broken.zip", dataset, dataset.frames, STRIP)
    assert not list((tmp_path / "out").iterdir())


def test_a_file_that_is_no_whole_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    content, path = bundle.read_bytes(), tmp_path / "bad.zip"
    with pytest.raises(UserError, match="bundle: .*cannot be read"):
        BundleMaterial(path)
    rng = random.Random(1)
    for stop in (0, 10, *(rng.randrange(20, len(content) - 1) for _ in range(20))):
        path.write_bytes(content[:stop])
        with pytest.raises(UserError, match="bundle: .*no whole bundle"):
            BundleMaterial(path)
    for head in ({"format": "other", "version": 1}, {"format": "dtvla.review_bundle", "version": 2}, {}, []):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(HEAD, json.dumps(head))
        with pytest.raises(UserError, match="bundle: .*no whole bundle"):
            BundleMaterial(path)


def test_a_damaged_picture_is_named(bundle: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(bundle) as file:
        info = next(info for info in file.infolist() if info.filename.endswith(".jpg"))
    content = bytearray(bundle.read_bytes())
    content[info.header_offset + 200] ^= 0xFF
    (tmp_path / "bad.zip").write_bytes(content)
    _, camera, name = info.filename.split("/")
    episode, frame = (int(part) for part in name.removesuffix(".jpg").split("_"))
    with pytest.raises(UserError, match=f"{name} is damaged"):
        BundleMaterial(tmp_path / "bad.zip").picture(camera, episode, frame)
