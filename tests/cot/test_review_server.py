"""Protects the review's server: it shows what the dataset holds, and takes only decisions that are about it."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flask.testing import FlaskClient
from PIL import Image
from review_data import (
    FAILED_KEY,
    FRAMES,
    KEYS,
    REVIEWED_KEY,
    STRIP,
    keys,
    raw_picture,
    reviewing,
    thought,
    write_annotated,
)
from training_data import INSTRUCTION

from dtvla.cot.review.bundle import BundleMaterial, write_bundle
from dtvla.cot.review.decisions import read_decisions
from dtvla.cot.review.material import DatasetMaterial
from dtvla.cot.review.server import create_app, make_review_server
from dtvla.data.demonstrations import Demonstrations
from dtvla.errors import UserError


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> DatasetMaterial:
    return DatasetMaterial(write_annotated(tmp_path_factory.mktemp("data") / "soup"))


NEW = {"decided": "", "page": "one"}


@pytest.fixture
def decisions(tmp_path: Path) -> Path:
    return tmp_path / "decisions.jsonl"


@pytest.fixture
def client(material: DatasetMaterial, decisions: Path) -> Iterator[FlaskClient]:
    with reviewing(material, decisions) as review:
        yield create_app(review).test_client()


def decide(
    client: FlaskClient,
    key: tuple[int, int],
    decision: str,
    text: str = "",
    before: str | None = None,
    decided: str | None = None,
    page: str = "one",
) -> int:
    """Decide on a page that shows the frame as it is now, or as it was with an earlier decision."""
    seen = client.get(f"/api/frames/{key[0]}/{key[1]}").get_json().get("decided", "") if decided is None else decided
    told = {"episode": key[0], "frame": key[1], "decision": decision, "thought": text, "decided": seen, "page": page}
    return client.post(
        "/api/decisions", json={**told, "before": thought(*key) if before is None else before}
    ).status_code


def states(client: FlaskClient) -> dict[tuple[int, int], str]:
    return {(episode, frame): state for episode, frame, state in client.get("/api/frames").get_json()["frames"]}


def test_every_labelled_frame_is_listed_but_not_those_whose_thought_was_carried(client: FlaskClient) -> None:
    assert list(states(client)) == keys()
    assert {key for key, state in states(client).items() if state} == {REVIEWED_KEY}


def test_a_frame_comes_with_its_thought_episode_and_pictures(client: FlaskClient, material: DatasetMaterial) -> None:
    data = Demonstrations(material._dataset.root)
    info = client.get("/api/frames").get_json()
    for episode, frame in keys():
        shown = client.get(f"/api/frames/{episode}/{frame}").get_json()
        assert shown["shown"] == shown["thought"] == data.thought(episode * FRAMES + frame)
        assert shown["failed"] == (["length"] if (episode, frame) == FAILED_KEY else [])
        near = [frame + offset for offset in sorted((0, *STRIP))]
        assert shown["strip"] == [number if 0 <= number < FRAMES else None for number in near]
        facts = client.get(f"/api/episodes/{episode}").get_json()
        action_FD = data.action_FD[episode * FRAMES : (episode + 1) * FRAMES]
        np.testing.assert_allclose(facts["moves"], action_FD[:, :3], atol=6e-4)
        assert facts["closing"] == (action_FD[:, 6] > 0).astype(int).tolist()
        assert (facts["instruction"], facts["length"]) == (INSTRUCTION, FRAMES)
        for camera in info["cameras"]:
            answer = client.get(f"/pictures/{info['digest']}/{episode}/{frame}/{camera}.jpg")
            seen = np.array(Image.open(io.BytesIO(answer.data)), dtype=float)
            error = np.abs(seen - raw_picture(material, camera, episode, frame))
            others = np.abs(seen - raw_picture(material, camera, episode, (frame + 2) % FRAMES))
            assert error.mean() < 0.7 * others.mean()


def test_decisions_are_on_disk_when_they_are_answered_and_outlive_the_server(
    client: FlaskClient, material: DatasetMaterial, decisions: Path
) -> None:
    first, second, third = keys()[:3]
    better = thought(*second).replace("steps", "small steps")
    assert decide(client, first, "accept", thought(*first)) == 200
    assert decide(client, second, "edit", f"  {better.replace(' stands', '\n\nstands')} ") == 200
    assert decide(client, third, "reject") == 200
    found = read_decisions(decisions)
    assert {key: d.decision for key, d in found.items()} == {first: "accept", second: "edit", third: "reject"}
    assert [found[key].thought for key in (first, second, third)] == [thought(*first), better, ""]
    assert [found[key].before for key in (first, second, third)] == [thought(*key) for key in (first, second, third)]
    assert {d.reviewer for d in found.values()} == {"ann"}
    kept = decisions.with_name("copy.jsonl")
    kept.write_bytes(decisions.read_bytes())
    with reviewing(material, kept) as review:
        later = create_app(review).test_client()
        assert states(later) == states(client)
        assert later.get(f"/api/frames/{second[0]}/{second[1]}").get_json()["shown"] == better


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("the alphabet soup is near.", "words"),
        ("the purple dinosaur stands on the moon. next, move nearer to the dinosaur and sing for it.", "none of"),
        ("the alphabet soup is here. <action> next, move above the alphabet soup in the basket.", "tag"),
        ("the alphabet soup is über der table. next, move above the alphabet soup in the basket.", "ASCII"),
        ("", "words"),
    ],
)
def test_an_edit_that_fails_the_checks_is_refused_with_reasons(
    client: FlaskClient, decisions: Path, text: str, reason: str
) -> None:
    key = keys()[0]
    told = {"episode": key[0], "frame": key[1], "decision": "edit", "thought": text, "before": thought(*key), **NEW}
    answer = client.post("/api/decisions", json=told)
    assert answer.status_code == 422
    assert any(reason in sentence for sentence in answer.get_json()["reasons"])
    assert decisions.read_bytes() == b""


def test_what_annotate_would_refuse_is_not_accepted_either(tmp_path: Path, decisions: Path) -> None:
    """The dataset's own settings of the checks count."""
    root = write_annotated(tmp_path / "soup")
    key, words = keys()[0], len(thought(*keys()[0]).split())
    for longest, status in ((words - 1, 422), (words, 200)):
        record = {"settings": {"schema": {"min_words": 2, "max_words": longest}}}
        (root / "meta/annotation.json").write_text(json.dumps(record))
        dataset = DatasetMaterial(root)
        write_bundle(tmp_path / f"{longest}.zip", dataset, dataset.frames[:1], ())
        for material in (dataset, BundleMaterial(tmp_path / f"{longest}.zip")):
            with reviewing(material, decisions) as review:
                assert decide(create_app(review).test_client(), key, "accept", thought(*key)) == status
        assert len(read_decisions(decisions)) == (status == 200)


