"""The review page's server: a few JSON questions, the pictures, and the page itself, which needs nothing else."""

from __future__ import annotations

import hashlib
import secrets
import socket
import sys
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, abort, jsonify, redirect, request
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from dtvla.cot.review.decisions import ACCEPT, EDIT, REJECT
from dtvla.cot.review.session import Outdated, Refused
from dtvla.errors import UserError

if TYPE_CHECKING:
    from werkzeug.wrappers import Response as AnyResponse

    from dtvla.cot.review.session import Review

LOCAL_HOSTS = ["127.0.0.1", "localhost"]
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def create_app(review: Review, key: str | None = None) -> Flask:
    """The review as a WSGI application.

    Other web pages that are open in the same browser can't decide anything: decisions must come as JSON, which
    browsers don't send across origins without leave.

    Args:
        review: what is reviewed.
        key: that the address must carry once, for a server that others can reach; None: this machine's own names are
            the only ones that it answers to.
    """
    app = Flask(__name__, static_folder="page", static_url_path="/page")
    if key is None:
        app.config["TRUSTED_HOSTS"] = LOCAL_HOSTS
    else:
        app.before_request(lambda: _admit(key))
    app.after_request(_with_headers)
    app.register_error_handler(KeyError, lambda error: (jsonify(reasons=["there is no such frame"]), 404))
    app.register_error_handler(Refused, lambda error: (jsonify(reasons=error.reasons), 422))
    app.register_error_handler(Outdated, lambda error: (jsonify(reasons=error.reasons), 409))
    app.register_error_handler(UserError, _said)
    _add_page(app, review)
    _add_decisions(app, review)
    return app


def _said(error: UserError) -> tuple[Response, int]:
    """Tell the terminal, too: a page says no more than that a picture is missing."""
    print(f"error: {error}", file=sys.stderr)
    return jsonify(reasons=[str(error)]), 500


def _add_page(app: Flask, review: Review) -> None:
    """What the page shows."""

    @app.get("/")
    def index() -> Response:
        return app.send_static_file("index.html")

    @app.get("/api/frames")
    def frames() -> Response:
        return jsonify(review.overview())

    @app.get("/api/frames/<int:episode>/<int:frame>")
    def frame(episode: int, frame: int) -> Response:
        return jsonify(review.shown((episode, frame)))

    @app.get("/api/episodes/<int:episode>")
    def facts(episode: int) -> Response:
        return jsonify(review.facts(episode))

    @app.get("/pictures/<digest>/<int:episode>/<int:frame>/<camera>.jpg")
    def picture(digest: str, episode: int, frame: int, camera: str) -> Response:
        found = review.material.picture(camera, episode, frame) if digest == review.material.digest else None
        if found is None:
            abort(404)
        # The address names the dataset's content: what it shows never changes.
        return Response(found, mimetype="image/jpeg", headers={"Cache-Control": "private, max-age=86400, immutable"})


def _add_decisions(app: Flask, review: Review) -> None:
    """What the page decides."""

    @app.post("/api/decisions")
    def decide() -> Response:
        told: dict[str, Any] = request.get_json()
        texts = dict.fromkeys(("decision", "thought", "before", "decided", "page"), str)
        kinds = {"episode": int, "frame": int, **texts}
        if not isinstance(told, dict) or any(type(told.get(name)) is not kind for name, kind in kinds.items()):
            abort(400)
        if told["decision"] not in (ACCEPT, EDIT, REJECT):
            abort(400)
        key = told["episode"], told["frame"]
        review.decide(key, **{name: told[name] for name in texts})
        return jsonify(state=review.state(key))

    @app.post("/api/undo")
    def undo() -> Response:
        told = request.get_json()
        if not isinstance(told, dict) or not isinstance(told.get("page"), str):
            abort(400)
        episode, frame = key = review.undo(told["page"])
        return jsonify(episode=episode, frame=frame, state=review.state(key))


def _admit(key: str) -> AnyResponse | None:
    """Let in who knows the key: from the address at first, from a cookie afterwards.

    Browsers send cookies to all ports of a host, so each server's has a name of its own.
    """
    cookie = f"dtvla_review_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    if secrets.compare_digest(request.args.get("key", "").encode(), key.encode()):
        answer = redirect("/")
        answer.set_cookie(cookie, key, httponly=True, samesite="Strict")
        return answer
    if not secrets.compare_digest(request.cookies.get(cookie, "").encode(), key.encode()):
        answer = jsonify(reasons=["open the address that dtvla review printed last, with its key"])
        answer.status_code = 403
        return answer
    return None


def _with_headers(response: Response) -> Response:
    response.headers.extend(HEADERS)
    return response


class _QuietHandler(WSGIRequestHandler):
    """Logs errors, not requests."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing."""


def make_review_server(app: Flask, host: str, port: int) -> BaseWSGIServer:
    """Bind an address; ``serve_forever`` of the result answers, each request in a thread of its own.

    Args:
        app: the application.
        host: name or address of this machine's end.
        port: number; 0 for one that is free, to be read from the result's ``port``.

    Raises:
        UserError: the port is taken, or the host is not this machine.
    """
    try:
        listener = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no such port"
        raise UserError(
            f"host, port: {host}:{port} can't be used ({reason}); choose another port=NUMBER, or 0, and an IPv4 "
            "host of this machine"
        ) from None
    with listener:  # the server keeps a copy
        number = listener.getsockname()[1]
        return make_server(host, number, app, threaded=True, request_handler=_QuietHandler, fd=listener.fileno())
