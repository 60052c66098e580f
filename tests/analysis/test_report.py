"""The report: built from a run's real artefacts, complete, with working links; bad folders are named."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from dtvla.analysis.curves import draw_curves, read_metrics, smooth
from dtvla.analysis.report import load_evaluations, write_report
from dtvla.analysis.strip import choose_decisions
from dtvla.analysis.tables import duration, markdown_table
from dtvla.errors import UserError
from dtvla.rollout.journal import begin_run
from dtvla.rollout.results import EpisodeResult, Results, Thought, machine, versions, write_results
from dtvla.sim.film import Caption, Film

RATES = {"think": 0.9, "mask": 0.7, "random": 0.2}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run, its dataset and its evaluations, small, in the files that the commands write."""
    root = tmp_path_factory.mktemp("project")
    rng = np.random.default_rng(0)
    run = root / "runs" / "nano"
    run.mkdir(parents=True)
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["step", "train/loss", "train/action_l1", "train/action_accuracy", "val/loss", "rollout/success"]
        )
        for step in range(1, 60):
            last = [3 / step, 0.5] if step % 20 == 0 else ["", ""]
            writer.writerow([step, 3 / step + 0.1 * rng.random(), 0.3 / step, 1 - 1 / step, *last])
    (run / "result.json").write_text(
        json.dumps({"seconds_since_last_start": 372.0, "steps": 59, "command": "python -m dtvla.train name=nano"})
    )
    (run / "config.yaml").write_text(f"data:\n  root: {root / 'data'}\n")
    (root / "data" / "meta").mkdir(parents=True)
    collection = {
        "request": {"init_states": list(range(8, 20)), "render": "draft"},
        "episodes": 50,
        "attempts": 52,
        "success_rate": 0.96,
        "seconds": {"last_run": 200.5, "workers": {"simulate": 300.0}},
        "command": "python -m dtvla.collect episodes=50",
    }
    (root / "data" / "meta" / "collection.json").write_text(json.dumps(collection))
    for mode, rate in RATES.items():
        folder = root / "evaluations" / "nano" / f"libero_object-{mode}"
        thoughts = [Thought(2 * k, f"thought {k // 2}" if mode == "think" else "") for k in range(6)]
        episodes = [
            EpisodeResult("libero_object", 0, "pick up the soup", i, 0, i < 10 * rate, 12, thoughts, [0.1] * 6,
                          "videos/e.mp4" if i == 0 else None)
            for i in range(10)
        ]  # fmt: skip
        provenance = {"command": f"python -m dtvla.evaluate cot={mode}", "seconds": 61.0, "versions": versions(),
                      "machine": machine()}  # fmt: skip
        settings = {"cot": {"mode": mode}, "init_states": [*range(8), 20, 21]}
        write_results(Results(settings, provenance, episodes), folder)
        film = Film(folder / "videos" / "e.mp4")
        for step in range(13):
            film.add(rng.integers(0, 256, (48, 96, 3), dtype=np.uint8), Caption("pick", "t", step))
        film.finish()
    return root


def config(project: Path, **changes: object) -> DictConfig:
    settings = {
        "run": str(project / "runs" / "nano"),
        "evaluations": None,
        "dataset": None,
        "output": None,
        "title": None,
    }
    return OmegaConf.create({**settings, **changes, "paths": {"root": str(project)}})


def test_report_shows_every_mode_with_interval_commands_times_and_machine(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_report(config(project, output=str(tmp_path / "deep" / "report.md")))
    text = path.read_text()
    assert str(path) in capsys.readouterr().out
    for mode, rate in RATES.items():
        assert re.search(rf"\*\*{mode}\*\* +\| {round(10 * rate)} of 10 +\| \*\*{100 * rate:.1f} %\*\*", text)
        assert f"python -m dtvla.evaluate cot={mode}" in text
    for words in (
        "0-7, 20-21",
        "python -m dtvla.collect",
        "python -m dtvla.train",
        "6 min 12 s",
        "3 min 20 s",
        "0.96",
        "No init state of the evaluation is in",
        "mujoco",
    ):
        assert words in text
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) == 5
    assert all((path.parent / link).is_file() for link in links)
    assert not any(Path(link).is_absolute() for link in links)


