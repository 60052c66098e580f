"""The HTML report: its numbers are those of the results, it needs nothing else, and what stands in it stays text."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import av
import numpy as np
import pytest
from html_data import CAMERAS_HW, STEPS, Page, config, render, write_evaluation, write_training
from scipy.stats import binomtest

from dtvla.analysis.clips import make_clip
from dtvla.analysis.exhibits import choose, cut, moments
from dtvla.analysis.report import write_report
from dtvla.analysis.sources import find_sources
from dtvla.analysis.tabulate import p_value
from dtvla.errors import UserError
from dtvla.report import name_folders
from dtvla.rollout.journal import begin_run
from dtvla.rollout.results import Results, Thought, episode_key, write_results

RATES = {"think": 0.95, "mask": 0.65, "random": 0.55}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run and three evaluations of it, one of them filmed."""
    root = tmp_path_factory.mktemp("project")
    write_training(root / "runs" / "nano")
    for place, (mode, rate) in enumerate(RATES.items()):
        filmed = [3] if mode == "think" else []
        write_evaluation(root / "evaluations" / "nano" / f"goal-{mode}", mode, rate, seed=place, filmed=filmed)
    return root


@pytest.fixture(scope="module")
def page(project: Path) -> Page:
    return Page(render(find_sources([project / "runs" / "nano"], project / "evaluations"), "Nano", 6, 8))


def results_of(project: Path, mode: str) -> Results:
    (arm,) = find_sources([project / "evaluations" / "nano" / f"goal-{mode}"], project).arms
    return arm.runs[0].results


def test_a_run_brings_its_evaluations_think_first(page: Page) -> None:
    assert [row[0] for row in page.tables["success"][1:]] == list(RATES)
    assert page.sections == [
        "success",
        "differences",
        "tasks",
        "episodes",
        "thoughts",
        "latency",
        "training-nano",
        "demonstrations-nano",
        "behind",
    ]


def test_success_and_its_interval_are_those_of_the_results(project: Path, page: Page) -> None:
    for row in page.tables["success"][1:]:
        outcomes = [e.success for e in results_of(project, row[0]).episodes]
        interval = binomtest(sum(outcomes), len(outcomes)).proportion_ci(method="wilson")
        assert row[1:4] == [
            f"{sum(outcomes)}/{len(outcomes)}",
            f"{100 * np.mean(outcomes):.1f}",
            f"{100 * interval.low:.1f} to {100 * interval.high:.1f}",
        ]
    for task, row in enumerate(page.tables["tasks"][1:]):
        for mode, cell in zip(RATES, row[3:], strict=True):
            outcomes = [e.success for e in results_of(project, mode).episodes if e.task_id == task]
            assert cell.startswith(f"{100 * np.mean(outcomes):.1f} (")


def test_differences_are_paired_and_corrected(project: Path, page: Page) -> None:
    """The p-value is McNemar's, as scipy's binomial test of the pairs that disagree says; Holm's by its definition."""
    think = {episode_key(e): e.success for e in results_of(project, "think").episodes}
    plain = []
    for row in page.tables["differences"][1:]:
        other = {episode_key(e): e.success for e in results_of(project, row[0]).episodes}
        lost, won = (sum(think[k] is side and other[k] is not side for k in think) for side in (True, False))
        plain.append(binomtest(lost, lost + won).pvalue)
        assert row[1] == str(len(think))
        assert row[3:5] == [f"{lost}:{won}", f"{100 * (won - lost) / len(think):+.1f}"]
    ranked = sorted(plain)
    assert 1e-4 < ranked[0] < ranked[1] < 0.5  # else no correction would be seen
    for row, p in zip(page.tables["differences"][1:], plain, strict=True):
        holm = max(min(1.0, (2 - place) * q) for place, q in enumerate(ranked) if q <= p)
        assert row[6:8] == [p_value(q) for q in (p, holm)]
        assert ("more than chance" if holm < 0.05 else "may be chance") in page.text


def test_latency_and_thought_length_are_those_of_the_results(project: Path, page: Page) -> None:
    for row in page.tables["latency"][1:]:
        times = [1000 * s for e in results_of(project, row[0]).episodes for s in e.latency]
        numbers = [np.mean(times), *(np.percentile(times, q) for q in (10, 50, 90, 99))]
        assert row[1:7] == [str(len(times)), *(f"{number:.0f}" for number in numbers)]
    (row,) = page.tables["thoughts"][1:]  # only one arm writes thoughts
    tokens = [t.tokens for e in results_of(project, "think").episodes for t in e.thoughts]
    assert row[:3] == ["think", str(len(tokens)), f"{np.mean(tokens):.1f}"]


