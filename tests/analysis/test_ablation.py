"""Rates and paired differences against scipy and numbers counted with plain dictionaries."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluations import benchmark, episode, evaluation
from scipy.stats import binomtest

from dtvla.analysis.ablation import compare_arms, success
from dtvla.analysis.frames import Run, decision_frame, episode_frame, load_results, read_runs
from dtvla.analysis.pairing import tally
from dtvla.analysis.plots import plot_differences, plot_latency, plot_over_time, plot_success, plot_tasks, save_figure
from dtvla.analysis.resampling import holm
from dtvla.analysis.tables import latex_table, markdown_table
from dtvla.analysis.tabulate import crossed_success_table, difference_table, number_table, success_table
from dtvla.analysis.thinking import latency_quantiles, over_time
from dtvla.errors import UserError
from dtvla.rollout.results import Key

RECORDED = Path(__file__).resolve().parents[2] / "experiments"


def random_arms(seed: int, seeds: int = 1) -> pd.DataFrame:
    """Three arms over two suites; of each a tenth of the episodes is missing."""
    rng = np.random.default_rng(seed)
    runs = []
    for mode, skill in (("think", 0.8), ("mask", 0.7), ("random", 0.4)):
        for suite in ("libero_goal", "libero_10"):
            episodes = [
                episode(task, state, bool(rng.random() < skill), seed=number, suite=suite)
                for task in range(3)
                for state in range(8)
                for number in range(seeds)
                if rng.random() < 0.9
            ]
            runs.append(Run(f"{suite}-{mode}", Path(), evaluation(episodes, mode, suite=suite)))
    return episode_frame(runs)


def outcomes(frame: pd.DataFrame, arm: str) -> dict[Key, bool]:
    rows = [row for row in frame.to_dict("records") if row["arm"] == arm]
    return {(row["suite"], row["task_id"], row["init_state"], row["seed"]): row["success"] for row in rows}


def test_rates_are_counted_and_have_scipys_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    frame = random_arms(0)
    table = success(frame, ["arm", "suite", "task_id"])
    assert len(table) == 3 * 2 * 3
    for row in table.to_dict("records"):
        own = [
            bool(s)
            for s, *key in zip(frame["success"], frame["arm"], frame["suite"], frame["task_id"], strict=True)
            if key == [row["arm"], row["suite"], row["task_id"]]
        ]
        expected = binomtest(sum(own), len(own)).proportion_ci(method="wilson")
        assert (row["successes"], row["episodes"]) == (sum(own), len(own))
        assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high))
    assert success(frame)["episodes"].sum() == len(frame)
    pd.testing.assert_frame_equal(success(frame, "suite"), success(frame, ["suite"]))
    assert "episodes of arm mask are not in all arms" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", [1, 3])
def test_arms_are_compared_over_the_pairs_they_share(seeds: int) -> None:
    frame = random_arms(seeds, seeds)
    table = compare_arms(frame, "think", by=["suite"], n_boot=500)
    assert table[["arm", "suite"]].to_numpy().tolist() == [
        [arm, suite] for arm in ("mask", "random") for suite in ("libero_goal", "libero_10")
    ]
    base = outcomes(frame, "think")
    for row in table.to_dict("records"):
        mine = {key: s for key, s in outcomes(frame, row["arm"]).items() if key[0] == row["suite"]}
        other = {key: s for key, s in base.items() if key[0] == row["suite"]}
        shared = mine.keys() & other.keys()
        counts = tally({key: (other[key], mine[key]) for key in shared})
        assert row["pairs"] == len(shared)
        assert (row["left_out"], row["baseline_left_out"]) == (len(mine) - len(shared), len(other) - len(shared))
        assert (row["only_arm"], row["only_baseline"]) == (counts.only_b, counts.only_a)
        assert row["difference"] == pytest.approx(row["rate"] - row["baseline_rate"]) == counts.difference
        assert row["low"] < row["difference"] < row["high"]
        assert row["p_value"] == counts.p_value
    whole = compare_arms(frame, "think", n_boot=500)
    assert whole["pairs"].tolist() == table.groupby("arm", sort=False)["pairs"].sum().tolist()


def test_bootstrap_equals_one_that_is_written_out() -> None:
    """Tasks kept, init states drawn anew with all their seeds (all but one, for all), one draw after the other."""
    frame = random_arms(7, 2)
    row = compare_arms(frame, "think", n_boot=4000).iloc[1]
    mine, base = outcomes(frame, row["arm"]), outcomes(frame, "think")
    tasks: dict[object, dict[object, list[int]]] = {}
    for key in sorted(mine.keys() & base.keys()):
        tasks.setdefault(key[:2], {}).setdefault(key[2], []).append(int(mine[key]) - int(base[key]))
    rng, drawn = np.random.default_rng(0), []
    for _ in range(4000):
        won = pairs = 0.0
        for states in tasks.values():
            lists, weight = list(states.values()), len(states) / (len(states) - 1)
            for place in rng.integers(0, len(lists), len(lists) - 1):
                won, pairs = won + weight * sum(lists[place]), pairs + weight * len(lists[place])
        drawn.append(won / pairs)
    for end, share in (("low", 0.025), ("high", 0.975)):
        below, above = np.quantile(drawn, [share - 0.01, share + 0.01])
        assert below <= row[end] <= above


def test_p_values_are_corrected_for_all_rows() -> None:
    table = compare_arms(random_arms(3), "random", by=["suite", "task_id"], n_boot=100)
    assert table["p_holm"].tolist() == holm(table["p_value"].tolist())
    assert table["p_holm"].min() < 1


def test_pairs_that_all_agree_leave_a_width() -> None:
    """Ten of ten lost is not certain to be all; nor is a single init state, whatever its seeds do."""
    for states, seeds, widest in ((10, 1, -0.5), (1, 5, 0.2)):
        key = [(state, seed) for state in range(states) for seed in range(seeds)]
        won, lost = ([episode(0, state, ended, seed=seed) for state, seed in key] for ended in (True, False))
        frame = episode_frame([Run("a", Path(), evaluation(won)), Run("b", Path(), evaluation(lost, "mask"))])
        row = compare_arms(frame, "think").iloc[0]
        assert -1.0 == row["difference"] == row["low"] < row["high"] < widest


@pytest.mark.parametrize(("pairs", "probabilities"), [(10, (0.2, 0.05, 0.7, 0.05)), (20, (0.7, 0.05, 0.2, 0.05))])
def test_interval_covers_the_true_difference_of_few_pairs(
    pairs: int, probabilities: tuple[float, float, float, float]
) -> None:
    """One task; both, only the baseline, only the arm, or neither succeeds. 95 % is promised."""
    drawn = np.random.default_rng(3).multinomial(pairs, probabilities, 1500)
    tables, counts = np.unique(drawn, axis=0, return_counts=True)
    covered = 0
    for table, count in zip(tables, counts.tolist(), strict=True):
        ends = np.repeat([(True, True), (True, False), (False, True), (False, False)], table, axis=0)
        runs = [
            Run(mode, Path(), evaluation([episode(0, state, bool(end)) for state, end in enumerate(ends[:, k])], mode))
            for k, mode in enumerate(("think", "mask"))
        ]
        row = compare_arms(episode_frame(runs), "think", n_boot=400).iloc[0]
        covered += count * (row["low"] <= probabilities[2] - probabilities[1] <= row["high"])
    assert 0.93 <= covered / 1500 <= 0.99


def test_seeds_do_not_narrow_what_they_repeat(capsys: pytest.CaptureFixture[str]) -> None:
    one = success(random_arms(4))
    often = random_arms(4).merge(pd.DataFrame({"again": range(10)}), how="cross")
    often["seed"] = often["again"]
    ten = success(often)
    assert ten["episodes"].tolist() == (10 * one["episodes"]).tolist()
    assert ten[["rate", "low", "high"]].to_numpy() == pytest.approx(one[["rate", "low", "high"]].to_numpy(), abs=0.01)
    assert "not in all arms" in capsys.readouterr().err


def test_recorded_arms_give_the_recorded_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """The quickstart: think solved 16 of 20 that mask and random did not solve; nothing stands against comparing."""
    table = compare_arms(load_results(RECORDED / "quickstart"), "think")
    assert capsys.readouterr().err == ""
    assert table["only_baseline"].tolist() == [16, 16]
    assert table["p_value"].tolist() == pytest.approx([2 / 2**16] * 2)
    assert table["p_holm"].tolist() == pytest.approx([4 / 2**16] * 2)


def test_other_rules_are_said_before_numbers_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    runs = {
        "a": evaluation([episode(0, 0, True)]),
        "b": evaluation([episode(0, 0, False), episode(0, 1, True)], "mask", render="draft"),
    }
    frame = episode_frame([Run(name, Path(), results) for name, results in runs.items()])
    expected = (
        "warning: render differs: full in a; draft in b\nwarning: 1 of the 2 episodes of arm mask are not in all arms\n"
    )
    compare_arms(frame, "think")
    assert capsys.readouterr().err == expected
    success(frame)
    assert capsys.readouterr().err == expected


def test_what_cannot_be_compared_is_refused() -> None:
    frame = random_arms(1)
    with pytest.raises(UserError, match=r"^baseline: found 'nothing'; .*there are think; mask; random$"):
        compare_arms(frame, "nothing")
    numbered = frame.assign(arm=frame["run"].factorize()[0])
    with pytest.raises(UserError, match="there are 0; 1; 2; 3; 4; 5$"):
        compare_arms(numbered, "think")
    with pytest.raises(UserError, match=r"^baseline: .*at least two arms"):
        compare_arms(frame[frame["arm"] == "think"], "think")
    with pytest.raises(UserError, match=r"^by: found \['seed'\]"):
        compare_arms(frame, "think", by=["seed"])
    with pytest.raises(UserError, match=r"^arm mask: libero_goal task 0, init state \d+, seed 0 stands twice"):
        compare_arms(pd.concat([frame, frame[frame["arm"] == "mask"]]), "think")
    apart = frame[(frame["arm"] == "think") ^ (frame["suite"] == "libero_10")]
    with pytest.raises(UserError, match=r"^arm mask: no episode in common with think"):
        compare_arms(apart[apart["arm"].isin(["think", "mask"])], "think")
    with pytest.raises(UserError, match=r"^frame: it has no column sweet"):
        success(frame, ["sweet"])
    with pytest.raises(UserError, match=r"^frame: it has no rows"):
        success(frame[:0])


def test_two_whole_benchmarks_become_tables_and_figures(tmp_path: Path) -> None:
    """500 episodes of 30 decisions each: tables, paired statistics and five figures."""
    benchmark(tmp_path / "think", "think", lambda task, state: state >= 2)
    benchmark(tmp_path / "mask", "mask", lambda task, state: (task + state) % 7 > 0)
    runs = read_runs(tmp_path)
    frame, decisions = episode_frame(runs), decision_frame(runs)
    arms, tasks = success(frame), success(frame, ["arm", "suite", "task_id", "task"])
    compared = compare_arms(frame, "think")
    text = markdown_table(*success_table(arms)) + latex_table(*difference_table(compared))
    text += markdown_table(*crossed_success_table(tasks, "arm")) + markdown_table(
        *number_table(latency_quantiles(decisions))
    )
    for name, figure in {
        "arms": plot_success(arms),
        "tasks": plot_tasks(tasks),
        "difference": plot_differences(compared),
        "latency": plot_latency(decisions),
        "time": plot_over_time(over_time(decisions)),
    }.items():
        save_figure(figure, tmp_path / name, ["png"])
    assert "480/500" in text
