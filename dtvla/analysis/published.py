"""Published results as data, with their sources.

Four tables lie beside this file, in ``published/``: ``tasks.csv`` (successes in DeepThinkVLA's own logs, of 50 episodes
of every task), ``systems.csv`` (percentages that are printed for other systems and settings), ``claims.csv`` (what is
printed about DeepThinkVLA) and ``latency.csv`` (speed and memory: of decisions, RL, evaluation and training). Every row
names its source; everything else is computed from them.
"""

from typing import TYPE_CHECKING

from dtvla.analysis.intervals import wilson
from dtvla.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
ALL = "all"
NAMES = {
    "sft": "DeepThinkVLA SFT",
    "rl": "DeepThinkVLA RL",
    "rl1": "DeepThinkVLA RL, run 1",
    "rl2": "DeepThinkVLA RL, run 2",
    "rl_pooled": "DeepThinkVLA RL, both runs",
    "mask": "DeepThinkVLA SFT, masked thought",
    "random": "DeepThinkVLA SFT, random thought",
    "hybrid-cot": "hybrid decoder with thought",
    "autoregressive-cot": "autoregressive decoder with thought",
    "sft-thinking": "SFT with thought",
    "sft-thinking-shifted": "SFT with thought, under shift",
    "sft-silent": "SFT without thought",
    "sft-silent-shifted": "SFT without thought, under shift",
}
# The published 97.0 % takes the second run's Object and the first run's rest; Spatial and Long are equal in both.
HEADLINE = {"libero_spatial": "rl1", "libero_object": "rl2", "libero_goal": "rl1", "libero_10": "rl1"}
PRINTED_PRECISION = 0.05  # percentages are printed with one decimal; halves are found rounded up and down


def load(table: str) -> "pd.DataFrame":
    """One of the tables as it is in the package: ``tasks``, ``systems``, ``claims`` or ``latency``.

    Cells that the source leaves open are NaN (numbers) or empty (words).

    Raises:
        UserError: the installed package has no such table.
    """
    from importlib.resources import files

    import pandas as pd

    found = files("dtvla.analysis").joinpath("published", f"{table}.csv")
    if not found.is_file():
        raise UserError(
            f"table: {table!r} is not among the published results; choose tasks, systems, claims or latency, "
            "or install dtvla again if it is one of these"
        )
    with found.open(encoding="utf-8") as file:
        frame = pd.read_csv(file)
    return frame.fillna({name: "" for name in frame.columns if not pd.api.types.is_numeric_dtype(frame[name])})


def labels() -> dict[str, str]:
    """Every run's name in words."""
    systems = load("systems").drop_duplicates("run")
    words = (systems["system"] + " (" + systems["setting"] + ")").str.replace(" ()", "", regex=False)
    return {**dict(zip(systems["run"], words, strict=True)), **NAMES}


def counts() -> "pd.DataFrame":
    """Successes and episodes of every published run on LIBERO, as far as they are known.

    Columns: run, suite, task_id, successes, episodes. DeepThinkVLA's runs have a row for each task, with two made of
    them: ``rl`` (the mix behind the published headline, see :data:`HEADLINE`) and ``rl_pooled`` (both runs together,
    on the suites that both were evaluated on). Other systems have one row for each suite (task_id -1) if the number of
    episodes is known; their count is the one nearest to the printed percentage.
    """
    import pandas as pd

    columns = ["run", "suite", "task_id", "successes", "episodes"]
    tasks = load("tasks")[columns]
    headline = tasks[tasks["run"] == tasks["suite"].map(HEADLINE)].assign(run="rl")
    both = tasks[tasks["run"].isin(["rl1", "rl2"])].groupby(["suite", "task_id"], sort=False)
    pooled = both[["successes", "episodes"]].sum()[both.size() == 2].reset_index().assign(run="rl_pooled")
    systems = load("systems").query("benchmark == 'LIBERO' and split in @SUITES and episodes.notna()", engine="python")
    systems = systems.assign(
        suite=systems["split"],
        task_id=-1,
        successes=(systems["percent"] * systems["episodes"] / 100).round().astype(int),
        episodes=systems["episodes"].astype(int),
    )
    return pd.concat([frame[columns] for frame in (tasks, headline, pooled, systems)], ignore_index=True)


def rates(table: "pd.DataFrame") -> "pd.DataFrame":
    """Success of every run by suite and over all its suites, with Wilson's 95 % interval.

    Args:
        table: run, suite, successes, episodes, as :func:`counts` gives them.

    Returns:
        Columns run, suite (``all`` for the total), successes, episodes, percent, low, high (percent). A total mixes
        the suites by their episodes; runs that lack a suite have a total of fewer episodes.
    """
    import pandas as pd

    suites = table.groupby(["run", "suite"], sort=False)[["successes", "episodes"]].sum().reset_index()
    totals = suites.groupby("run", sort=False)[["successes", "episodes"]].sum().reset_index().assign(suite=ALL)
    rows = pd.concat([suites, totals], ignore_index=True)
    found = [wilson(won, of) for won, of in zip(rows["successes"].tolist(), rows["episodes"].tolist(), strict=True)]
    rows["percent"] = 100 * rows["successes"] / rows["episodes"]
    rows["low"] = [100 * rate.low for rate in found]
    rows["high"] = [100 * rate.high for rate in found]
    return rows


def recount_claims() -> "pd.DataFrame":
    """What was printed beside what the counts say.

    Returns:
        The claims with columns recounted (percent or points; NaN where no counts were published) and agrees (True,
        False, or None where nothing can be recounted). Printed are percentages with one decimal, and halves are
        rounded either way: both 97.0 and 97.1 agree with 97.05.
    """
    claims, values = load("claims"), []
    percent = rates(counts()).set_index(["run", "suite"])["percent"].to_dict()
    for claim in claims.itertuples():
        suite = ALL if claim.split == "average" else claim.split
        value = percent.get((claim.run, suite), float("nan"))
        values.append(value - percent.get((claim.baseline, suite), float("nan")) if claim.baseline else value)
    claims["recounted"] = values
    off = (claims["recounted"] - claims["printed"]).abs()
    claims["agrees"] = [None if gap != gap else gap <= PRINTED_PRECISION + 1e-9 for gap in off]
    return claims
