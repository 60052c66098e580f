"""Tables of measured frames: LaTeX that compiles to the same text, and cells as a reader expects them."""

import re

import pandas as pd
import pytest

from dtvla.analysis.tables import latex_table, markdown_table
from dtvla.analysis.tabulate import crossed_success_table, difference_table, number_table, p_value, success_table

PRINTED = {  # what LaTeX prints for a command, from the LaTeX companion
    **{f"\\{sign}": sign for sign in "&%$#_{}"},
    **{r"\textbackslash ": "\\", r"\textasciitilde ": "~", r"\textasciicircum ": "^", "{[}": "[", "{*}": "*"},
}


def printed(source: str) -> str:
    """What LaTeX would print; fails at anything that is special to it and no command of the above."""
    tokens = re.findall("|".join(map(re.escape, sorted(PRINTED, key=len, reverse=True))) + r"|[\s\S]", source)
    assert not set(tokens) & set("&%$#_{}\\~^"), source
    return "".join(PRINTED.get(token, token) for token in tokens)


def test_a_latex_table_has_rules_places_and_all_cells() -> None:
    signs = "".join(map(chr, range(33, 127)))
    rows = [["[a] & b", "12/15", "-3.5 to +1", "<0.0001", ""], ["*c", "7 %", "+0.1", "0.2", "-"], [signs, *"1234"]]
    header = ["arm_name", "n", "difference", "p", "none"]
    lines = latex_table(header, rows, caption=r"50 \% of it", label="tab:arms_1").splitlines()
    assert lines[:3] == [r"\begin{table}", r"\caption{50 \% of it}", r"\label{tab:arms_1}"]
    assert lines[3:5] == [r"\begin{tabular}{lrrrr}", r"\toprule"]
    assert lines[6] == r"\midrule"
    assert lines[-3:] == [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    body = [re.split(r"(?<!\\) & ", line.removesuffix(r" \\")) for line in (lines[5], *lines[7:-3])]
    assert [[printed(cell) for cell in row] for row in body] == [header, *rows]
    assert not any(line.startswith(("[", "*")) for line in lines)  # LaTeX would take it for an option of the row before
    assert latex_table(header, rows).splitlines() == lines[3:-1]


def test_bad_tables_are_refused() -> None:
    for table in (latex_table, markdown_table):
        with pytest.raises(ValueError, match="does not have 2 cells"):
            table(["a", "b"], [["1"]])


def test_an_empty_table_keeps_its_header() -> None:
    assert r"\begin{tabular}{ll}" in latex_table(["a", "b"], [])
    assert markdown_table(["a", "b"], []).count("\n") == 1


RATES = pd.DataFrame(
    [
        ["think", "goal", 9, 10, 0.9, 0.59585, 0.98212],
        ["think", "long", 1, 2, 0.5, 0.1, 0.9],
        ["mask", "goal", 0, 4, 0.0, 0.0, 0.4899],
    ],
    columns=["arm", "suite", "successes", "episodes", "rate", "low", "high"],
)


def test_rates_as_cells() -> None:
    header, rows = success_table(RATES)
    assert header == ["arm", "suite", "solved", "success %", "95 % interval"]
    assert rows[0] == ["think", "goal", "9/10", "90.0", "59.6 to 98.2"]
    header, rows = crossed_success_table(RATES)
    assert header == ["arm", "goal", "long"]
    assert rows == [
        ["think", "90.0 (59.6 to 98.2)", "50.0 (10.0 to 90.0)"],
        ["mask", "0.0 (0.0 to 49.0)", "-"],
    ]


def test_differences_as_cells() -> None:
    row = {"suite": "goal", "arm": "mask", "baseline": "think", "pairs": 10, "only_arm": 1, "only_baseline": 4}
    row |= {"rate": 0.6, "baseline_rate": 0.9, "difference": -0.3, "low": -0.6, "high": 0.0, "p_value": 0.375}
    row |= {"p_holm": 0.00001, "left_out": 0, "baseline_left_out": 0}
    header, (cells,) = difference_table(pd.DataFrame([row]))
    assert dict(zip(header, cells, strict=True)) == {
        **{"suite": "goal", "arm": "mask", "against": "think", "pairs": "10", "success %": "90.0 to 60.0"},
        **{"lost:won": "4:1", "difference": "-30.0", "95 % interval": "-60.0 to +0.0"},
        **{"p": "0.38", "p (Holm)": "<0.0001"},
    }
    header, (cells,) = difference_table(pd.DataFrame([{**row, "left_out": 3}]))
    assert (header[-1], cells[-1]) == ("without partner", "3, 0")
    assert [p_value(p) for p in (9.9e-5, 1e-4, 0.0999, 0.1, 1.0)] == ["<0.0001", "0.0001", "0.0999", "0.10", "1.00"]


def test_numbers_as_cells() -> None:
    times = pd.DataFrame([["think", 5, 41.24, float("nan")]], columns=["arm", "decisions", "p50_ms", "p99_ms"])
    assert number_table(times) == (["arm", "decisions", "p50, ms", "p99, ms"], [["think", "5", "41.2", "-"]])
    agreed = pd.DataFrame([["think", 0.953, 0.9, 0.902]], columns=["arm", "share", "low", "kappa"])
    assert number_table(agreed) == (["arm", "share %", "low %", "kappa"], [["think", "95.3", "90.0", "0.90"]])
