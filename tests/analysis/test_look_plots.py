"""Figures of the inside: the numbers are where they belong."""

import numpy as np
import pandas as pd
import pytest

from dtvla.analysis.look_plots import plot_mass, plot_moments, plot_pattern, plot_sensitivity

SOURCES = ("agentview", "wrist", "prompt", "thought", "actions")


def test_attention_is_stacked_to_a_hundred_with_the_even_shares_last() -> None:
    rng, rows = np.random.default_rng(0), []
    even = rng.dirichlet(np.ones(5))
    for decision in range(3):
        for query in ("thought", "actions"):
            for layer in range(2):
                for source, share, one in zip(SOURCES, rng.dirichlet(np.ones(5)), even, strict=True):
                    rows.append({"decision": decision, "layer": layer, "query": query, "source": source})
                    rows[-1] |= {"share": share, "even": one}
    frame = pd.DataFrame(rows)
    figure = plot_mass(frame)
    for axes, query in zip(figure.axes, ("thought", "actions"), strict=True):
        bars = np.array([bar.get_height() for bar in axes.patches]).reshape(5, 3)  # sources, layers and even
        assert bars.sum(0).tolist() == pytest.approx([100, 100, 100])
        mine = frame[frame["query"] == query]
        for number, source in enumerate(SOURCES):
            of = mine[mine["source"] == source]
            expected = [*(of.loc[of["layer"] == layer, "share"].mean() for layer in (0, 1)), of["even"].mean()]
            assert bars[number].tolist() == pytest.approx([100 * value for value in expected])


def test_every_decision_is_a_dot_and_the_bar_is_their_mean() -> None:
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(
        [{"change": c, "distance": rng.random(), "shift": rng.random()} for c in ("one", "two") for _ in range(4)]
    )
    figure = plot_sensitivity(frame)
    for axes, column in zip(figure.axes, ("distance", "shift"), strict=True):
        dots, means = axes.lines[0::2], axes.lines[1::2]
        for dot, mean, change in zip(dots, means, ("one", "two"), strict=True):
            values = frame.loc[frame["change"] == change, column].tolist()
            assert list(dot.get_xdata()) == values
            assert list(mean.get_xdata()) == pytest.approx([np.mean(values)] * 2)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["one", "two"]


def test_patterns_are_dark_where_something_is_seen() -> None:
    matrix = np.tril(np.ones((6, 6)))
    figure = plot_pattern({"mask": matrix, "half": matrix / 2}, {"a": slice(0, 2), "b": slice(2, 6)})
    shown = [axes.images[0] for axes in figure.axes]
    for image, value in zip(shown, (1.0, 0.5), strict=True):
        shades = image.norm(image.get_array())
        assert np.allclose(shades[np.tril_indices(6)], 1 + np.log10(value) / 4)
        assert (shades[np.triu_indices(6, 1)] == 0).all()
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["a", "b"]


def test_moments_have_their_words_below() -> None:
    pictures = [np.full((8, 8, 3), shade, np.uint8) for shade in (0, 100, 200, 250)]
    figure = plot_moments(pictures, [f"step {n}: words" for n in range(4)], columns=3)
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "step 0: words",
        "step 1: words",
        "step 2: words",
        "step 3: words",
        "",
        "",
    ]
    assert [axes.images[0].get_array()[0, 0, 0] for axes in figure.axes[:4]] == [0, 100, 200, 250]
