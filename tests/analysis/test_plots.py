"""Figures: the numbers are where they belong, nothing is cut off, and no reader needs to tell colours apart."""

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluations import episode, evaluation
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle

from dtvla.analysis.ablation import compare_arms, success
from dtvla.analysis.frames import Run, decision_frame, episode_frame
from dtvla.analysis.plots import (
    COLOURS,
    arm_styles,
    plot_differences,
    plot_latency,
    plot_over_time,
    plot_success,
    plot_tasks,
    save_figure,
)
from dtvla.analysis.thinking import over_time
from dtvla.errors import UserError

ARMS = ("think", "mask", "random", "shuffle")
BLIND = {  # Machado, Oliveira, Fernandes 2009, severity 1.0, on linear RGB
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "none": np.eye(3).tolist(),
}


def linear(colour: str) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear sRGB, white point D65."""
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = matrix @ rgb.clip(0, 1) / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    """Four arms over two suites of three tasks, ten init states each."""
    rng, made = np.random.default_rng(0), []
    for mode, skill in zip(ARMS, (0.95, 0.85, 0.1, 0.6), strict=True):
        for suite in ("libero_goal", "libero_10"):
            episodes = [
                episode(t, s, bool(rng.random() < skill), suite=suite, latency=rng.gamma(3, 0.02, 3).tolist())
                for t in range(3)
                for s in range(10)
            ]
            made.append(Run(f"{suite}-{mode}", Path(), evaluation(episodes, mode, suite=suite)))
    return made


@pytest.fixture(scope="module")
def frame(runs: list[Run]) -> pd.DataFrame:
    return episode_frame(runs)


@pytest.fixture(scope="module")
def figures(runs: list[Run], frame: pd.DataFrame) -> dict[str, Figure]:
    decisions = decision_frame(runs)
    name = "an arm with a name of some length, temperature 0.7, "
    long_names, baseline = frame.assign(arm=name + frame["arm"]), name + "think"
    return {
        "suites": plot_success(success(frame, ["arm", "suite"]), "suite"),
        "arms": plot_success(success(frame)),
        "long": plot_success(success(long_names)),
        "long tasks": plot_tasks(success(long_names, ["arm", "suite", "task_id", "task"])),
        "long differences": plot_differences(compare_arms(long_names, baseline, by=["suite"], n_boot=200)),
        "long latency": plot_latency(decisions.assign(arm=name + decisions["arm"])),
        "tasks": plot_tasks(success(frame, ["arm", "suite", "task_id", "task"])),
        "differences": plot_differences(compare_arms(frame, "think", by=["suite"], n_boot=200)),
        "latency": plot_latency(decisions),
        "time": plot_over_time(over_time(decisions)),
    }


def test_colours_differ_for_every_reader() -> None:
    for matrix in BLIND.values():
        seen = [lab(np.array(matrix) @ linear(colour)) for colour in COLOURS]
        assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 15
        assert min(np.linalg.norm(a - b) for a, b in combinations(seen[:4], 2)) > 18
    greys = [lab(linear(colour))[0] for colour in COLOURS]
    assert min(abs(a - b) for a, b in pairwise(greys)) > 10, "neighbours in a grey print"


def test_every_arm_has_a_marker_a_hatch_and_a_line_of_its_own() -> None:
    styles = list(arm_styles([str(n) for n in range(8)]).values())
    for name in ("colour", "marker", "hatch", "line"):
        assert len({str(getattr(style, name)) for style in styles}) == 8
    more = arm_styles([str(n) for n in range(40)]).values()
    assert len({(style.colour, style.marker) for style in more}) == 40


def test_nothing_is_cut_off(figures: dict[str, Figure]) -> None:
    for name, figure in figures.items():
        figure.canvas.draw()
        box = figure.get_tightbbox()
        assert (np.array([box.x0, box.y0]) > -0.01).all(), name
        assert (np.array([box.x1, box.y1]) < figure.get_size_inches() + 0.01).all(), name
        for legend in figure.legends:
            frame = legend.get_window_extent()
            assert frame.x1 <= figure.bbox.x1 + 1, name
            assert frame.y0 >= figure.axes[0].bbox.y1, name


def test_names_of_rows_break_behind_signs_and_do_not_overlap(runs: list[Run], frame: pd.DataFrame) -> None:
    name = "model.decoder_autoregressive+thoughts_with+temperature=0.7+seed_0/last.policy+"
    named = frame.assign(arm=name + frame["arm"], task=name)
    decisions = decision_frame(runs)
    drawn = (
        plot_differences(compare_arms(named, f"{name}think", n_boot=200)),
        plot_latency(decisions.assign(arm=name + decisions["arm"])),
        plot_tasks(success(named[named["arm"] == f"{name}think"], ["arm", "suite", "task_id", "task"])),
    )
    for figure in drawn:
        figure.canvas.draw()
        labels = figure.axes[0].get_yticklabels()
        assert all(line[-1] in "-_+./=," for label in labels for line in label.get_text().split("\n")[:-1])
        boxes = [label.get_window_extent() for label in labels]
        assert all(upper.y0 > lower.y1 for upper, lower in pairwise(boxes))


def test_legends_are_read_row_by_row(frame: pd.DataFrame) -> None:
    arms = [f"arm {number}" for number in range(5)]
    rates = pd.concat([success(frame).head(1).assign(arm=arm) for arm in arms])
    figure = plot_success(rates)
    figure.canvas.draw()
    texts = figure.legends[0].get_texts()
    places = {text.get_text(): text.get_window_extent() for text in texts}
    assert len({round(place.y0) for place in places.values()}) > 1
    assert sorted(places, key=lambda arm: (-round(places[arm].y0), places[arm].x0)) == arms


def test_bars_are_the_rates_with_their_intervals(figures: dict[str, Figure], frame: pd.DataFrame) -> None:
    (axes,) = figures["suites"].axes
    rates = success(frame, ["arm", "suite"])
    assert len(axes.containers) == 2 * len(ARMS)  # the bars of an arm, and its error bars
    hatches = set()
    for arm in ARMS:
        (bars,) = (c for c in axes.containers if c.get_label() == arm and hasattr(c, "patches"))
        own = rates[rates["arm"] == arm]
        assert [bar.get_height() for bar in bars.patches] == pytest.approx((100 * own["rate"]).tolist())
        hatches |= {bar.get_hatch() for bar in bars.patches}
        (segments,) = (line.get_segments() for line in bars.errorbar.lines[2])
        ends = [sorted(y for _, y in segment) for segment in segments]
        assert np.ravel(ends).tolist() == pytest.approx((100 * own[["low", "high"]]).to_numpy().ravel().tolist())
    assert len(hatches) == len(ARMS)
    assert [text.get_text() for text in figures["suites"].legends[0].get_texts()] == list(ARMS)


def test_a_suite_that_an_arm_did_not_run_stays_empty(frame: pd.DataFrame) -> None:
    part = frame[(frame["arm"] != "mask") | (frame["suite"] == "libero_10")]
    (axes,) = plot_success(success(part, ["arm", "suite"]), "suite").axes
    drawn = [p for p in axes.patches if isinstance(p, Rectangle) and np.isfinite(p.get_height())]
    assert len(drawn) == 2 * len(ARMS) - 1


def test_dots_stand_in_the_rows_of_their_tasks(figures: dict[str, Figure], frame: pd.DataFrame) -> None:
    (axes,) = figures["tasks"].axes
    rates = success(frame, ["arm", "suite", "task_id", "task"])
    labels = [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]
    assert labels == [f"{suite} {t}: task number {t}" for suite in ("libero_goal", "libero_10") for t in range(3)]
    for number, arm in enumerate(ARMS):
        dots = axes.containers[number].lines[0]
        assert dots.get_xdata().tolist() == pytest.approx((100 * rates[rates["arm"] == arm]["rate"]).tolist())
        assert np.round(np.array(dots.get_ydata(), float)).tolist() == list(range(6))
    assert len({axes.containers[n].lines[0].get_marker() for n in range(4)}) == 4


def test_differences_are_filled_where_they_are_significant(figures: dict[str, Figure], frame: pd.DataFrame) -> None:
    compared = compare_arms(frame, "think", by=["suite"], n_boot=200)
    (axes,) = figures["differences"].axes
    drawn = [container.lines[0] for container in axes.containers]
    assert [d.get_xdata()[0] for d in drawn] == pytest.approx((100 * compared["difference"]).tolist())
    filled = [to_hex(d.get_markerfacecolor()) != "#ffffff" for d in drawn]
    assert filled == (compared["p_holm"] < 0.05).tolist()
    assert set(filled) == {True, False}
    styles = arm_styles(ARMS)
    assert [d.get_marker() for d in drawn] == [styles[arm].marker for arm in compared["arm"]]


def test_boxes_are_numpys_quartiles(figures: dict[str, Figure], runs: list[Run]) -> None:
    (axes,) = figures["latency"].axes
    decisions = decision_frame(runs)
    boxes = [patch for patch in axes.patches if isinstance(patch, PathPatch)]
    for arm, box in zip(ARMS, boxes, strict=True):
        taken = decisions.loc[decisions["arm"] == arm, "latency_ms"]
        ends = box.get_path().vertices[:, 0]
        assert (ends.min(), ends.max()) == pytest.approx(tuple(np.quantile(taken, [0.25, 0.75])))
    with pytest.raises(UserError, match=r"^latency: no decision was timed"):
        plot_latency(decisions.assign(latency_ms=float("nan")))


def test_files_are_vectors_whole_and_the_same_each_time(figures: dict[str, Figure], tmp_path: Path) -> None:
    files = save_figure(figures["suites"], tmp_path / "new" / "figure")
    assert [file.name for file in files] == ["figure.pdf", "figure.svg", "figure.png"]
    pdf, svg, png = (file.read_bytes() for file in files)
    assert pdf.startswith(b"%PDF")
    assert b"/Subtype /Image" not in pdf
    assert b"<svg" in svg
    assert b"<image" not in svg
    assert png.startswith(b"\x89PNG")
    again = save_figure(figures["suites"], tmp_path / "again")
    assert [file.read_bytes() for file in again] == [pdf, svg, png]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.pdf", "again.png", "again.svg", "new"]


def test_bad_formats_and_folders_are_refused(figures: dict[str, Figure], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^formats: found gif; use some of pdf, svg, png"):
        save_figure(figures["arms"], tmp_path / "x", ["gif"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^output: .*x.pdf cannot be written"):
        save_figure(figures["arms"], tmp_path / "file" / "x")


def test_drawing_leaves_the_readers_own_settings_alone(frame: pd.DataFrame) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_success(success(frame))
    assert dict(matplotlib.rcParams) == before
