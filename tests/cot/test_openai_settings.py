"""Protects the settings of the annotator for endpoints: what is no good is named before anything is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from openai_server import KEY

from dtvla.cli import config_dir
from dtvla.cot.openai_annotator import OpenAIAnnotator
from dtvla.errors import UserError

ENOUGH: dict[str, Any] = {
    "model": "eyes",
    "base_url": "http://127.0.0.1:9/v1",
    "api_key_env": "THE_KEY",
    "cameras": ["wrist"],
}


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.setenv("BROKEN_KEY", "sk-\u00fcber")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_key_env": "NO_SUCH_KEY"}, "annotator.api_key_env: the environment variable NO_SUCH_KEY is not set"),
        ({"api_key_env": "BROKEN_KEY"}, "annotator.api_key_env: the value of BROKEN_KEY is no key"),
        ({"base_url": "localhost:8000"}, "annotator.base_url: 'localhost:8000' is no address"),
        ({"base_url": "https://me:secret@host/v1"}, "annotator.base_url: there is a name or a password in it"),
        ({"cameras": []}, "annotator.cameras: there is none"),
        ({"concurrency": 0}, "annotator.concurrency: found 0; give a whole number of at least 1"),
        ({"concurrency": None}, "annotator.concurrency: found None"),
        ({"max_retries": -1}, "annotator.max_retries: found -1"),
        ({"timeout_s": 0}, "annotator.timeout_s: found 0; give a number above 0"),
        ({"requests_per_minute": "many"}, "annotator.requests_per_minute: found 'many'; give a number above 0 or null"),
        ({"picture_size": 0.5}, "annotator.picture_size: found 0.5; give a whole number of at least 1 or null"),
        ({"price_in": 1.0}, "annotator.price_in: found price_in=1.0 and price_out=None; give both"),
        ({"timeout_s": float("inf")}, "annotator.timeout_s: found inf"),
        ({"extra": {"model": "other"}}, "annotator.extra: model can't be set there"),
        ({"price_in": float("nan"), "price_out": 1}, "annotator.price_in: found price_in=nan"),
        ({"price_in": -1, "price_out": 1}, "annotator.price_in: found price_in=-1"),
        ({"max_cost": 1.0}, "annotator.max_cost: there are no prices to count with"),
        ({"prompt": "no_such"}, "annotator.prompt: there is no 'no_such'; there are thought"),
        ({"prompt": "nowhere/mine.md"}, "annotator.prompt: nowhere/mine.md can't be read"),
    ],
    ids=str,
)
def test_bad_settings_are_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        OpenAIAnnotator(**(ENOUGH | settings), cache_dir=tmp_path)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("what does it think?", "has the sections []"),
        ("# frame\n$instruction", "has the sections ['frame']"),
        ("# frame\na\n# again\nb\n# again\nc", "has the sections ['frame', 'again', 'again']"),
        ("# frame\n$goal\n# again\nb", "unknown placeholder $goal in section frame"),
        ("# frame\n5 $ more\n# again\nb", "section frame has a stray dollar sign"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_is_sent(tmp_path: Path, text: str, message: str) -> None:
    prompt = tmp_path / "bad.md"
    prompt.write_text(text)
    with pytest.raises(UserError, match="^annotator.prompt: ") as caught:
        OpenAIAnnotator(**(ENOUGH | {"prompt": str(prompt)}), cache_dir=tmp_path)
    assert message in str(caught.value)


def test_a_folder_of_answers_belongs_to_one_run_at_a_time(tmp_path: Path) -> None:
    first = OpenAIAnnotator(**ENOUGH, cache_dir=tmp_path)
    with pytest.raises(UserError, match="^annotator.cache_dir: .*locked.*wait for the other run"):
        OpenAIAnnotator(**ENOUGH, cache_dir=tmp_path)
    first.close()
    OpenAIAnnotator(**ENOUGH, cache_dir=tmp_path).close()


@pytest.mark.parametrize("content", [np.random.default_rng(0).bytes(5000), None], ids=["damaged", "a file"])
def test_a_folder_of_answers_that_is_none_is_named(tmp_path: Path, content: bytes | None) -> None:
    folder = tmp_path / "answers"
    if content is None:
        folder.touch()
    else:
        folder.mkdir()
        (folder / "answers.sqlite").write_bytes(content)
    with pytest.raises(UserError, match="^annotator.cache_dir: .* can't be used"):
        OpenAIAnnotator(**ENOUGH, cache_dir=folder)


def test_the_shipped_configuration_makes_an_annotator(tmp_path: Path) -> None:
    own = {"model": "eyes", "api_key_env": "THE_KEY", "extra": {"seed": 1}, "cameras": ["wrist"]}
    shipped = OmegaConf.merge(OmegaConf.load(config_dir() / "annotator/openai.yaml"), own)
    cfg = OmegaConf.create({"output": str(tmp_path / "out"), "annotator": shipped})
    annotator = instantiate(cfg.annotator)
    assert (annotator.calls, annotator.jobs_per_call) == (4, 1)
    assert annotator.identity["request"] == {"seed": 1}
    assert (tmp_path / "out.answers/answers.sqlite").is_file()
    annotator.close()