def test_agreement_of_thought_and_gripper_is_shown_where_it_is_recorded(tmp_path: Path, page: Page) -> None:
    assert "Agreement" not in page.text
    results = write_evaluation(tmp_path / "a", "think", 0.5)
    rng = np.random.default_rng(0)
    letters = rng.choice(["ccccc", "ooooo"], (len(results.episodes), 4)).tolist()
    said = [
        replace(
            e,
            thoughts=[
                replace(t, text="next, lift the bowl up.", gripper=g) for t, g in zip(e.thoughts, own, strict=True)
            ],
        )
        for e, own in zip(results.episodes, letters, strict=True)
    ]
    write_results(replace(results, episodes=said), tmp_path / "b")
    shown = Page(render(find_sources([tmp_path / "b"], tmp_path), "t", 0, 0))
    share = np.mean([g == "ccccc" for own in letters for g in own])  # who lifts holds on
    row = shown.tables["thoughts"][3]
    assert row[:6] == ["think", "what comes next", "80", "80", str(round(80 * share)), f"{100 * share:.1f}"]


def test_the_last_command_before_a_claim_counts_though_nothing_was_thought_at_it(tmp_path: Path) -> None:
    said = [
        ("the gripper is open and above the bowl. next, go down.", "o"),
        ("", "c"),
        ("the gripper is closed and holds the bowl. next, lift it.", "c"),
    ]
    thoughts = [Thought(5 * k, text, tokens=3, forwards=1, gripper=told) for k, (text, told) in enumerate(said)]
    results = write_evaluation(tmp_path / "a", "think", 0.5)
    write_results(replace(results, episodes=[replace(e, thoughts=thoughts) for e in results.episodes]), tmp_path / "b")
    shown = Page(render(find_sources([tmp_path / "b"], tmp_path), "t", 0, 0))
    (row,) = (row for row in shown.tables["thoughts"] if "the gripper now" in row)
    assert row[2:6] == ["60", "40", "40", "100.0"]


def test_the_page_needs_nothing_but_itself(page: Page) -> None:
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"https?://|@import|url\(", page.text_in)
    assert "default-src 'none'" in page.text_in


def test_training_is_shown_and_init_states_of_both_are_pointed_out(page: Page) -> None:
    for words in ("Training of nano", "val/loss", "6 min 12 s", "dtvla train"):
        assert words in page.text
    assert "Init states 5-7 are in the demonstrations and in the evaluation." in page.text
    assert 'alt="loss"' in page.text_in
    assert "token accuracy" not in page.text_in  # nothing but nan was logged


def test_init_states_are_shared_within_a_task_only(tmp_path: Path) -> None:
    write_training(tmp_path / "runs" / "nano")  # of libero_goal's task 1
    for name, suite, tasks in (("other suite", "libero_object", 2), ("other task", "libero_goal", 1)):
        write_evaluation(tmp_path / name, "think", 0.5, suite=suite, tasks=tasks, states=range(10))
        page = Page(render(find_sources([tmp_path / "runs", tmp_path / name], tmp_path), "t", 0, 0))
        assert "No init state of the evaluation is in the demonstrations." in page.text


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for place in ("a", "b"):
        write_training(tmp_path / place / "nano")
    page = Page(render(find_sources([tmp_path], tmp_path), "t", 0, 0))
    assert [name for name in page.sections if name.startswith("training")] == ["training-a/nano", "training-b/nano"]


