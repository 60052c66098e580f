"""Latencies, thought lengths and their course, against numpy over plain lists."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluations import episode, evaluation

from dtvla.analysis.frames import Run, decision_frame
from dtvla.analysis.thinking import latency_quantiles, over_time, thought_lengths
from dtvla.errors import UserError
from dtvla.rollout.results import EpisodeResult, Thought


def random_episodes(rng: np.random.Generator, episodes: int = 12) -> list[EpisodeResult]:
    made = []
    for state in range(episodes):
        count = int(rng.integers(1, 9))
        thoughts = [
            Thought(
                10 * k, " ".join("ab" for _ in range(rng.integers(0, 9))), bool(rng.random() < 0.3), tokens, forwards
            )
            for k, (tokens, forwards) in enumerate(rng.integers(1, 60, (count, 2)).tolist())
        ]
        made.append(episode(0, state, True, thoughts=thoughts, latency=rng.gamma(2, 0.1, count).tolist()))
    return made


@pytest.fixture(scope="module")
def episodes() -> dict[str, list[EpisodeResult]]:
    rng = np.random.default_rng(0)
    return {mode: random_episodes(rng) for mode in ("think", "shuffle")}


@pytest.fixture(scope="module")
def decisions(episodes: dict[str, list[EpisodeResult]]) -> pd.DataFrame:
    return decision_frame([Run(mode, Path(), evaluation(own, mode)) for mode, own in episodes.items()])


def test_latency_quantiles_are_numpys(decisions: pd.DataFrame, episodes: dict[str, list[EpisodeResult]]) -> None:
    table = latency_quantiles(decisions, quantiles=[0.5, 0.999]).set_index("arm")
    for mode, own in episodes.items():
        taken = [1000 * seconds for e in own for seconds in e.latency]
        expected = [len(taken), np.mean(taken), *np.quantile(taken, [0.5, 0.999])]
        assert table.loc[mode, ["decisions", "mean_ms", "p50_ms", "p99.9_ms"]].tolist() == pytest.approx(expected)


def test_lengths_are_counted(decisions: pd.DataFrame, episodes: dict[str, list[EpisodeResult]]) -> None:
    table = thought_lengths(decisions, quantiles=[0.9]).set_index("arm")
    for mode, own in episodes.items():
        thoughts = [thought for e in own for thought in e.thoughts]
        tokens = [t.tokens for t in thoughts]
        row = table.loc[mode]
        assert (row["mean_tokens"], row["p90_tokens"]) == pytest.approx((np.mean(tokens), np.quantile(tokens, 0.9)))
        assert (row["longest"], row["truncated"]) == (max(tokens), np.mean([t.truncated for t in thoughts]))
        assert row["words"] == pytest.approx(np.mean([t.text.count("ab") for t in thoughts]))
        assert row["tokens_per_forward"] == pytest.approx(sum(tokens) / sum(t.forwards for t in thoughts))


def test_thoughts_that_were_given_cost_no_forwards() -> None:
    given = [episode(0, 0, True, thoughts=[Thought(0, "some words", False, 0, 0)])]
    (row,) = thought_lengths(decision_frame([Run("r", Path(), evaluation(given, "given"))])).to_dict("records")
    assert np.isnan(row["tokens_per_forward"])
    assert (row["mean_tokens"], row["words"]) == (0, 2)


def test_course_has_means_and_quartiles_where_enough_episodes_are_left(
    decisions: pd.DataFrame, episodes: dict[str, list[EpisodeResult]]
) -> None:
    table = over_time(decisions, "tokens", least=4)
    rows = 0
    for mode, own in episodes.items():
        for step in range(0, 90, 10):
            tokens = [t.tokens for e in own for t in e.thoughts if t.step == step]
            found = table[(table["arm"] == mode) & (table["step"] == step)]
            assert len(found) == (len(tokens) >= 4)
            if len(tokens) >= 4:
                expected = [len(tokens), np.mean(tokens), *np.quantile(tokens, [0.25, 0.75])]
                assert found[["episodes", "mean", "low", "high"]].iloc[0].tolist() == pytest.approx(expected)
                rows += 1
    assert rows == len(table) > 8
    assert table["step"].is_monotonic_increasing


def test_latencies_of_different_machines_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    gpu = {"machine": {"processor": "A processor", "gpus": ["An accelerator"] * 8}, "device": "cuda"}
    runs = [
        Run("a", Path(), evaluation([episode(0, 0, True)])),
        Run("b", Path(), evaluation([episode(0, 0, True)], "mask", provenance=gpu)),
    ]
    latency_quantiles(decision_frame(runs))
    assert capsys.readouterr().err == (
        "warning: latencies were measured on different machine: A processor, An accelerator\n"
        "warning: latencies were measured on different device: cpu, cuda\n"
    )


def test_bad_quantiles_and_columns_are_refused(decisions: pd.DataFrame) -> None:
    with pytest.raises(UserError, match=r"^quantiles: found 99; "):
        latency_quantiles(decisions, quantiles=[99])
    with pytest.raises(UserError, match=r"^frame: it has no column weight"):
        over_time(decisions, "weight")
