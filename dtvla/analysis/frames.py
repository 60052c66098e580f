"""Any set of evaluations as tidy pandas frames: a row for each episode, and a row for each decision.

Columns of both:

    ==================  ==============================================================================================
    run                 name of the results folder, with as many parents as tell it from the others
    arm                 what is compared, in words: the settings under study in which the runs differ
    policy, checkpoint  name of the run that was evaluated; first digits of the SHA-256 of its files
    cot, cot.*          what happened to the thought (think, mask, ...), and the settings of its mode
    decoder             hybrid or autoregressive; None in results from before it was recorded
    compat.*, quantize  the other settings under study
    rule.*              settings, device and type of numbers that should be alike: rule.render, rule.max_steps, ...
    version.*           of the packages that scores depend on
    machine             GPU, or the processor where there is none
    suite, task_id      LIBERO's task; ``task`` is its instruction
    init_state, seed    which episode of the task
    success             whether it was solved
    ==================  ==============================================================================================
"""

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from math import isnan, nan
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from dtvla.errors import UserError
from dtvla.rollout.journal import RUN_FILE
from dtvla.rollout.results import RESULTS_FILE, EpisodeResult, Results, policy_name, read_results

if TYPE_CHECKING:
    import pandas as pd

KEY = ["suite", "task_id", "init_state", "seed"]
"""Columns that tell the episodes of a run apart."""
TRAINING = "training"
"""Column that tells trainings of an arm apart, of :func:`number_trainings`."""
MODE_ORDER = ("think", "mask", "random", "shuffle", "given", "none")
NOT_RECORDED = "not recorded"
DIGEST_DIGITS = 12
_SUBJECT = ("cot", "compat", "quantize")  # settings that evaluations are made to differ in, besides the checkpoint
_SELECTION = ("suite", "task_ids", "init_states", "seed")  # what the rows tell
_COMPUTED_ON = ("device", "dtype")  # recorded beside the settings
_PER_SUITE = ("rule.max_steps",)  # LIBERO's protocols give every suite a limit of its own
_UNKNOWN_IF_MISSING = ("rule.chunk",)  # measured; an episode of one decision does not tell it

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


@dataclass(frozen=True)
class Run:
    """One results folder.

    Attributes:
        name: of the folder, with as many parents as tell it from the other runs.
        folder: where it is.
        results: what is in it.
    """

    name: str
    folder: Path
    results: Results

    @property
    def mode(self) -> str:
        """What happened to the thought."""
        return str(self.results.settings.get("cot", {}).get("mode"))


def mode_place(run: Run) -> int:
    """Place of a run among others: think first, unknown modes last."""
    return MODE_ORDER.index(run.mode) if run.mode in MODE_ORDER else len(MODE_ORDER)


def load_results(paths: Paths) -> "pd.DataFrame":
    """Read evaluations into a frame with a row for each episode; several are put one below the other.

    Besides the columns that the module names: ``steps``, ``decisions``, ``thought_tokens`` (mean of the decisions, as
    written by the model), ``latency_ms`` (median of the decisions).

    Args:
        paths: results folders, ``results.json`` files, or folders with results folders anywhere below; one or several.

    Raises:
        UserError: nothing is there, or a file is damaged.
    """
    return episode_frame(read_runs(paths))


