"""Protects the annotator for endpoints: what is sent, that faults are survived, and that nothing is paid twice."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai_server import KEY, FakeEpisode, Reply, Server, serving
from PIL import Image

from dtvla.cot.annotator import Job
from dtvla.cot.limits import Stopped
from dtvla.cot.openai_annotator import OpenAIAnnotator
from dtvla.errors import UserError

COMPLAINTS = ("has 4 words, expected 8 to 80", "mentions none of: bowl, plate")
FAULTS = {
    "too many requests": Reply(429, "{}"),
    "server error": Reply(500, "oops", kind="text/plain"),
    "overloaded": Reply(503, '{"error": {"message": "overloaded"}}'),
    "silence": Reply(silence_s=1.5),
    "truncated json": Reply(body='{"choices": [{"message": {"role": "assi'),
    "html": Reply(body="<html>busy</html>", kind="text/html"),
    "an error that claims success": Reply(body='{"error": {"message": "upstream"}}'),
    "no choices": Reply(body='{"choices": []}'),
    "a body cut off": Reply(cut=30),
    "a dropped connection": Reply(cut=0),
}

EPISODE: Any = FakeEpisode()
Make = Callable[..., OpenAIAnnotator]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("THE_KEY", KEY)
    with serving() as server:
        yield server


@pytest.fixture
def make(server: Server, tmp_path: Path) -> Iterator[Make]:
    """Annotators of one folder of answers; a new one takes over from the one before."""
    made: list[OpenAIAnnotator] = []

    def make(**settings: Any) -> OpenAIAnnotator:
        if made:
            made.pop().close()
        defaults: dict[str, Any] = {"model": "eyes", "base_url": server.url, "api_key_env": "THE_KEY", "timeout_s": 1}
        defaults |= {"cache_dir": tmp_path / "answers", "cameras": ["agentview", "wrist"], "max_retries": 2}
        made.append(OpenAIAnnotator(**(defaults | settings)))
        return made[-1]

    yield make
    for annotator in made:
        annotator.close()


def label(annotator: OpenAIAnnotator, *frames: int, episode: Any = EPISODE, **job: Any) -> list[str]:
    answers = annotator.label(episode, [Job(frame, **job) for frame in frames])
    return [answer.text for answer in answers]


def at_once(annotator: OpenAIAnnotator, frames: list[int], threads: int = 8) -> list[str | UserError]:
    """What each frame got when many threads ask, one job each."""

    def one(frame: int) -> str | UserError:
        try:
            return label(annotator, frame)[0]
        except UserError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, frames))


def sent_pictures(body: dict[str, Any]) -> list[np.ndarray]:
    urls = [part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url"]
    assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls]


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two pictures differ by no more than compression; those of other frames differ by 30 and more."""
    return one.shape == other.shape and bool(np.abs(one.astype(int) - other).mean() < 8)


