"""The rollout study: both sides really run, come to the same end, and every number can be recomputed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dtvla.benchmarks.processes import cpu_seconds, held_to, in_child, memory, usable_cores
from dtvla.benchmarks.record import run, settings_of
from dtvla.benchmarks.sides import PLAIN, PLAIN_NONE
from dtvla.errors import UserError

ENV: dict[str, Any] = {
    "suite": "libero_object",
    "task_ids": [3],
    "protocol": "published",
    "max_steps": 12,
    "render": "full",
    "image_size": 64,
    "settle_steps": 1,
    "stepping": "exact",
}
VALUES: dict[str, Any] = {
    "env": ENV,
    "init_state": 2,
    "chunk": 5,
    "episodes": 1,
    "renders": ["none"],
    "steppings": ["exact"],
    "workers": [1],
    "growth_episodes": 0,
    "model": "of another study",
}


@pytest.mark.sim
@pytest.mark.slow
def test_a_short_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run("rollout", settings_of("rollout", VALUES), tmp_path, "the command")
    shown = capsys.readouterr().out
    document = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert path.name == "rollout-libero_object.json"
    assert document["replay"] == {"source": "expert", "steps": 12, "success": False}
    assert document["provenance"]["command"] == "the command"
    measured = {m["side"]: m for m in document["measurements"]}
    assert list(measured) == [PLAIN, PLAIN_NONE, "none, exact"]
    assert all(same["as_plain"] for same in document["agreement"].values())
    for found in measured.values():
        assert [e["steps"] for e in found["episodes"]] == [12]
        rates = [12 / e["seconds"] for e in found["episodes"]]
        assert found["steps_per_s"] == found["steps_per_s_per_core"] == pytest.approx(rates[0])
        hours = [(e["reset_s"] + e["seconds"]) / 3600 for e in found["episodes"]]
        assert found["episodes_per_hour"] == pytest.approx(1 / hours[0])
        assert all(0 < e["cpu_s"] < e["seconds"] + 0.1 for e in found["episodes"]), "one core each"
    rates_of = {side: found["steps_per_s"] for side, found in measured.items()}
    ratio = document["ratios"]["none, exact, 1 workers: steps/s / plain"]["value"]
    assert ratio == pytest.approx(rates_of["none, exact"] / rates_of[PLAIN_NONE])
    assert rates_of[PLAIN] < rates_of[PLAIN_NONE]
    assert document["memory_stages"]["model_mib"]["textures"] > 50
    for words in (PLAIN_NONE, "none, exact", "first pictures", str(path)):
        assert words in shown


def test_processes_are_measured_from_outside() -> None:
    before = os.sched_getaffinity(0)
    core = usable_cores()[-1]
    with held_to([core]):
        assert in_child(usable_cores) == [core]
    assert os.sched_getaffinity(0) == before
    found = memory(os.getpid())
    parts = found["heap"] + found["anonymous"] + found["files"] + found["shared"]
    assert 0 < found["pss"] == pytest.approx(parts, abs=0.3)
    assert found["pss"] <= found["rss"]
    spent = cpu_seconds([os.getpid()])
    assert sum(range(10**7)) > 0
    assert cpu_seconds([os.getpid()]) > spent


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "^chunk: 0 is not a whole number from 1 on"),
        ({"episodes": "2"}, "^episodes: '2' is not a whole number from 1 on"),
        ({"growth_episodes": -1}, "^growth_episodes: -1 is not a whole number from 0 on"),
        ({"workers": [1, 4096]}, "^workers: 4096; give 1 to "),
        ({"renders": []}, "^renders: is empty"),
    ],
)
def test_a_wrong_setting_is_one_clear_message(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings_of("rollout", VALUES | change)