def read_runs(paths: Paths) -> list[Run]:
    """Read evaluations, each folder once, in the order of `paths`; unfinished ones are said and left out.

    Raises:
        UserError: nothing is there, or a file is damaged.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not given:
        raise UserError("results: no folder was given; give folders that dtvla evaluate wrote")
    folders: dict[Path, None] = {}
    unfinished: dict[Path, None] = {}
    for path in (Path(p).expanduser() for p in given):
        if not path.exists():
            raise UserError(f"results: {path} does not exist; give folders that dtvla evaluate wrote")
        if path.is_file():
            folders[path.parent.resolve()] = None
            continue
        folders |= {found.parent.resolve(): None for found in sorted(path.rglob(RESULTS_FILE))}
        unfinished |= {found.parent.resolve(): None for found in sorted(path.rglob(RUN_FILE))}
    names = short_names([*folders, *(folder for folder in unfinished if folder not in folders)])
    for folder in unfinished:
        if folder not in folders:
            say(f"{names[folder]} is not finished and left out; the same dtvla evaluate continues it")
    if not folders:
        raise UserError(f"results: no {RESULTS_FILE} in {', '.join(map(str, given))}; run dtvla evaluate first")
    return [Run(names[folder], folder, read_results(folder)) for folder in folders]


def episode_frame(runs: Sequence[Run]) -> "pd.DataFrame":
    """A row for each episode, see :func:`load_results`."""
    import pandas as pd

    rows = [{"run": run.name, **_episode(e)} for run in runs for e in run.results.episodes]
    return _with_run_facts(pd.DataFrame(rows, columns=["run", *_episode(_NO_EPISODE)]), runs)


def decision_frame(runs: Sequence[Run]) -> "pd.DataFrame":
    """A row for each decision.

    Besides the columns that the module names: ``decision`` (its number in the episode), ``step`` (policy steps before
    it), ``thought`` (text), ``tokens``, ``forwards``, ``truncated``, ``gripper`` (what the chunk tells the gripper, a
    letter a step: c close, o open; None where it was not recorded), ``latency_ms``.
    """
    import pandas as pd

    rows = [
        (run.name, e.suite, e.task_id, e.instruction, e.init_state, e.seed, e.success, number)
        + (t.step, t.text, t.tokens, t.forwards, t.truncated, t.gripper, None if s is None else 1000 * s)
        for run in runs
        for e in run.results.episodes
        for number, (t, s) in enumerate(zip_longest(e.thoughts, e.latency[: len(e.thoughts)]))
    ]
    names = ["run", "suite", "task_id", "task", "init_state", "seed", "success", "decision"]
    names += ["step", "thought", "tokens", "forwards", "truncated", "gripper", "latency_ms"]
    frame = pd.DataFrame(rows, columns=names).astype({"latency_ms": float, "gripper": object})
    return _with_run_facts(frame, runs)


def number_trainings(frame: "pd.DataFrame", runs: Sequence[Run], trainings: Sequence[Path]) -> "pd.DataFrame":
    """Several trainings of the same arms in one frame, so that each is paired with itself.

    Args:
        frame: of :func:`episode_frame` or :func:`decision_frame`.
        runs: that it was made of.
        trainings: for each training a folder that has its runs anywhere below.

    Returns:
        The frame with a column ``training``, the folder's name, and with other seeds in every training. Episodes of
        an init state stay together, so that another training of an arm does not count as another init state.
    """
    folders = list(enumerate(trainings))
    numbers = {r.name: next(n for n, f in folders if r.folder.is_relative_to(f.resolve())) for r in runs}
    number = frame["run"].map(numbers)
    names = number.map({n: f.name for n, f in folders})
    return frame.assign(**{TRAINING: names}, seed=frame["seed"] + number * (frame["seed"].max() + 1))


def check_poolable(frame: "pd.DataFrame") -> list[str]:
    """What stands against reading the rows as one experiment, a sentence each; none when nothing does.

    Named are rules (of the simulation, device, type of numbers) and versions that differ, tasks whose instruction
    differs, settings under study that differ within an arm (of frames that were joined, or arms that were renamed),
    episodes that stand twice in an arm, and episodes that not all arms have run.

    Args:
        frame: of :func:`episode_frame`, all or part of it.
    """
    found = []
    for column in (c for c in frame.columns if c.startswith(("rule.", "version."))):
        suites = frame.groupby("suite", sort=False) if column in _PER_SUITE else [(None, frame)]
        for suite, rows in suites:
            where = "" if suite is None or frame["suite"].nunique() == 1 else f" in {suite}"
            found += [f"{_spoken(column)} differs{where}: {what}" for what in _different(rows, column)]
    words = frame.groupby(["suite", "task_id"], sort=False)["task"].unique()
    for (suite, task_id), texts in words[words.str.len() > 1].items():
        found.append(f"instruction of {suite} task {task_id} differs: {' / '.join(texts)}")
    alike = ["arm", *(name for name in frame.columns if name == TRAINING)]  # trainings of an arm are told apart
    for (arm, *_), rows in frame.groupby(alike, sort=False):
        runs = under_study(rows)
        found += [
            f"{column} differs within arm {arm}: {what}"
            for column in runs.columns[1:]
            for what in _different(runs, column)
        ]
    for arm, rows in frame.groupby("arm", sort=False):
        twice = int(rows.duplicated(KEY).sum())
        if twice:
            found.append(f"{twice} episodes stand twice or more in arm {arm} (runs {_listed(rows['run'].unique())})")
    return found + _unpaired(frame)


def under_study(frame: "pd.DataFrame") -> "pd.DataFrame":
    """A row for each run: its name and its settings under study; what it does not have is as good as None."""
    names = [c for c in frame.columns if c in ("checkpoint", "decoder") or c.split(".")[0] in _SUBJECT]
    runs = frame.drop_duplicates("run")[["run", *names]].astype(object)
    return runs.where(runs.notna(), None)


def say(sentence: str) -> None:
    """Print a warning for whoever runs the command or the notebook; it names no file of this package."""
    print(f"warning: {sentence}", file=sys.stderr)


def shown(value: Any) -> str:
    """A setting or version as a warning or the name of an arm tells it."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return NOT_RECORDED if isnan(value) else f"{value:g}"
    return str(value)