def sent_text(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"][0]["text"]


def test_a_request_shows_the_pictures_of_its_frame_and_tells_task_time_gripper_and_complaints(
    server: Server, make: Make
) -> None:
    annotator = make(temperature=0.5, max_tokens=99, extra={"reasoning_effort": "low"})
    answers = annotator.label(EPISODE, [Job(7), Job(30, attempt=1, complaints=COMPLAINTS)])
    assert [answer.text for answer in answers] == ["<think>thought 0</think>", "<think>thought 1</think>"]
    for body, frame in zip(server.requests, (7, 30), strict=True):
        assert {name: body[name] for name in ("model", "temperature", "max_tokens", "reasoning_effort")} == {
            "model": "eyes",
            "temperature": 0.5,
            "max_tokens": 99,
            "reasoning_effort": "low",
        }
        for picture, camera in zip(sent_pictures(body), ("agentview", "wrist"), strict=True):
            assert same(picture, EPISODE.picture(camera, frame))
        assert EPISODE.instruction in sent_text(body)
        assert "$" not in sent_text(body) + body["messages"][0]["content"]
    first, second = map(sent_text, server.requests)
    assert "0.3 s of 1.9 s" in first or "0.4 s of 1.9 s" in first
    assert "told to open since the start" in first
    assert "told to close since 1.0 s" in second
    assert all(complaint in second and complaint not in first for complaint in COMPLAINTS)


@pytest.mark.parametrize("side", [32, 200])
def test_pictures_are_resized_with_their_shape_kept(server: Server, make: Make, side: int) -> None:
    label(make(picture_size=side), 0)
    assert [picture.shape for picture in sent_pictures(server.requests[0])] == 2 * [(round(side * 2 / 3), side, 3)]


def test_facts_tell_tokens_and_cost_and_a_refusal_is_an_answer(server: Server, make: Make) -> None:
    server.first(Reply(), Reply(content=None))
    annotator = make(price_in=2.0, price_out=8.0)
    plain, refused = annotator.label(EPISODE, [Job(0), Job(1)])
    assert plain.facts == {
        "cached": False,
        "served_by": "eyes-2026",
        "tokens_in": 1000,
        "tokens_out": 50,
        "cost": pytest.approx(0.0024),
        "finish_reason": "stop",
    }
    assert refused.text == "i can't help with that"
    again = make().label(EPISODE, [Job(0)])[0]
    assert again.facts == {**plain.facts, "cached": True}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_survived_by_asking_again(server: Server, make: Make, fault: str) -> None:
    server.first(FAULTS[fault])
    assert label(make(), 5) == ["<think>thought 1</think>"]
    assert len(server.requests) == 2
    assert server.requests[0] == server.requests[1]
    assert server.arrivals[1] - server.arrivals[0] >= 0.37  # it waits before it asks again


@pytest.mark.parametrize(
    ("fault", "setting"),
    [
        ("too many requests", "requests_per_minute"),
        ("overloaded", "base_url"),
        ("silence", "timeout_s"),
        ("truncated json", "base_url"),
        ("a dropped connection", "base_url"),
    ],
)
def test_a_fault_that_stays_ends_in_one_clear_error(server: Server, make: Make, fault: str, setting: str) -> None:
    server.respond = lambda number, body: FAULTS[fault]
    with pytest.raises(UserError, match=f"^annotator.{setting}: {server.url} .*run the same command again") as caught:
        label(make(max_retries=1), 5)
    assert len(server.requests) == 2
    assert "\n" not in str(caught.value)
    server.respond = lambda number, body: Reply()
    assert label(make(), 5) == ["<think>thought 2</think>"]  # the failure itself is not kept


def test_the_time_that_the_endpoint_asks_for_is_waited(server: Server, make: Make) -> None:
    server.first(Reply(429, "{}", headers={"Retry-After": "2"}))
    label(make(), 0)
    assert server.arrivals[1] - server.arrivals[0] >= 2  # by itself the client waits half a second


def test_an_endpoint_that_wants_a_long_pause_ends_the_run_at_once(server: Server, make: Make) -> None:
    server.first(Reply(429, '{"error": {"message": "quota of the day"}}', headers={"Retry-After": "3600"}))
    with pytest.raises(UserError, match="quota of the day"):
        label(make(), 0)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "setting"), [(400, "model"), (401, "api_key_env"), (403, "api_key_env"), (404, "model"), (422, "model")]
)
def test_a_refused_request_is_not_repeated_and_the_key_stays_secret(
    server: Server, make: Make, status: int, setting: str
) -> None:
    server.respond = lambda number, body: Reply(status, f'{{"error": {{"message": "no pictures for {KEY}"}}}}')
    with pytest.raises(UserError, match=f"^annotator.{setting}: .*no pictures for <key>") as caught:
        label(make(), 0)
    assert len(server.requests) == 1
    assert KEY not in str(caught.value)


def test_an_address_where_nothing_listens_is_named(make: Make) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(UserError, match=rf"^annotator.base_url: {url} gave no answer in 2 tries \(.*refused"):
            label(make(base_url=url, max_retries=1), 0)


