"""Published results: complete and sourced, every printed mean recomputed, verdicts held to independent numbers."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import fisher_exact

from dtvla.analysis import published
from dtvla.analysis.intervals import wilson
from dtvla.analysis.published import ALL, SUITES, counts, labels, load, rates, recount_claims
from dtvla.analysis.resampling import holm
from dtvla.analysis.unpaired import two_proportion_z
from dtvla.analysis.verdicts import PAIRS, SYSTEM_PAIRS, differences, in_words
from dtvla.errors import UserError

TABLES = ("tasks", "systems", "claims", "latency")
KEYS = {
    "tasks": ["run", "suite", "task_id"],
    "systems": ["run", "benchmark", "split"],
    "claims": ["run", "baseline", "split", "source"],
    "latency": ["system", "setting", "hardware", "quantity"],
}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return counts()


@pytest.fixture(scope="module")
def own(table: pd.DataFrame) -> pd.DataFrame:
    return differences(table).set_index(["a", "b", "suite"]).sort_index()


def half_digits(printed: pd.Series) -> pd.Series:
    """Half a unit of the last digit that is printed, and a hair for binary fractions."""
    return 0.5 * 10.0 ** -printed.str.partition(".")[2].str.len() + 1e-9


def printed_systems() -> pd.DataFrame:
    """The systems' table with its percentages as they are written."""
    path = published.__file__.removesuffix(".py") + "/systems.csv"
    return load("systems").assign(printed=pd.read_csv(path, dtype=str)["percent"])


@pytest.mark.parametrize("name", TABLES)
def test_every_row_has_a_source_and_stands_once(name: str) -> None:
    frame = load(name)
    assert len(frame) > 10
    assert frame["source"].str.len().gt(10).all()
    assert not frame.duplicated(KEYS[name]).any()


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(UserError, match="'results' is not among"):
        load("results")


def test_tables_are_in_the_wheel(repository: object) -> None:
    from hatchling.builders.wheel import WheelBuilder

    packed = {file.distribution_path for file in WheelBuilder(str(repository)).recurse_included_files()}
    assert {f"dtvla/analysis/published/{name}.csv" for name in TABLES} <= packed


def test_tasks_are_those_of_the_suites_in_their_order() -> None:
    from dtvla.sim.suites import get_tasks

    expected = [task.instruction for suite in SUITES for task in get_tasks(suite, None)]
    tasks = load("tasks")
    for run in ("sft", "rl1", "mask", "random"):
        assert tasks[tasks["run"] == run]["task"].tolist() == expected
    assert tasks[tasks["run"] == "rl2"]["task"].tolist() == expected[:20] + expected[30:]
    assert (tasks["episodes"] == 50).all()
    assert tasks["successes"].between(0, 50).all()


@pytest.mark.parametrize(
    ("run", "by_suite", "mean", "low", "high"),
    [
        ("sft", [486, 495, 484, 471], 96.80, 95.9, 97.5),
        ("rl", [483, 495, 482, 481], 97.05, 96.2, 97.7),
        ("rl1", [483, 494, 482, 481], 97.00, 96.2, 97.7),
        ("mask", [486, 495, 480, 468], 96.45, 95.5, 97.2),
        ("random", [472, 489, 301, 439], 85.05, 83.4, 86.5),
    ],
)
def test_published_means_are_recomputed_exactly(
    table: pd.DataFrame, run: str, by_suite: list[int], mean: float, low: float, high: float
) -> None:
    found = rates(table).set_index(["run", "suite"]).loc[run]
    assert found.loc[list(SUITES), "successes"].tolist() == by_suite
    assert found.loc[ALL, "episodes"] == 2000
    assert found.loc[ALL, "percent"] == mean
    assert found.loc[list(SUITES), "percent"].mean() == pytest.approx(mean)
    assert found.loc[ALL, ["low", "high"]].tolist() == pytest.approx([low, high], abs=0.05)


