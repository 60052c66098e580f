"""An endpoint that speaks OpenAI's chat completions: patient where patience helps, clear where it does not."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dtvla.errors import UserError

if TYPE_CHECKING:
    import httpx2
    from openai import APIError
    from openai.types.chat import ChatCompletion

CONNECT_S = 10.0  # a host that does not take the connection by then is not there
FILTERED = ("content_filter", "content_policy_violation")  # codes of the usual services
LONGEST_REASON = 300  # characters of what an endpoint says about an error


class Endpoint:
    """Sends requests, from any thread.

    The client repeats what failed by itself: after 408, 409, 429, 5xx, time-outs and dropped connections, with
    exponential back-off and jitter or after the time of ``Retry-After``, which it follows up to two minutes. Hooks add
    what it lacks: repetitions keep the pace, too, and an answer that is no chat completion is asked for again.
    """

    def __init__(
        self, base_url: str, api_key_env: str | None, *, pace: Callable[[], None], timeout_s: float, max_retries: int
    ) -> None:
        """Prepare to send; nothing is sent yet.

        Args:
            base_url: such as ``https://host/v1``.
            api_key_env: environment variable with the key; None where none is needed.
            pace: returns when the next request may go out.
            timeout_s: longest silence.
            max_retries: repetitions of one request.

        Raises:
            UserError: the address is none, or the key is missing.
        """
        from openai import DefaultHttpxClient, OpenAI, Timeout

        self._url, self._key_name, self._timeout_s, self._tries = base_url, api_key_env, timeout_s, max_retries + 1
        _check_url(base_url)
        self._key = "none" if api_key_env is None else _key(api_key_env)
        self._client = OpenAI(
            api_key=self._key,
            base_url=base_url,
            timeout=Timeout(timeout_s, connect=min(timeout_s, CONNECT_S)),
            max_retries=max_retries,
            http_client=DefaultHttpxClient(
                event_hooks={"request": [lambda _: pace()], "response": [_refuse_what_is_no_completion]}
            ),
        )

    def complete(self, body: Mapping[str, Any]) -> ChatCompletion | None:
        """The completion of a request with ``model``, ``messages`` and any other fields; it has at least one choice.

        None is the answer of a service whose filter for contents takes offence at this one request.

        Raises:
            UserError: the endpoint refuses the request, or fails however often it is asked.
        """
        from openai import APIError

        others = {name: value for name, value in body.items() if name not in ("model", "messages")}
        try:
            return self._client.chat.completions.create(
                model=body["model"], messages=body["messages"], extra_body=others
            )
        except APIError as error:
            if error.code in FILTERED:
                return None
            raise UserError(self._explain(error)) from None

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _explain(self, error: APIError) -> str:
        import openai

        again = "what is answered is kept: run the same command again later"
        match error:
            case openai.APITimeoutError():
                setting, found = "timeout_s", f"was silent for {self._timeout_s:g} s, {self._tries} times"
            case openai.APIConnectionError():
                setting, found = "base_url", f"gave no answer in {self._tries} tries"
                again = f"check the address; {again}"
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                setting, found, again = "api_key_env", f"refuses the key of {self._key_name}", "set another key"
            case openai.NotFoundError():
                setting, found, again = "model", "does not know it, or base_url lacks its /v1", "correct one of them"
            case openai.RateLimitError():
                setting, found = "requests_per_minute", "wants no more requests for now"
                again = f"lower it; {again}"
            case openai.InternalServerError():
                setting, found = "base_url", f"failed in {self._tries} tries"
            case _:
                setting, found, again = "model", "refuses the request", "change what the reason names"
        reason = " ".join(str(error.__cause__ or error).split())
        if self._key_name is not None:
            reason = reason.replace(self._key, "<key>")
        return f"annotator.{setting}: {self._url} {found} ({reason[:LONGEST_REASON]}); {again}"


def _refuse_what_is_no_completion(response: httpx2.Response) -> None:
    """Raise what the client takes for a failed transfer, so that it asks again."""
    import httpx2

    if not response.is_success:
        return
    content = response.read()
    try:
        text = response.json()["choices"][0]["message"].get("content")
        whole = text is None or isinstance(text, str)
    except (ValueError, LookupError, TypeError, AttributeError):
        whole = False
    if not whole:
        start = content[:100].decode(errors="replace")
        raise httpx2.DecodingError(f"this is no whole chat completion: {start}", request=response.request)


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"annotator.base_url: {url!r} is no address; write it like https://host/v1")
    if parts.username or parts.password:
        raise UserError("annotator.base_url: there is a name or a password in it; put a key into annotator.api_key_env")


def _key(name: str) -> str:
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(
            f"annotator.api_key_env: the environment variable {name} is not set; put the endpoint's key into it, "
            "or set api_key_env to null if there is none"
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(f"annotator.api_key_env: the value of {name} is no key: it has characters that can't be sent")
    return key
