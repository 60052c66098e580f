"""Blocks of iterations, against the table in the study's README."""

import re
from pathlib import Path

import pytest

from dtvla.analysis.curves import plot_curves, read_metrics
from dtvla.analysis.grpo import ENTROPY_PANELS, GROUP_PANELS, UPDATE_PANELS, iteration_table

STUDY = Path(__file__).parents[2] / "experiments" / "grpo_gain"


def test_the_table_is_that_of_the_readme() -> None:
    row = r"^\| (\d+) to (\d+) \| (\d+) \| ([\d.]+) % \| ([\d.]+) \| ([\d.]+) \|$"
    written = re.findall(row, (STUDY / "README.md").read_text(), re.MULTILINE)
    table = iteration_table(read_metrics(STUDY / "metrics.csv"))
    assert len(written) == len(table) == 6
    for (first, last, episodes, success, thought, action), found in zip(written, table.itertuples(), strict=True):
        assert found.iterations == f"{first}-{last}"
        assert found.episodes == int(episodes)
        assert 100 * found.success == pytest.approx(float(success), abs=0.051)
        assert found.thought_entropy == pytest.approx(float(thought), abs=0.0051)
        assert found.action_entropy == pytest.approx(float(action), abs=0.0051)


def test_a_last_block_may_be_shorter() -> None:
    series = {f"sampled/{name}": ([1, 2, 3], [1.0, 1.0, 4.0]) for name in ("episodes", "success")}
    series |= {f"sampled/{name}": ([1, 2, 3], [0.5] * 3) for name in ("thought_entropy", "action_entropy")}
    table = iteration_table(series, every=2)
    assert table["iterations"].tolist() == ["1-2", "3-3"]
    assert table["success"].tolist() == [1.0, 4.0]


@pytest.mark.parametrize("panels", [GROUP_PANELS, UPDATE_PANELS, ENTROPY_PANELS])
def test_every_panel_finds_its_numbers(panels: tuple) -> None:
    figure = plot_curves(read_metrics(STUDY / "metrics-1.csv"), panels)
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == [panel.title for panel in panels]