def test_films_are_inside_and_show_the_cameras_alone(page: Page) -> None:
    films = [address for address in page.addresses if address.startswith("data:video/mp4;base64,")]
    assert len(films) == 2  # init state 3 of both tasks
    with av.open(io.BytesIO(base64.b64decode(films[0].split(",")[1]))) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert float(container.streams.video[0].average_rate) == 20
    assert frames[0].shape[:2] == (256, 256 * CAMERAS_HW[1] // CAMERAS_HW[0])
    brightness = [frame[40:-40, 40:-40].mean() for frame in frames]
    assert len(frames) > STEPS
    assert all(after > before + 5 for before, after in zip(brightness[:STEPS], brightness[1:STEPS], strict=False))


@pytest.mark.parametrize(("films_mb", "count"), [(0, 0), (0.000001, 0), (8, 2)])
def test_films_keep_to_their_budget_and_what_is_left_out_is_named(project: Path, films_mb: float, count: int) -> None:
    sources = find_sources([project / "evaluations" / "nano"], project)
    text = render(sources, "t", 6, films_mb)
    assert text.count("<video") == count
    assert text.count("is left out for its size") == 2 - count


def test_a_budget_for_one_film_takes_one(project: Path) -> None:
    sources = find_sources([project / "evaluations" / "nano"], project)
    sizes = [len(make_clip(film)) for film in sorted((project / "evaluations/nano/goal-think/videos").iterdir())]
    text = render(sources, "t", 6, (max(sizes) + min(sizes) / 2) / 1e6)
    assert text.count("<video") == 1
    assert text.count("is left out for its size") == 1


@pytest.mark.parametrize("damage", ["missing", "text", "foreign"])
def test_a_film_that_cannot_be_read_is_named_without_this_machines_folders(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "e"
    write_evaluation(folder, "think", 0.5, tasks=1, filmed=[2])
    film = folder / "videos" / "0_2.mp4"
    film.unlink()
    if damage == "text":
        film.write_text("no film")
    elif damage == "foreign":
        with av.open(str(film), "w") as container:
            stream = container.add_stream("libx264", rate=20)
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
            container.mux(stream.encode())
    text = render(find_sources([folder], tmp_path), "t", 6, 8)
    assert "the film videos/0_2.mp4 cannot be read" in text
    assert str(tmp_path) not in text
    assert str(film) in capsys.readouterr().err


def test_films_that_are_gone_are_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = write_evaluation(tmp_path, "think", 0.5, tasks=1, filmed=[2, 3, 4])
    films = [tmp_path / str(episode.video) for episode in results.episodes if episode.video]
    for film in films:
        film.unlink()
    text = render(find_sources([tmp_path], tmp_path), "t", 6, 8)
    assert text.count("cannot be read") == 3
    assert "moment of the film" not in text
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning == (
        f"warning: video: {films[0]} cannot be read (No such file or directory); evaluate again with record=1 "
        "(and 2 more films)"
    )


def test_what_stands_in_results_stays_text(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x00\u202e\ud800 {{ 7 * 7 }}"
    write_evaluation(tmp_path / "e", "think", 0.5, words=evil, suite="<b>goal</b>")
    text = render(find_sources([tmp_path / "e"], tmp_path), "<i>title</i>\ud800", 2, 0)
    text.encode()
    parsed = Page(text)
    assert "{{ 7 * 7 }} 1" in parsed.text
    assert "<b>goal</b>" in parsed.text
    assert not {"b\x00", "i"} & set(parsed.tags)
    assert all(address.startswith("data:") for address in parsed.addresses)
    assert parsed.tags.count("script") == 1
    assert not set("\x00\u202e") & set(text)


def test_differences_of_the_rules_and_unpaired_episodes_are_said(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", "think", 0.5)
    write_evaluation(tmp_path / "b", "mask", 0.5, states=range(3, 15), render="full")
    page = Page(render(find_sources([tmp_path / "a", tmp_path / "b"], tmp_path), "t", 0, 0))
    assert page.sections[0] == "warnings"
    assert "render differs: draft in a; full in b" in page.text
    assert "6 of the 20 episodes of arm think are not in all arms" in page.text
    assert page.tables["differences"][1][1] == "14"
    assert page.tables["differences"][1][-1] == "10, 6"


def test_arms_without_a_common_episode_are_shown_but_not_compared(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", "think", 0.5)
    write_evaluation(tmp_path / "b", "mask", 0.5, states=range(20, 30))
    page = Page(render(find_sources([tmp_path / "a", tmp_path / "b"], tmp_path), "t", 0, 0))
    assert "differences" not in page.tables
    assert "mask has no episode in common with think and is not compared with it." in page.text
    assert len(page.tables["success"]) == 3


def test_episodes_that_stand_twice_are_said_and_not_compared(tmp_path: Path) -> None:
    for name, mode in (("a", "think"), ("b", "think"), ("c", "mask")):
        write_evaluation(tmp_path / name, mode, 0.5)
    page = Page(render(find_sources([tmp_path / n for n in "abc"], tmp_path), "t", 0, 0))
    assert "Not compared:" in page.text
    assert "stands twice" in page.text
    assert "20 episodes stand twice or more in arm think" in page.text


def test_one_arm_over_several_suites_is_one_arm(tmp_path: Path) -> None:
    for suite in ("libero_goal", "libero_object"):
        for place, mode in enumerate(("mask", "think")):
            write_evaluation(tmp_path / f"{suite}-{mode}", mode, 0.5, suite=suite, seed=place)
    page = Page(render(find_sources([tmp_path], tmp_path), "t", 0, 0))
    assert [row[:2][0] for row in page.tables["success"][1:]] == ["think", "mask"]
    assert [row[0] for row in page.tables["suites"][1:]] == ["libero_goal", "libero_object"]
    assert page.tables["differences"][1][1] == "40"


def test_folders_keep_their_order_and_the_first_is_the_baseline(tmp_path: Path) -> None:
    for mode in ("think", "mask"):
        write_evaluation(tmp_path / mode, mode, 0.5)
    arms = find_sources([tmp_path / "mask", tmp_path / "think" / "results.json"], tmp_path).arms
    assert [arm.name for arm in arms] == ["mask", "think"]
    arms = find_sources([tmp_path, tmp_path / "mask"], tmp_path).arms  # found twice, shown once
    assert [arm.name for arm in arms] == ["think", "mask"]


def test_folders_without_results_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"folders: .*nowhere does not exist"):
        find_sources([tmp_path / "nowhere"], tmp_path)
    begin_run(tmp_path / "all" / "begun", {}, {})
    with pytest.raises(UserError, match=r"holds neither metrics.csv of a training run nor results.json of a finished"):
        find_sources([tmp_path / "all"], tmp_path)
    write_evaluation(tmp_path / "all" / "done", "think", 0.5)
    assert len(find_sources([tmp_path / "all"], tmp_path).arms) == 1
    assert "begun is not finished and left out" in capsys.readouterr().err


def test_a_run_without_evaluations_has_a_page_of_its_training(tmp_path: Path) -> None:
    write_training(tmp_path / "nano")
    page = Page(render(find_sources([tmp_path / "nano"], tmp_path / "evaluations"), "t", 6, 8))
    assert page.sections == ["training-nano", "demonstrations-nano"]
    assert "Training of nano" in page.text


@pytest.mark.parametrize("content", [b"data: [", b"\xff\xfe\x00", b"data: {root: '${oc.env:NOT_SET_ANYWHERE}'}", b"3"])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    write_training(tmp_path / "nano")
    (tmp_path / "nano" / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"^config.yaml: .*nano/config.yaml cannot be read \(.+\); mend it, or set"):
        render(find_sources([tmp_path / "nano"], tmp_path), "t", 0, 0)


def test_the_page_lies_in_the_folder_that_holds_all(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [project / "evaluations" / "nano" / f"goal-{mode}" for mode in ("mask", "think")]
    path = write_report(config(project, *folders, films_mb=0))
    assert path == project / "evaluations" / "nano" / "report.html"
    assert f"report: {path}" in capsys.readouterr().out
    assert "<title>Comparison: goal-mask, goal-think</title>" in path.read_text()
    assert write_report(config(project, *folders, films_mb=0, title="again")) == path  # its own page is made anew
    assert "<title>again</title>" in path.read_text()
    path.unlink()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "folders: none was given; name runs or evaluations"),
        ({"folders": ["nowhere"]}, "folders: nowhere does not exist"),
        ({"folders": ["evaluations"], "episodes": -1}, "episodes: found -1; give a whole number of at least 0"),
        ({"folders": ["evaluations"], "episodes": 1.5}, "episodes: found 1.5; give a whole number of at least 0"),
        ({"folders": ["evaluations"], "films_mb": "many"}, "films_mb: found 'many'"),
        (
            {"folders": ["evaluations"], "output": "page.pdf"},
            "output: found page.pdf; give a file that ends with .html or",
        ),
        ({"folders": ["evaluations", "runs"], "dataset": "nowhere"}, "dataset: nowhere is not a dataset"),
    ],
)
def test_wrong_settings_are_named(
    project: Path, changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    with pytest.raises(UserError, match=re.escape(message)):
        write_report(config(project, **changes))
    assert not list(project.rglob("*.html"))


def test_words_become_folders_and_settings_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cot=think").mkdir()
    assert name_folders(["a", "cot=think", "title=x", "b"]) == ["folders=['a','cot=think']", "title=x", "b"]
    assert name_folders(["it's", "a\\b"]) == [r"folders=['it\'s','a\\b']"]
    assert name_folders(["run=a"]) == ["run=a"]
    assert name_folders(["--help"]) == ["--help"]


def test_the_command_takes_folders_with_strange_names(tmp_path: Path) -> None:
    folders = [tmp_path / "it's 100 % {a,b}", tmp_path / "cot=mask"]
    for folder, mode in zip(folders, ("think", "mask"), strict=True):
        write_evaluation(folder, mode, 0.5, states=range(3))
    done = subprocess.run(
        [sys.executable, "-m", "dtvla.report", *map(str, folders), f"output={tmp_path}/out.html"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = Page((tmp_path / "out.html").read_text())
    assert [row[0] for row in page.tables["success"][1:]] == ["think", "mask"]


@pytest.mark.parametrize("seed", range(5))
def test_moments_say_what_was_thought_at_every_step(seed: int) -> None:
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 3, rng.integers(1, 20)).tolist()
    thoughts = [Thought(7 * k, f"t{w}") for k, w in enumerate(words)]
    steps = 7 * len(words) - int(rng.integers(0, 7))
    found = moments(thoughts, steps)
    said = [next(m.text for m in found if m.first <= step < m.end) for step in range(steps)]
    assert said == [f"t{words[step // 7]}" for step in range(steps)]
    assert all(a.text != b.text and a.end == b.first for a, b in zip(found, found[1:], strict=False))
    assert found[-1].end == steps


def test_nothing_thought_makes_no_moments() -> None:
    assert moments([], 10) == []
    assert moments([Thought(0, ""), Thought(5, " \n")], 10) == []
    assert [m.text for m in moments([Thought(0, "a"), Thought(5, "")], 10)] == ["a", "(no thought)"]


def test_long_thoughts_are_cut_aloud() -> None:
    assert cut("a\n  b\tc\x07d") == "a b c d"
    assert cut("x" * 700) == "x" * 600 + " … (100 more letters)"


def test_chosen_episodes_give_every_task_its_turn_and_show_films_first(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", "think", 0.5, seed=1, tasks=3, filmed=[4])
    write_evaluation(tmp_path / "b", "mask", 0.5, seed=2, tasks=3)
    arms = find_sources([tmp_path / "a", tmp_path / "b"], tmp_path).arms
    chosen = choose(arms, 100)
    assert len(chosen) == len(set(chosen)) == 30
    assert all({key[1] for key in chosen[turn : turn + 3]} == {0, 1, 2} for turn in range(0, 30, 3))
    assert all(key[2] == 4 for key in chosen[:3])  # the filmed ones
    outcomes = [{episode_key(e): e.success for _, e in arm.episodes} for arm in arms]
    differs = [outcomes[0][key] != outcomes[1][key] for key in chosen[3:]]
    in_task = [[d for key, d in zip(chosen[3:], differs, strict=True) if key[1] == t] for t in range(3)]
    assert all(order == sorted(order, reverse=True) for order in in_task)  # those of different outcome before others
    assert [choose(arms, count) for count in (0, 1, 7)] == [chosen[:count] for count in (0, 1, 7)]


def test_success_is_not_preferred(tmp_path: Path) -> None:
    results = write_evaluation(tmp_path / "a", "think", 0.3, tasks=4)
    chosen = choose(find_sources([tmp_path], tmp_path).arms, 8)
    outcomes = {episode_key(e): e.success for e in results.episodes}
    assert [key[1:3] for key in chosen] == [(task, state) for state in (0, 1) for task in range(4)]
    assert {outcomes[key] for key in chosen} == {True, False}


def test_figures_are_in_the_page_and_measured_in_its_pixels(page: Page) -> None:
    pictures = [base64.b64decode(a.split(",")[1]) for a in page.addresses if a.startswith("data:image/svg+xml;base64,")]
    assert len(pictures) == 6  # success, differences, tasks, thoughts, latency, loss
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.tag.endswith("svg")
    assert len(re.findall(r'style="min-width: \d{3}px"', page.text_in)) == len(pictures)


def test_names_that_mean_something_to_matplotlib_are_drawn_as_they_are(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "e", "think", 0.5, words="a", suite="$\\frac{1$ \ud800_x")
    assert render(find_sources([tmp_path / "e"], tmp_path), "t", 0, 0)


def test_results_of_grpo_without_thoughts_or_latency_have_a_page(tmp_path: Path) -> None:
    results = write_evaluation(tmp_path / "a", "think", 0.5)
    bare = [replace(e, thoughts=[], latency=[]) for e in results.episodes]
    write_results(replace(results, episodes=bare), tmp_path / "b")
    page = Page(render(find_sources([tmp_path / "b"], tmp_path), "t", 6, 8))
    assert page.sections == ["success", "tasks", "behind"]


def test_a_broken_results_file_is_named(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "a", "think", 0.5)
    document = json.loads((tmp_path / "a" / "results.json").read_text())
    (tmp_path / "a" / "results.json").write_text(json.dumps({**document, "format_version": 1}))
    with pytest.raises(UserError, match="format version 1"):
        find_sources([tmp_path / "a"], tmp_path)