def test_printed_averages_are_those_of_their_suites() -> None:
    systems = printed_systems()
    compared = 0
    for _, rows in systems.groupby(["run", "benchmark"]):
        suites = rows[rows["split"].str.startswith("libero_")]
        average = rows[rows["split"].str.startswith("average")]
        if len(suites) >= 4 and len(average):
            assert abs(suites["percent"].mean() - average["percent"].item()) <= half_digits(average["printed"]).item()
            compared += 1
    assert compared >= 14


def test_printed_percentages_can_come_from_the_episodes_that_are_given() -> None:
    """Apart from those whose note says that they can't; with those, the note is needed."""
    systems = printed_systems().dropna(subset="episodes")
    systems = systems[systems["split"].isin(SUITES)]
    nearest = (systems["percent"] * systems["episodes"] / 100).round()
    off = (100 * nearest / systems["episodes"] - systems["percent"]).abs() > half_digits(systems["printed"])
    flagged = systems["note"].str.contains("no multiples")
    assert not (off & ~flagged).any()
    assert off.groupby(systems["run"]).any()[systems[flagged]["run"].unique()].all()


def test_claims_agree_with_the_counts_where_there_are_any() -> None:
    claims = recount_claims()
    assert claims["agrees"].tolist() == [True] * 11 + [None] * 5
    headline = claims[(claims["run"] == "rl") & (claims["split"] == "average")]
    assert headline["printed"].item() == 97.0
    assert headline["recounted"].item() == pytest.approx(97.05)


def test_a_claim_that_the_counts_do_not_bear_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def louder(name: str) -> pd.DataFrame:
        frame = load(name)
        return frame.assign(printed=frame["printed"] + 0.2) if name == "claims" else frame

    monkeypatch.setattr(published, "load", louder)
    assert published.recount_claims()["agrees"].tolist() == [False] * 11 + [None] * 5


def test_the_gain_of_rl_is_not_significant(own: pd.DataFrame) -> None:
    total, long = own.loc["sft", "rl", ALL], own.loc["sft", "rl", "libero_10"]
    assert total["points"] == pytest.approx(0.25)
    assert (round(total["z"], 2), round(long["z"], 2)) == (0.46, 1.48)
    assert round(total["p_z"], 2) == 0.65
    assert not own.loc["sft", "rl"]["significant"].any()
    assert own.loc["sft", "rl", "libero_spatial"]["points"] < 0 > own.loc["sft", "rl", "libero_goal"]["points"]


def test_a_masked_thought_costs_nothing_that_is_significant(own: pd.DataFrame) -> None:
    total = own.loc["sft", "mask", ALL]
    assert (total["points"], round(total["z"], 2)) == (pytest.approx(-0.35), -0.61)
    assert not own.loc["sft", "mask"]["significant"].any()


def test_a_random_thought_costs_most_on_goal(own: pd.DataFrame) -> None:
    found = own.loc["sft", "random"]
    assert found["significant"].to_dict() == {
        "libero_spatial": False,  # below 5 % alone, not among twenty tests
        "libero_object": False,
        "libero_goal": True,
        "libero_10": True,
        ALL: True,
    }
    assert found.loc["libero_spatial", "p"] < 0.05
    assert found["points"].idxmin() == "libero_goal"


def test_pooling_the_logs_of_long_brings_rl_near_significance(table: pd.DataFrame) -> None:
    both = differences(table, [("sft", "rl_pooled")]).set_index("suite")
    assert both.loc[ALL, "suites"] == 3  # the second run has no Goal
    assert round(both.loc["libero_10", "p_z"], 2) == 0.08
    logs = table[(table["suite"] == "libero_10") & table["run"].str.match("rl[12]$|deepthinkvla-unlabelled")]
    assert (logs["successes"].sum(), logs["episodes"].sum()) == (2405, 2500)
    assert round(two_proportion_z(wilson(471, 500), wilson(2405, 2500))[0], 2) == 2.05