def _different(rows: "pd.DataFrame", column: str) -> list[str]:
    """``full in think; draft in mask, random``, or nothing."""
    runs = rows.drop_duplicates("run").set_index("run")[column]
    if column in _UNKNOWN_IF_MISSING:
        runs = runs.dropna()
    values: dict[str, list[str]] = {}
    for run, value in runs.items():
        values.setdefault(shown(value), []).append(str(run))
    return ["; ".join(f"{value} in {_listed(names)}" for value, names in values.items())] if len(values) > 1 else []


def _unpaired(frame: "pd.DataFrame") -> list[str]:
    keys = {arm: set(rows[KEY].itertuples(index=False, name=None)) for arm, rows in frame.groupby("arm", sort=False)}
    shared = set.intersection(*keys.values()) if keys else set()
    if keys and not shared:
        return [f"none of the {len(set().union(*keys.values()))} episodes is in all arms"]
    alone = {arm: len(own) - len(shared) for arm, own in keys.items() if len(own) > len(shared)}
    return [
        f"{count} of the {len(keys[arm])} episodes of arm {arm} are not in all arms" for arm, count in alone.items()
    ]


def _with_run_facts(frame: "pd.DataFrame", runs: Sequence[Run]) -> "pd.DataFrame":
    """The rows with what is the same for all of their run; columns that a run does not have are NaN."""
    import pandas as pd

    facts = [_run_facts(run.results) for run in runs]
    table = pd.DataFrame(facts, index=[run.name for run in runs], dtype=object).infer_objects()
    joined = frame.join(table, on="run")
    joined.insert(1, "arm", joined["run"].map(dict(zip(table.index, _arms(facts), strict=True))))
    return joined


def _run_facts(results: Results) -> dict[str, Any]:
    settings, provenance = results.settings, results.provenance
    given = provenance.get("config", {}).get("checkpoint") or provenance.get("checkpoint")
    subject: dict[str, Any] = {}
    for name in _SUBJECT:
        value = settings.get(name)
        if isinstance(value, Mapping):
            subject |= {name if key == "mode" else f"{name}.{key}": part for key, part in value.items()}
        else:
            subject[name] = value
    rules = {
        f"rule.{k}": _plain(v) for k, v in settings.items() if k not in ("checkpoint_sha256", *_SUBJECT, *_SELECTION)
    }
    rules |= {f"rule.{name}": provenance.get(name, nan) for name in _COMPUTED_ON}
    digest = settings.get("checkpoint_sha256")
    machine = provenance.get("machine", {})
    return {
        "policy": policy_name(Path(str(given))) if given else None,
        "checkpoint": digest and digest[:DIGEST_DIGITS],
        "decoder": provenance.get("decoder"),
        **{name: _plain(value) for name, value in subject.items()},
        **rules,
        "rule.chunk": _chunk(results.episodes),
        **{f"version.{name}": version for name, version in provenance.get("versions", {}).items()},
        "machine": ", ".join(dict.fromkeys(machine.get("gpus") or [])) or machine.get("processor"),
    }