def test_typographic_marks_of_a_phone_become_plain_and_an_edit_back_is_an_accept(
    client: FlaskClient, decisions: Path
) -> None:
    key = keys()[0]
    assert decide(client, key, "edit", thought(*key).replace("of the table", "of the robot’s table")) == 200
    assert read_decisions(decisions)[key].thought == thought(*key).replace("of the table", "of the robot's table")
    assert decide(client, key, "edit", thought(*key)) == 200
    assert read_decisions(decisions)[key].decision == "accept"


def test_undo_takes_back_one_after_the_other_and_brings_back_what_stood_before(
    client: FlaskClient, decisions: Path
) -> None:
    a, b = keys()[:2]
    for key, decision in ((a, "accept"), (b, "reject"), (a, "reject")):
        assert decide(client, key, decision, thought(*key)) == 200
    undone = []
    while (answer := client.post("/api/undo", json={"page": "one"})).status_code == 200:
        undone.append((answer.get_json()["episode"], answer.get_json()["frame"], answer.get_json()["state"]))
    assert undone == [(*a, "accept"), (*b, ""), (*a, "")]
    assert answer.status_code == 422
    assert read_decisions(decisions) == {}


def test_two_pages_neither_overwrite_nor_take_back_what_the_other_decided(client: FlaskClient, decisions: Path) -> None:
    a, b = keys()[:2]
    edited = f"{thought(*a)} go on."
    assert decide(client, a, "edit", edited, page="one") == 200
    assert decide(client, a, "accept", thought(*a), decided="", page="two") == 409  # it shows the frame as it was
    assert read_decisions(decisions)[a].thought == edited
    assert client.post("/api/undo", json={"page": "two"}).status_code == 422
    assert decide(client, b, "reject", page="two") == 200
    assert decide(client, a, "reject", page="two") == 200
    answer = client.post("/api/undo", json={"page": "one"})
    assert answer.status_code == 422
    assert "somebody else" in answer.get_json()["reasons"][0]
    assert client.post("/api/undo", json={"page": "two"}).get_json()["state"] == "edit"
    assert {key: decision.decision for key, decision in read_decisions(decisions).items()} == {a: "edit", b: "reject"}


def test_a_page_of_another_dataset_decides_and_sees_nothing(client: FlaskClient, decisions: Path) -> None:
    key = keys()[0]
    assert decide(client, key, "accept", "old", before="old") == 409
    assert decide(client, (0, 1), "accept", "x", before="x") == 404
    assert decide(client, (7, 0), "reject", before="") == 404
    camera = client.get("/api/frames").get_json()["cameras"][0]
    digest = client.get("/api/frames").get_json()["digest"]
    assert client.get(f"/pictures/0123456789ab/0/0/{camera}.jpg").status_code == 404
    for place in (f"0/{FRAMES}/{camera}", f"9/0/{camera}", "0/0/nose"):
        assert client.get(f"/pictures/{digest}/{place}.jpg").status_code == 404
    for path in ("frames/0/1", "frames/9/0", "episodes/9"):
        assert client.get(f"/api/{path}").status_code == 404
    assert decisions.read_bytes() == b""


