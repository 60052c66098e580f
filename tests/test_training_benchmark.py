"""The training study: both sides learn alike, and its numbers follow from one another."""

import json
from pathlib import Path
from typing import Any

import pytest
from policy.conftest import SETTINGS

from dtvla.benchmarks.record import run, settings_of
from dtvla.benchmarks.training import Settings
from dtvla.errors import UserError

MODEL: dict[str, Any] = SETTINGS | {"name": "tiny"}
VALUES: dict[str, Any] = {"model": MODEL, "device": "cpu", "threads": 1, "compile": False, "thought_lengths": [4, 12]}
VALUES |= {"micro_batch": 3, "passes": 2}


@pytest.mark.slow
def test_both_sides_learn_alike_and_every_number_follows_from_the_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run("training", settings_of("training", VALUES | {"repeats": 3, "warmup": 1}), tmp_path)
    document = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert path.name == "training-tiny-cpu-float32.json"
    found = document["agreement"]
    assert found["our_loss"] == pytest.approx(found["plain_loss"], rel=1e-6)
    assert 0 < found["gradients_apart"] < 1e-5
    rates = {}
    for record in document["measurements"]:
        seconds = record["phases"]["total"]["seconds"]
        rates[record["side"]] = record["samples_per_s"]
        assert record["samples_per_s"] == pytest.approx(6 / sorted(seconds)[1])
        assert record["tokens_per_s"] < record["samples_per_s"] * max(document["shapes"]["row_tokens"]["plain"])
        assert record["activation_bytes"] > 0
        assert set(record["phases"]) == {"passes", "update", "total"}
    assert document["ratios"]["samples/s: ours / plain"]["value"] == pytest.approx(rates["ours"] / rates["plain"])
    assert [target["at_least"] for target in document["targets"][:1]] == [1.3]
    shown = capsys.readouterr().out
    assert "samples/s: ours / plain" in shown
    assert "apart" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch": 0}, "micro_batch: 0 is not a whole number from 1 on"),
        ({"passes": 0}, "passes: 0 is not a whole number from 1 on"),
        ({"warmup": 0}, "warmup: 0 is not a whole number from 1 on"),
        ({"thought_lengths": (9, 4)}, "thought_lengths: .9, 4.; give the shortest and the longest"),
        ({"dtype": "int4"}, "dtype: 'int4' is unknown"),
        ({"checkpoint": "/some/policy"}, "training: measures fresh weights"),
    ],
)
def test_a_wrong_setting_is_one_clear_message(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings(**{"model": MODEL, **change})