def test_stratified_p_equals_a_simulation_of_shuffled_episodes(table: pd.DataFrame, own: pd.DataFrame) -> None:
    """Deal the episodes of every task anew to SFT and RL; count how often the total is no likelier than the real."""
    by_task = table.set_index(["run", "suite", "task_id"])["successes"]
    a, b = by_task.loc["sft"], by_task.loc["rl"]
    won = (a + b.loc[a.index]).to_numpy()
    rng = np.random.default_rng(0)
    draws = rng.hypergeometric(won[None], 100 - won[None], 50, size=(100_000, len(won))).sum(axis=1)
    chance = pd.Series(draws).value_counts(normalize=True)
    centre = won.sum() / 2  # the groups are equally large, so that the distribution is symmetric
    extreme = np.abs(chance.index - centre) >= abs(a.sum() - centre)
    assert own.loc["sft", "rl", ALL]["p"] == pytest.approx(chance[extreme].sum(), abs=0.01)


def test_tasks_are_not_thrown_together() -> None:
    """A task that nobody solves says nothing, and hides nothing of what the other one says."""
    columns = ["run", "suite", "task_id", "successes", "episodes"]
    rows = [("a", "s", 0, 50, 50), ("a", "s", 1, 0, 50), ("b", "s", 0, 43, 50), ("b", "s", 1, 0, 50)]
    row = differences(pd.DataFrame(rows, columns=columns), [("a", "b")]).iloc[0]
    assert row["p"] == pytest.approx(fisher_exact([[50, 0], [43, 7]])[1])
    assert row["p_fisher"] == pytest.approx(fisher_exact([[50, 50], [43, 57]])[1])
    assert row["significant"]


def test_corrections_count_every_row_and_suites_without_tasks_get_fishers_test(table: pd.DataFrame) -> None:
    frame = differences(table, SYSTEM_PAIRS)
    assert len(frame) == 5 * len(SYSTEM_PAIRS)
    assert frame["p_holm"].tolist() == holm(frame["p"].tolist())
    row = frame[(frame["a"] == "pi0-fast") & (frame["suite"] == "libero_object")].iloc[0]
    expected = fisher_exact([[484, 16], [495, 5]])[1]
    assert (row["p"], row["p_fisher"]) == (pytest.approx(expected), pytest.approx(expected))
    beaten = frame[frame["suite"] == ALL].set_index("a")
    assert beaten.loc["pi0-fast", "significant"]
    assert not beaten.loc["oft-joint", "significant"]
    assert beaten.loc["simplevla-rl", "points"].tolist() == pytest.approx(-2.0)


def test_pairs_that_can_not_be_compared_are_refused(table: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="no run 'sftt'; there are .*sft"):
        differences(table, [("sftt", "rl")])
    with pytest.raises(UserError, match="no suite in common"):
        differences(table, [("deepthinkvla-unlabelled-1", "deepthinkvla-unlabelled-4")])
    with pytest.raises(UserError, match="none given"):
        differences(table, [])
    own_run = table[(table["run"] == "sft") & (table["suite"] == "libero_goal")].assign(run="ours")
    for ours in (own_run[own_run["task_id"] < 5], own_run.assign(episodes=[50] * 9 + [100])):
        with pytest.raises(UserError, match="sft and ours have other"):
            differences(pd.concat([table, ours]), [("sft", "ours")])


def test_words_name_size_interval_and_verdict(table: pd.DataFrame) -> None:
    sentences = in_words(differences(table, PAIRS))
    assert sentences[4].startswith(
        "DeepThinkVLA RL against DeepThinkVLA SFT, 4 suites: +0.25 points (97.05 % against 96.80 %; 95 % interval -0.8"
    )
    assert sentences[4].endswith("corrected 1.00: not significant (n.s.)")
    assert sentences[14].endswith("p <0.0001, corrected <0.0001: significant")


def test_every_run_has_a_name_of_its_own(table: pd.DataFrame) -> None:
    names = labels()
    runs = table["run"].unique()
    assert len({names[run] for run in runs}) == len(runs)
    claims = load("claims")
    assert {*claims["run"], *claims["baseline"]} - {""} <= names.keys()