@pytest.mark.parametrize("told", [[], {}, {"episode": "0"}, {"decision": "undo"}, {"frame": True}, {"thought": None}])
def test_nonsense_is_refused(client: FlaskClient, decisions: Path, told: object) -> None:
    good = {"episode": 0, "frame": 0, "decision": "accept", "thought": thought(0, 0), "before": thought(0, 0), **NEW}
    content = {**good, **told} if told and isinstance(told, dict) else told
    assert client.post("/api/decisions", json=content).status_code == 400
    assert decisions.read_bytes() == b""


def test_pages_of_elsewhere_can_not_decide_or_read(client: FlaskClient, decisions: Path) -> None:
    """Forms of other sites can post texts but no JSON; a name that was made to point here is not answered."""
    good = f'{{"episode": 0, "frame": 0, "decision": "reject", "thought": "", "before": "{thought(0, 0)}"}}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert client.post("/api/decisions", data=good, content_type=kind).status_code in (400, 415)
        assert client.post("/api/undo", data="{}", content_type=kind).status_code in (400, 415)
    assert client.get("/api/frames", headers={"Host": "evil.example:8421"}).status_code == 400
    assert client.get("/api/frames", headers={"Host": "127.0.0.1:8421"}).status_code == 200
    assert "default-src 'self'" in client.get("/").headers["Content-Security-Policy"]
    assert decisions.read_bytes() == b""


def test_a_server_for_other_machines_asks_for_its_key(material: DatasetMaterial, decisions: Path) -> None:
    with reviewing(material, decisions) as review:
        client = create_app(review, key="open sesame").test_client()
        for path in ("/", "/api/frames", "/page/review.js", "/?key=wrong", "/?key=ü"):
            assert client.get(path).status_code == 403
        assert client.get("/?key=open+sesame").location == "/"
        assert client.get("/").status_code == client.get("/api/frames").status_code == 200


def test_a_thought_that_was_written_anew_is_reviewed_anew(
    material: DatasetMaterial, decisions: Path, tmp_path: Path
) -> None:
    """And one that a reviewer's text has replaced is not."""
    key, other = keys()[:2]
    with reviewing(material, decisions) as review:
        client = create_app(review).test_client()
        decide(client, key, "reject")
        decide(client, other, "edit", thought(*other) + " now")
        assert decide(client, other, "edit", thought(*other) + " go on.") == 200
    new = DatasetMaterial(write_annotated(tmp_path / "new", mark=" go on."))
    with reviewing(new, decisions) as review:
        assert review.state(key) == ""
        assert review.state(other) == "edit"


def test_a_film_that_does_not_decode_is_said_and_the_rest_goes_on(tmp_path: Path, decisions: Path) -> None:
    root = write_annotated(tmp_path / "soup")
    film = min(root.glob("videos/*/*/*.mp4"))
    film.write_bytes(film.read_bytes()[:200])
    material = DatasetMaterial(root)
    with reviewing(material, decisions) as review:
        client = create_app(review).test_client()
        answers = [client.get(f"/pictures/{material.digest}/0/0/{camera}.jpg") for camera in material.cameras]
        assert sorted(answer.status_code for answer in answers) == [200, 500]
        assert "can't be decoded" in str([answer.get_json(silent=True) for answer in answers])
        assert decide(client, keys()[0], "accept", thought(*keys()[0])) == 200


def test_only_changes_and_only_some_episodes_are_shown_on_demand(tmp_path: Path) -> None:
    root = write_annotated(tmp_path / "soup")
    (root / "meta/annotations.parquet").unlink()
    every = DatasetMaterial(root, episodes=[2])
    assert [frame.key for frame in every.frames] == sorted((2, k + d) for k in KEYS for d in (0, 1) if k + d < FRAMES)
    changes = DatasetMaterial(root, changes=True, episodes=[2, 0])
    assert [frame.key for frame in changes.frames] == [(episode, frame) for episode in (0, 2) for frame in KEYS]
    with pytest.raises(UserError, match="episodes: .* no episode 3; use 0 to 2"):
        DatasetMaterial(root, episodes=[3])


def test_a_dataset_without_thoughts_or_with_none_left_is_named(tmp_path: Path) -> None:
    root = write_annotated(tmp_path / "soup")
    with pytest.raises(UserError, match="dataset: .* no thought to review"):
        DatasetMaterial(root, episodes=[])
    info = json.loads((root / "meta/info.json").read_text())
    del info["features"]["reasoning"]
    (root / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="dataset: .* has no thoughts .*dtvla annotate"):
        DatasetMaterial(root)


def test_an_address_is_free_when_its_server_has_ended(material: DatasetMaterial, decisions: Path) -> None:
    with reviewing(material, decisions) as review:
        for number in (0, 0):
            server = make_review_server(create_app(review), "127.0.0.1", number)
            server.server_close()
            make_review_server(create_app(review), "127.0.0.1", server.port).server_close()


def test_a_port_that_is_taken_is_named(material: DatasetMaterial, decisions: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, reviewing(material, decisions) as review:
        number = taken.getsockname()[1]
        for host, port in (("127.0.0.1", number), ("127.0.0.1", 10**6), ("203.0.113.7", 0)):
            with pytest.raises(UserError, match=f"port: {host}:{port}"):
                make_review_server(create_app(review), host, port)
