"""The frame of benchmark results, against the ratios that the benchmark itself wrote."""

import json
from pathlib import Path

import numpy as np
import pytest

from dtvla.analysis.look_plots import plot_phases, plot_throughput
from dtvla.analysis.timings import load_timings
from dtvla.errors import UserError

LATENCY = Path(__file__).parents[2] / "experiments" / "latency"


@pytest.mark.parametrize("file", sorted(LATENCY.glob("*.json")), ids=lambda file: file.stem)
def test_the_frame_has_the_ratios_of_the_benchmark(file: Path) -> None:
    frame, document = load_timings([file]), json.loads(file.read_text())
    table = frame.set_index(["side", "batch_size", "phase"])
    assert document["ratios"]
    for ratio in document["ratios"].values():
        over = tuple(ratio["over"])
        under = tuple(ratio.get("under", over))
        value = table.loc[under, "median_ms" if "under" in ratio else "floor_ms"] / under[1]
        assert table.loc[over, "median_ms"] / over[1] / value == pytest.approx(ratio["value"])


def test_folders_are_searched_and_other_studies_left_out(tmp_path: Path) -> None:
    experiments = LATENCY.parent
    frame = load_timings([LATENCY, experiments / "memory"])
    assert set(frame["study"]) == {"latency", "throughput"}
    assert set(frame["dtype"]) == {"bfloat16", "float32"}
    ours = frame[~frame["side"].str.startswith("published")]
    assert ours.loc[ours["side"] != "speculate", "floor_ms"].notna().all()
    total = frame[(frame["phase"] == "total")]
    assert np.allclose(total["decisions_per_s"], 1000 * total["batch_size"] / total["median_ms"])
    (tmp_path / "torn.json").write_text('{"study": "latency"}')
    for wrong, words in (("memory", "no result of latency or throughput"), ("no", "is no result of dtvla benchmark")):
        with pytest.raises(UserError, match=words):
            load_timings([experiments / wrong])
    with pytest.raises(UserError, match=r"torn\.json is no result"):
        load_timings([tmp_path])


def test_phases_stand_one_behind_the_other_and_limits_where_they_are() -> None:
    frame = load_timings([LATENCY / "latency-small-cpu-float32.json"])
    sides = ["think", "published think", "mask"]
    axes = plot_phases(frame, sides).axes[0]
    phases = frame[frame["phase"] != "total"].groupby("side")["median_ms"].sum()
    for place, side in enumerate(sides):
        bars = [bar for bar in axes.patches if round(bar.get_y() + bar.get_height() / 2) == place]
        assert max(bar.get_x() + bar.get_width() for bar in bars) == pytest.approx(phases[side])
    total = frame[frame["phase"] == "total"].set_index("side")
    assert [text.get_text().strip() for text in axes.texts] == [f"{total.loc[s, 'median_ms']:.0f} ms" for s in sides]
    assert axes.lines[0].get_xdata()[0] == pytest.approx(total.loc["think", "floor_ms"])
    with pytest.raises(UserError, match="choose one file"):
        plot_phases(load_timings([LATENCY]), sides)
    with pytest.raises(UserError, match="choose one file"):
        plot_phases(frame, ["think", "nothing"])


def test_throughput_is_drawn_by_batch_size() -> None:
    frame = load_timings([LATENCY / "throughput-small-cpu-bfloat16.json"])
    line = plot_throughput(frame, ["think"]).axes[0].lines[0]
    assert line.get_xdata().tolist() == [1, 4, 8]
    assert line.get_ydata().tolist() == pytest.approx([0.66, 1.17, 1.46], abs=0.005)  # as the study's README says