def _chunk(episodes: Sequence[EpisodeResult]) -> int | None:
    """Steps between decisions, all of which a chunk decides; None when no episode has two decisions."""
    gaps = [after.step - before.step for e in episodes for before, after in pairwise(e.thoughts)]
    return max(gaps, default=None)


def _arms(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each run the settings under study in which it may differ from the others, in words."""
    names = ["decoder", *dict.fromkeys(n for facts in runs for n in facts if n.split(".")[0] in _SUBJECT)]
    different = [name for name in names if name != "cot" and len({shown(f.get(name)) for f in runs}) > 1]
    parts = [[_part(name, facts.get(name)) for name in different] for facts in runs]
    if len({facts["checkpoint"] for facts in runs}) > 1:
        parts = [[_checkpoint(facts, runs), *part] for facts, part in zip(runs, parts, strict=True)]
    if not any(parts) or len({shown(facts.get("cot")) for facts in runs}) > 1:
        parts = [[shown(facts.get("cot")), *part] for facts, part in zip(runs, parts, strict=True)]
    return [", ".join(part) for part in parts]


def _part(name: str, value: Any) -> str:
    if name == "decoder":
        return f"decoder {NOT_RECORDED}" if value is None else str(value)
    return f"{name.rpartition('.')[2].replace('_', ' ')} {shown(value)}"


def _checkpoint(facts: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    """The policy's name, with the first digits of its digest where another checkpoint has the same name."""
    name, digest = facts["policy"], facts["checkpoint"]
    alike = {other["checkpoint"] for other in runs if other["policy"] == name}
    return f"{name or 'checkpoint'} {shown(digest)}" if len(alike) > 1 or name is None else str(name)


def _plain(value: Any) -> Any:
    """Lists as text, so that every cell can be compared and grouped."""
    return str(value) if isinstance(value, list | dict) else value


def _spoken(column: str) -> str:
    kind, _, name = column.partition(".")
    return f"version of {name}" if kind == "version" else name


def _listed(names: Iterable[str], most: int = 4) -> str:
    known = list(names)
    rest = f" and {len(known) - most} more" if len(known) > most else ""
    return ", ".join(known[:most]) + rest


def short_names(folders: Sequence[Path]) -> dict[Path, str]:
    """For each folder its name, with as many parents as tell it from the others."""
    depths = dict.fromkeys(folders, 1)
    while True:
        names = {folder: "/".join(folder.parts[-depth:]) for folder, depth in depths.items()}
        taken = list(names.values())
        clashes = [f for f, name in names.items() if taken.count(name) > 1 and depths[f] < len(f.parts)]
        if not clashes:
            return names
        depths |= {folder: depths[folder] + 1 for folder in clashes}


_NO_EPISODE = EpisodeResult("", 0, "", 0, 0, False, 0)


def _episode(e: EpisodeResult) -> dict[str, Any]:
    tokens = [thought.tokens for thought in e.thoughts]
    return {
        "suite": e.suite,
        "task_id": e.task_id,
        "task": e.instruction,
        "init_state": e.init_state,
        "seed": e.seed,
        "success": e.success,
        "steps": e.steps,
        "decisions": len(e.thoughts),
        "thought_tokens": sum(tokens) / len(tokens) if tokens else float("nan"),
        "latency_ms": 1000 * median(e.latency) if e.latency else float("nan"),
    }