def test_a_rerun_costs_nothing(server: Server, make: Make) -> None:
    frames = list(range(12))
    first = label(make(), *frames)
    assert label(make(concurrency=7, max_retries=5), *frames) == first
    assert at_once(make(), frames) == first
    assert len(server.requests) == len(frames)


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 0.1},
        {"model": "other"},
        {"cameras": ["wrist"]},
        {"picture_size": 48},
        {"extra": {"seed": 1}},
        {"job": {"attempt": 1}},
        {"job": {"complaints": COMPLAINTS}},
        {"job": {"episode": FakeEpisode(seed=1)}},
    ],
    ids=str,
)
def test_whatever_an_answer_depends_on_is_asked_anew(server: Server, make: Make, changed: dict[str, Any]) -> None:
    before = label(make(), 3)
    settings = {name: value for name, value in changed.items() if name != "job"}
    annotator = make()
    identity = annotator.identity
    assert label(annotator, 3) == before
    annotator = make(**settings)
    assert label(annotator, 3, **changed.get("job", {})) != before
    assert (annotator.identity != identity) == bool(settings)


def test_another_prompt_is_another_request_and_another_identity(server: Server, make: Make, tmp_path: Path) -> None:
    prompt = tmp_path / "mine.md"
    prompt.write_text("# frame\nwhat does the robot think to $instruction?\n# again\n$complaints\n")
    annotators = [make(), make(prompt=str(prompt))]
    assert annotators[0].identity["prompt"] != annotators[1].identity["prompt"]
    label(annotators[1], 0)
    assert [message["role"] for message in server.requests[0]["messages"]] == ["user"]
    assert sent_text(server.requests[0]) == "what does the robot think to put the bowl on the plate?"


def test_threads_that_want_the_same_answer_pay_it_once(server: Server, make: Make) -> None:
    server.respond = lambda number, body: Reply(silence_s=0.2)
    assert set(at_once(make(), 8 * [4])) == {"<think>thought 0</think>"}
    assert len(server.requests) == 1


def test_requests_run_at_the_same_time(server: Server, make: Make) -> None:
    all_there = threading.Barrier(8, timeout=60)

    def respond(number: int, body: dict[str, Any]) -> Reply:
        all_there.wait()
        return Reply()

    server.respond = respond
    assert len(set(at_once(make(), list(range(8))))) == 8


CHILD = """
import os, signal, sys
from concurrent.futures import ThreadPoolExecutor
sys.path.insert(0, {folder!r})
from openai_server import FakeEpisode
from dtvla.cot.annotator import Job
from dtvla.cot.openai_annotator import OpenAIAnnotator
annotator = OpenAIAnnotator(model="eyes", base_url={url!r}, api_key_env="THE_KEY", cache_dir={cache!r},
                            cameras=["agentview", "wrist"], max_retries=2, timeout_s=1)
episode = FakeEpisode()
def one(frame):
    text = annotator.label(episode, [Job(frame)])[0].text
    os.write(1, f"{{frame}} {{text}}\\n".encode())
    if frame == {last}:
        os.kill(os.getpid(), signal.SIGKILL)
with ThreadPoolExecutor(4) as pool:
    list(pool.map(one, range(len(episode))))
"""


@pytest.mark.parametrize("last", [0, 9, 23])
def test_no_answer_is_paid_twice_after_kill_minus_9(server: Server, make: Make, tmp_path: Path, last: int) -> None:
    """The process dies right after an answer came, before any journal of the caller can know of it."""
    server.respond = lambda number, body: Reply(silence_s=0.02 * (number % 3))
    folder, cache = str(Path(__file__).parent), str(tmp_path / "answers")
    code = CHILD.format(folder=folder, url=server.url, cache=cache, last=last)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL, done.stderr
    handed_on = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    before = len(server.requests)
    texts = label(make(), *range(40))
    assert str(last) in handed_on
    assert {frame: texts[int(frame)] for frame in handed_on} == handed_on
    lost = before + len(server.requests[before:]) - 40
    assert 0 <= lost <= 3  # those under way in the three other threads when it died
    assert before >= len(handed_on)


