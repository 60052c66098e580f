"""A real HTTP server that speaks chat completions, with faults on demand, and an episode to ask it about."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

KEY = "sk-the-tests-own-key"
TOKENS_IN, TOKENS_OUT = 1000, 50


@dataclass(frozen=True)
class Reply:
    """What the server does with a request.

    Attributes:
        status, body, headers: of the answer; a body of None is a completion.
        kind: of the body.
        silence_s: before the answer.
        cut: close the connection after so many bytes of the body; with 0 before anything is sent.
        usage: whether a completion says how many tokens it took.
        content: of a completion; None for a refusal.
    """

    status: int = 200
    body: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "application/json"
    silence_s: float = 0.0
    cut: int | None = None
    usage: bool = True
    content: str | None = "<think>thought {number}</think>"


@dataclass
class Server:
    """What came in and what went out.

    Attributes:
        url: to give as ``base_url``.
        respond: chooses the reply to a request from its number, from 0, and its body.
        requests, arrivals: bodies and times of all requests.
        paid: bodies of the requests that got a whole completion.
    """

    url: str
    respond: Callable[[int, dict[str, Any]], Reply] = lambda number, body: Reply()
    requests: list[dict[str, Any]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    paid: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def first(self, *replies: Reply) -> None:
        """Give these replies first and completions from then on."""
        self.respond = lambda number, body: replies[number] if number < len(replies) else Reply()


@contextmanager
def serving() -> Iterator[Server]:
    """A server on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                number = len(server.requests)
                server.requests.append(body)
                server.arrivals.append(time.monotonic())
            if self.path != "/v1/chat/completions" or self.headers["Authorization"] != f"Bearer {KEY}":
                self._send(Reply(404 if self.path != "/v1/chat/completions" else 401, "{}"), "{}")
                return
            reply = server.respond(number, body)
            time.sleep(reply.silence_s)
            text = completion(reply, number) if reply.body is None else reply.body
            if self._send(reply, text) and reply.status == 200 and reply.body is None:
                with server.lock:
                    server.paid.append(body)

        def _send(self, reply: Reply, text: str) -> bool:
            """Whether it went out whole."""
            self.close_connection = True
            if reply.cut == 0:
                return False
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Type": reply.kind, "Connection": "close"}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            try:
                self.end_headers()
                self.wfile.write(text.encode()[: reply.cut])
            except OSError:
                return False
            return reply.cut is None

        def log_message(self, *arguments: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = Server(f"http://127.0.0.1:{http.server_address[1]}/v1")
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def completion(reply: Reply, number: int) -> str:
    """A chat completion as the protocol has it."""
    content = reply.content and reply.content.format(number=number)
    refusal = None if content else "i can't help with that"
    message = {"role": "assistant", "content": content, "refusal": refusal}
    usage = {"prompt_tokens": TOKENS_IN, "completion_tokens": TOKENS_OUT, "total_tokens": TOKENS_IN + TOKENS_OUT}
    return json.dumps(
        {
            "id": f"chatcmpl-{number}",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": "eyes-2026",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
            **({"usage": usage} if reply.usage else {}),
        }
    )


class FakeEpisode:
    """As much of an episode as an annotator of pictures looks at: random pictures, a gripper that closes half way."""

    number, fps, instruction = 3, 20.0, "put the bowl on the plate"

    def __init__(self, frames: int = 40, seed: int = 0) -> None:
        self.seed = seed
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 256, (2, frames, 4, 6, 3), dtype=np.uint8)
        self.pictures = dict(zip(("agentview", "wrist"), coarse.repeat(16, 2).repeat(16, 3), strict=True))
        self.closing_F = np.arange(frames) >= frames // 2

    def __repr__(self) -> str:  # the name of a test, the same in every process
        return f"FakeEpisode(seed={self.seed})"

    def __len__(self) -> int:
        return len(self.closing_F)

    def picture(self, camera: str, frame: int) -> np.ndarray:
        return self.pictures[camera][frame]
