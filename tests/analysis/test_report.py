"""The report in Markdown: built from a run's real artefacts, complete, with working links; its curves and its strip."""

import csv
import json
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from html_data import config, write_evaluation
from PIL import Image

from dtvla.analysis.curves import plot_curves, read_metrics, smooth
from dtvla.analysis.report import write_report
from dtvla.analysis.strip import HEADER, choose_decisions, draw_strip
from dtvla.analysis.tables import duration, markdown_table
from dtvla.errors import UserError
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
        "request": {"suite": "libero_object", "task_ids": [0], "init_states": list(range(8, 20)), "render": "draft"},
        "episodes": 50,
        "attempts": 52,
        "success_rate": 0.96,
        "seconds": {"last_run": 200.5, "workers": {"simulate": 300.0}},
        "command": "python -m dtvla.collect episodes=50",
    }
    (root / "data" / "meta" / "collection.json").write_text(json.dumps(collection))
    states = [*range(8), 20, 21]
    for mode, rate in RATES.items():
        folder = root / "evaluations" / "nano" / f"libero_object-{mode}"
        thoughts = [Thought(2 * k, f"thought {k // 2}" if mode == "think" else "") for k in range(6)]
        episodes = [
            EpisodeResult("libero_object", 0, "pick up the soup", s, 0, i < 10 * rate, 12, thoughts, [0.1] * 6,
                          "videos/e.mp4" if i == 0 else None)
            for i, s in enumerate(states)
        ]  # fmt: skip
        resumed = ["2026-01-02T03:04:05+00:00"] if mode == "random" else []
        provenance = {"command": f"python -m dtvla.evaluate cot={mode}", "seconds": 61.0, "resumed": resumed,
                      "versions": versions(), "machine": machine()}  # fmt: skip
        settings = {"cot": {"mode": mode}, "init_states": states}
        write_results(Results(settings, provenance, episodes), folder)
        film = Film(folder / "videos" / "e.mp4")
        for step in range(13):
            film.add(rng.integers(0, 256, (48, 96, 3), dtype=np.uint8), Caption("pick", "t", step))
        film.finish()
    return root


@pytest.fixture(scope="module")
def page(project: Path) -> Path:
    """The page, whose name is one that links must quote."""
    return write_report(config(project, project / "runs" / "nano", output=str(project / "deep" / "a page.md")))


def test_markdown_holds_what_the_quickstart_promises(page: Path) -> None:
    text = page.read_text()
    for mode, rate in RATES.items():
        assert re.search(rf"\| {mode} +\| {round(10 * rate)}/10 +\| {100 * rate:.1f} ", text)
        assert f"python -m dtvla.evaluate cot={mode}" in text
    for words in (
        "20-21",
        "python -m dtvla.collect",
        "python -m dtvla.train",
        "6 min 12 s",
        "3 min 20 s",
        "0.96",
        "No init state of the evaluation is in",
        "Differences from think, pair by pair",
        "mujoco",
    ):
        assert words in text
    assert len(re.findall("time since it was resumed", text)) == 1  # random's


def test_links_lead_to_files_beside_the_page(page: Path) -> None:
    links = [unquote(link) for link in re.findall(r"\]\(([^)]+)\)", page.read_text())]
    assert sorted(Path(link).suffix for link in links) == [".mp4"] * 3 + [".png"] * 9
    assert all((page.parent / link).is_file() for link in links)
    assert not any(Path(link).is_absolute() for link in links)


def test_pictures_are_drawn_and_not_blank(page: Path) -> None:
    pictures = sorted(page.parent.glob("*.png"))
    assert len(pictures) == 9
    for path in pictures:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert min(pixels.shape) > 150, path
        assert pixels.std() > 10, path


def test_strip_takes_its_pictures_at_the_steps_of_the_thoughts(page: Path) -> None:
    """Two steps are alike only if the same frame was shown twice: random frames differ."""
    pixels = np.asarray(Image.open(page.with_name("a page-thoughts.png")).convert("RGB")).astype(int)
    cells = [pixels[76:300, 24 + k * 584 : 24 + k * 584 + 560] for k in range(3)]
    assert np.abs(cells[0] - cells[1]).mean() > 10
    assert np.abs(cells[1] - cells[2]).mean() > 10


@pytest.mark.parametrize("decisions", [1, 6])
def test_long_instructions_leave_the_outcome_on_a_strip_alone(tmp_path: Path, decisions: int) -> None:
    headers = []
    for words in ("pick", "put the white mug on the left plate and the yellow mug on the right plate " * 4):
        thoughts = [Thought(k, "t") for k in range(decisions)]
        episode = EpisodeResult("libero_10", 0, words, 30, 0, False, 620, thoughts)
        strip = draw_strip(episode, [Image.new("RGB", (96, 48))] * 6, tmp_path / "strip.png")
        headers.append(np.asarray(Image.open(strip))[:HEADER].astype(int))
    changed = np.abs(headers[0] - headers[1]).sum(axis=(0, 2)) > 0
    outcome = headers[0][:, changed.nonzero()[0].max() + 1 :]
    assert np.ptp(outcome, axis=1).any(axis=1).sum() > 10  # rows with letters
    assert changed.mean() > 0.5


def test_warnings_stand_above_and_films_that_are_gone_are_named(project: Path, tmp_path: Path) -> None:
    write_evaluation(tmp_path / "full", "mask", 0.5, suite="libero_object", render="full")
    results = write_evaluation(tmp_path / "think", "think", 0.5, suite="libero_object", filmed=[0], tasks=1)
    (tmp_path / "think" / str(results.episodes[0].video)).unlink()
    folders = [tmp_path / "think", tmp_path / "full"]
    text = write_report(config(project, *folders, output=str(tmp_path / "report.md"))).read_text()
    assert text.index("* render differs: draft in think; full in full") < text.index("## Success")
    assert "solved: 0_0.mp4 is not there" in text
    assert not list(tmp_path.glob("*thoughts.png"))


def test_metrics_keep_every_value_at_its_step(project: Path) -> None:
    series = read_metrics(project / "runs" / "nano" / "metrics.csv")
    assert series["val/loss"] == ([20, 40], [3 / 20, 3 / 40])
    assert len(series["train/loss"][0]) == 59


@pytest.mark.parametrize("content", ["step,loss\n1,abc\n", "a,b\n1,2\n", "step,loss\n,3\n"])
def test_damaged_metrics_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(UserError, match="metrics.csv is damaged"):
        read_metrics(tmp_path / "metrics.csv")


def test_unknown_metrics_draw_nothing() -> None:
    assert plot_curves({"other/thing": ([1], [1.0])}) is None


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