def test_an_init_state_that_was_trained_on_is_pointed_out(project: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "data"
    (dataset / "meta").mkdir(parents=True)
    record = {"request": {"init_states": list(range(5, 30))}, "episodes": 25}
    (dataset / "meta" / "collection.json").write_text(json.dumps(record))
    text = write_report(config(project, dataset=str(dataset), output=str(tmp_path / "report.md"))).read_text()
    assert "**Init states 5-7, 20-21 are in the demonstrations and in the evaluation.**" in text


def test_pictures_are_drawn_and_not_blank(project: Path, tmp_path: Path) -> None:
    write_report(config(project, output=str(tmp_path / "report.md")))
    for name in ("curves.png", "thoughts_think.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("L"))
        assert min(pixels.shape) > 200
        assert pixels.std() > 10


def test_strip_takes_its_pictures_at_the_steps_of_the_thoughts(project: Path, tmp_path: Path) -> None:
    """Two steps are alike only if the same frame was shown twice: random frames differ."""
    write_report(config(project, output=str(tmp_path / "report.md")))
    pixels = np.asarray(Image.open(tmp_path / "thoughts_think.png").convert("RGB")).astype(int)
    cells = [pixels[76:300, 24 + k * 584 : 24 + k * 584 + 560] for k in range(3)]
    assert np.abs(cells[0] - cells[1]).mean() > 10
    assert np.abs(cells[1] - cells[2]).mean() > 10


def test_modes_come_in_the_order_think_mask_random(project: Path) -> None:
    found = load_evaluations(
        [str(project / "evaluations" / "nano" / "*"), str(project / "evaluations" / "nano" / "*think")]
    )
    assert [evaluation.mode for evaluation in found] == ["think", "mask", "random"]


def test_an_unfinished_evaluation_is_left_out_aloud(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin_run(tmp_path / "unfinished", {}, {})
    found = load_evaluations([str(project / "evaluations" / "nano" / "*"), str(tmp_path / "*")])
    assert len(found) == 3
    assert "unfinished is not finished and left out" in capsys.readouterr().err


def test_evaluations_that_are_not_alike_are_not_compared_silently(project: Path, tmp_path: Path) -> None:
    mask = load_evaluations([str(project / "evaluations" / "nano" / "*mask")])[0].results
    settings = {**mask.settings, "render": "full", "cot": {"mode": "none"}}
    write_results(Results(settings, mask.provenance, [replace(e, video=None) for e in mask.episodes]), tmp_path / "e")
    found = [str(project / "evaluations" / "nano" / "*"), str(tmp_path / "e")]
    text = write_report(config(project, evaluations=found, output=str(tmp_path / "report.md"))).read_text()
    assert "**These evaluations also differ in render: compare them with care.**" in text


def test_the_time_of_a_resumed_evaluation_is_called_what_it_is(project: Path, tmp_path: Path) -> None:
    mask = load_evaluations([str(project / "evaluations" / "nano" / "*mask")])[0].results
    provenance = {**mask.provenance, "resumed": ["2026-01-02T03:04:05+00:00"]}
    write_results(replace(mask, provenance=provenance, episodes=mask.episodes[1:]), tmp_path / "e")
    found = [str(project / "evaluations" / "nano" / "*think"), str(tmp_path / "e")]
    text = write_report(config(project, evaluations=found, output=str(tmp_path / "report.md"))).read_text()
    assert "evaluate (mask, since it was resumed)" in text
    assert "evaluate (think) " in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "???"}, "run: none was given"),
        ({"run": "nowhere"}, "run: nowhere is not a folder"),
        ({"evaluations": ["nowhere/*"]}, "evaluations: no results.json in nowhere"),
        ({"dataset": "nowhere"}, "dataset: nowhere is not a dataset"),
    ],
)
def test_a_missing_folder_is_named(project: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        write_report(config(project, **change))


def test_metrics_keep_every_value_at_its_step(project: Path) -> None:
    series = read_metrics(project / "runs" / "nano" / "metrics.csv")
    assert series["val/loss"] == ([20, 40], [3 / 20, 3 / 40])
    assert len(series["train/loss"][0]) == 59


@pytest.mark.parametrize("content", ["step,loss\n1,abc\n", "a,b\n1,2\n", "step,loss\n,3\n"])
def test_damaged_metrics_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(UserError, match="metrics.csv is damaged"):
        read_metrics(tmp_path / "metrics.csv")


def test_unknown_metrics_draw_nothing(tmp_path: Path) -> None:
    assert draw_curves({"other/thing": ([1], [1.0])}, tmp_path / "a.png") is None
    assert not list(tmp_path.iterdir())


def test_smoothing_is_a_centred_mean() -> None:
    values = np.random.default_rng(1).random(40).tolist()
    smoothed = smooth(values, 5)
    for i in range(40):
        assert smoothed[i] == pytest.approx(np.mean(values[max(0, i - 2) : i + 3]))


@pytest.mark.parametrize("seed", range(5))
def test_chosen_decisions_are_ordered_distinct_and_prefer_new_thoughts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 3, rng.integers(1, 30)).tolist()
    episode = EpisodeResult("s", 0, "i", 0, 0, True, 1, [Thought(k, f"t{w}") for k, w in enumerate(words)])
    changed = [k for k in range(len(words)) if k == 0 or words[k] != words[k - 1]]
    chosen = choose_decisions(episode, 4)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(4, len(words))
    assert chosen[0] == 0
    if len(changed) >= 4:
        assert set(chosen) <= set(changed)


def test_durations_read_well() -> None:
    assert [duration(s) for s in (0.4, 59.4, 59.6, 3599, 7800)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "59 min 59 s",
        "2 h 10 min",
    ]


def test_table_cells_cannot_break_the_table() -> None:
    table = markdown_table(["a", "b"], [["x|y", "two\nlines"]])
    assert table.splitlines()[2] == "| x\\|y | two lines |"
    with pytest.raises(ValueError, match="2 cells"):
        markdown_table(["a", "b"], [["x"]])
