"""Thoughts from any endpoint that speaks OpenAI's chat completions and sees pictures."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dtvla.cot.annotator import Annotator, Answer, Job
from dtvla.cot.answer_cache import AnswerCache
from dtvla.cot.endpoint import Endpoint
from dtvla.cot.limits import Budget, Pace, Prices
from dtvla.cot.prompts import Prompt, fitted
from dtvla.errors import UserError

if TYPE_CHECKING:
    from dtvla.cot.episodes import EpisodeView

JPEG_QUALITY = 90


class OpenAIAnnotator(Annotator):
    """Asks an endpoint for each frame, with its pictures; answers are kept in a folder and never paid twice."""

    def __init__(
        self,
        *,
        model: str,
        base_url: str,
        cache_dir: Path | str,
        cameras: Sequence[str],
        api_key_env: str | None = "OPENAI_API_KEY",
        prompt: str = "thought",
        picture_size: int | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        extra: Mapping[str, Any] | None = None,
        concurrency: int = 4,
        requests_per_minute: float | None = None,
        timeout_s: float = 120.0,
        max_retries: int = 8,
        price_in: float | None = None,
        price_out: float | None = None,
        max_cost: float | None = None,
    ) -> None:
        """Prepare to ask; nothing is sent yet. ``conf/annotator/openai.yaml`` says what the settings mean.

        Raises:
            UserError: a setting is no good, the key is missing, or the folder of answers can't be used.
        """
        _check_number("concurrency", concurrency, least=1, whole=True)
        _check_number("max_retries", max_retries, least=0, whole=True)
        _check_number("timeout_s", timeout_s)
        _check_number("picture_size", picture_size, least=1, whole=True, optional=True)
        _check_number("max_tokens", max_tokens, least=1, whole=True, optional=True)
        _check_number("requests_per_minute", requests_per_minute, optional=True)
        _check_number("max_cost", max_cost, optional=True)
        if not cameras:
            raise UserError("annotator.cameras: there is none; name at least one camera of the dataset")
        self._prices = Prices(price_in, price_out)
        if max_cost is not None and not self._prices.cost(1, 1):
            raise UserError("annotator.max_cost: there are no prices to count with; set price_in and price_out")
        self._prompt, self._cameras, self._picture_size = Prompt.load(prompt), tuple(cameras), picture_size
        if own := sorted({"model", "messages", "stream", "n"} & set(extra or {})):
            raise UserError(f"annotator.extra: {', '.join(own)} can't be set there; leave it out")
        fields = {"temperature": temperature, "max_tokens": max_tokens, **(extra or {})}
        self._fields = {name: value for name, value in fields.items() if value is not None}
        self._model, self._base_url, self.calls = model, base_url, concurrency
        self._pace = Pace(requests_per_minute)
        self._endpoint = Endpoint(
            base_url, api_key_env, pace=self._pace.wait, timeout_s=timeout_s, max_retries=max_retries
        )
        self._cache = AnswerCache(cache_dir)
        self._budget = Budget(max_cost, *self._cache.costs)
        self.identity = {
            "annotator": "openai",
            "model": model,
            "prompt": self._prompt.digest,
            "base_url": base_url,
            "cameras": list(cameras),
            "picture_size": picture_size,
            "request": self._fields,
        }

    def label(self, episode: EpisodeView, jobs: Sequence[Job]) -> list[Answer]:
        """One answer for each job, in order; ``facts`` hold tokens, cost and whether it was cached.

        Raises:
            UserError: the endpoint fails or refuses, money is up, or pictures can't be read.
        """
        return [self._answer(episode, job) for job in jobs]

    def stop(self) -> None:
        """Send nothing more."""
        self._pace.stop()

    def close(self) -> None:
        """Close connections and the folder of answers."""
        self._endpoint.close()
        self._cache.close()

    def _answer(self, episode: EpisodeView, job: Job) -> Answer:
        body = {"model": self._model, "messages": self._messages(episode, job), **self._fields}
        sent = json.dumps([self._base_url, body, job.attempt], sort_keys=True)
        return self._cache.answer(hashlib.sha256(sent.encode()).hexdigest(), lambda: self._ask(body))

    def _ask(self, body: Mapping[str, Any]) -> Answer:
        with self._budget.request() as pay:
            completion = self._endpoint.complete(body)
            if completion is None:
                pay(0.0)
                return Answer("", {"cached": False, "cost": 0.0, "finish_reason": "content_filter"})
            choice = completion.choices[0]
            tokens = [getattr(completion.usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
            cost = self._prices.cost(*tokens)
            pay(cost)
        facts = {
            "cached": False,
            "served_by": completion.model,
            "tokens_in": tokens[0],
            "tokens_out": tokens[1],
            "cost": cost,
            "finish_reason": choice.finish_reason,
        }
        # A refusal comes without content; as an answer without tags it does not pass the checks.
        return Answer(choice.message.content or choice.message.refusal or "", facts)

    def _messages(self, episode: EpisodeView, job: Job) -> list[dict[str, Any]]:
        system, text = self._prompt.messages(episode, job, self._cameras)
        urls = [_data_url(episode.picture(camera, job.frame), self._picture_size) for camera in self._cameras]
        pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        user = {"role": "user", "content": [{"type": "text", "text": text}, *pictures]}
        return [user] if system is None else [{"role": "system", "content": system}, user]


def _data_url(picture_HWC: np.ndarray, longest_side: int | None) -> str:
    """A JPEG inside an address."""
    file = io.BytesIO()
    fitted(picture_HWC, longest_side).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _check_number(
    name: str, value: Any, *, least: float | None = None, whole: bool = False, optional: bool = False
) -> None:
    """Refuse what is no number, and one below ``least`` (without it: one that is not above zero)."""
    if value is None and optional:
        return
    fits = isinstance(value, int if whole else int | float) and (0 < value < inf if least is None else value >= least)
    if not fits:
        kind = "a whole number" if whole else "a number"
        bound = "above 0" if least is None else f"of at least {least:g}"
        raise UserError(f"annotator.{name}: found {value!r}; give {kind} {bound}{' or null' if optional else ''}")