def test_spending_stops_before_the_limit_and_goes_on_when_it_is_raised(server: Server, make: Make) -> None:
    """1000 tokens at 2 and 50 at 8 a million make 0.0024 an answer."""
    server.respond = lambda number, body: Reply(silence_s=0.05)
    prices = {"price_in": 2.0, "price_out": 8.0}
    results = at_once(make(max_cost=0.0121, **prices), list(range(20)))
    errors = [result for result in results if isinstance(result, UserError)]
    assert len(server.paid) == 5 == 20 - len(errors)
    assert all(str(error).startswith("annotator.max_cost: 0.0120 of 0.0121 is spent") for error in errors)
    again = at_once(make(max_cost=0.0121, **prices), list(range(20)))
    assert [text for text in again if isinstance(text, str)] == [text for text in results if isinstance(text, str)]
    assert len(server.paid) == 5  # what earlier runs have spent counts
    more = at_once(make(max_cost=0.1, **prices), list(range(20)))
    assert all(isinstance(text, str) for text in more)
    assert len(server.requests) == 20


def test_costs_that_the_endpoint_hides_cannot_be_limited(server: Server, make: Make) -> None:
    server.respond = lambda number, body: Reply(usage=False)
    annotator = make(max_cost=1, price_in=2, price_out=8)
    assert label(annotator, 0) == ["<think>thought 0</think>"]  # it is paid for
    with pytest.raises(UserError, match="^annotator.max_cost: .* does not say how many tokens"):
        label(annotator, 1)
    assert label(make(), 0, 1) == ["<think>thought 0</think>", "<think>thought 1</think>"]


def test_a_request_that_a_filter_for_contents_refuses_is_an_empty_answer(server: Server, make: Make) -> None:
    server.first(Reply(400, '{"error": {"code": "content_filter", "message": "the picture offends"}}'))
    assert label(make(), 0, 1) == ["", "<think>thought 1</think>"]


def test_when_it_is_stopped_what_waits_for_its_turn_is_never_sent_and_what_was_sent_is_kept(
    server: Server, make: Make
) -> None:
    annotator = make(requests_per_minute=6)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(label, annotator, frame) for frame in range(4)]
        assert next(as_completed(futures)).result() == ["<think>thought 0</think>"]
        annotator.stop()
    assert sum(isinstance(future.exception(), Stopped) for future in futures) == 3
    assert len(server.requests) == 1


def test_requests_keep_their_pace_whatever_thread_they_come_from(server: Server, make: Make) -> None:
    at_once(make(requests_per_minute=300), list(range(6)))
    assert np.ptp(server.arrivals) >= 0.8  # five times 0.2 s, less what a busy machine delays the first


def test_repetitions_keep_the_pace_too(server: Server, make: Make) -> None:
    server.first(Reply(500, "{}"))
    label(make(requests_per_minute=40), 0)
    assert server.arrivals[1] - server.arrivals[0] >= 1.45  # the client itself would wait half a second


def test_an_endpoint_without_a_key_is_sent_none_of_ours(server: Server, make: Make) -> None:
    with pytest.raises(UserError, match="^annotator.api_key_env: .* refuses the key"):
        label(make(api_key_env=None), 0)


def test_frames_of_a_real_dataset_are_labelled(server: Server, make: Make, tmp_path: Path) -> None:
    from training_data import write_demonstrations

    from dtvla.cot.episodes import AnnotatedFrames

    episode = AnnotatedFrames(write_demonstrations(tmp_path / "data", episodes=2))[1]
    annotator, frames = make(), range(0, 24, 5)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda frame: label(annotator, frame, episode=episode), frames))
    for frame in frames:
        (body,) = (body for body in server.requests if f"frame {frame + 1} of 24" in sent_text(body))
        for picture, camera in zip(sent_pictures(body), ("agentview", "wrist"), strict=True):
            assert same(picture, episode.picture(camera, frame))
