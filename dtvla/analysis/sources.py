"""What lies in the folders that a page is asked for: training runs, and evaluations gathered into arms."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtvla.analysis.frames import Run, episode_frame, mode_place, read_runs, short_names
from dtvla.errors import UserError
from dtvla.rollout.results import RESULTS_FILE, EpisodeResult

if TYPE_CHECKING:
    import pandas as pd

METRICS_FILE = "metrics.csv"


@dataclass(frozen=True)
class Arm:
    """Evaluations that are alike in everything under study, for example the same policy on four suites.

    Attributes:
        name: what tells it from the other arms.
        runs: its evaluations.
    """

    name: str
    runs: list[Run]

    @property
    def episodes(self) -> list[tuple[Run, EpisodeResult]]:
        """All episodes, each with the run that it belongs to."""
        return [(run, episode) for run in self.runs for episode in run.results.episodes]


@dataclass(frozen=True)
class Sources:
    """What a page is about.

    Attributes:
        trainings: folders of training runs, those with ``metrics.csv``, by names that tell them apart.
        arms: finished evaluations; the first arm is the one that the others are compared with.
        frame: a row for each episode of all arms, see :mod:`dtvla.analysis.frames`; None without evaluations.
    """

    trainings: dict[str, Path]
    arms: list[Arm]
    frame: "pd.DataFrame | None"


def find_sources(folders: Sequence[Path], evaluations_root: Path) -> Sources:
    """Look into folders, each a training run, an evaluation, or a folder with such folders at any depth.

    Folders keep their order. The evaluations inside one of them are ordered by what happens to the thought, ``think``
    first. When there is no evaluation in any of the folders, a training run brings those that lie in
    ``<evaluations_root>/<its name>``.

    Raises:
        UserError: a folder is missing or holds nothing of this kind; a results file is damaged.
    """
    trainings: dict[Path, None] = {}
    places: list[Path] = []
    for folder in folders:
        if not folder.exists():
            raise UserError(f"folders: {folder} does not exist; name folders of training runs or evaluations")
        own = sorted(path.parent.resolve() for path in folder.rglob(METRICS_FILE))
        evaluated = _has_results(folder)
        if not own and not evaluated:
            raise UserError(
                f"folders: {folder} holds neither {METRICS_FILE} of a training run nor {RESULTS_FILE} of a finished "
                "evaluation; name other folders"
            )
        trainings |= dict.fromkeys(own)
        places += [folder] if evaluated else []
    if not places:
        places = [place for run in trainings if _has_results(place := evaluations_root / run.name)]
    runs = sorted(read_runs(places), key=lambda run: (_place(run, places), mode_place(run))) if places else []
    frame = episode_frame(runs) if runs else None
    named = {name: run for run, name in short_names(list(trainings)).items()}
    return Sources(named, [] if frame is None else _arms(runs, frame), frame)


def _arms(runs: Sequence[Run], frame: "pd.DataFrame") -> list[Arm]:
    names = frame.drop_duplicates("run").set_index("run")["arm"]
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        if run.results.episodes:
            by_name.setdefault(str(names[run.name]), []).append(run)
    return [Arm(name, own) for name, own in by_name.items()]


def _has_results(folder: Path) -> bool:
    return folder.is_file() or any(True for _ in folder.rglob(RESULTS_FILE))


def _place(run: Run, places: Sequence[Path]) -> int:
    """Number of the first of the places in which the run lies."""
    homes = [place.resolve() if place.is_dir() else place.resolve().parent for place in places]
    return next(number for number, home in enumerate(homes) if run.folder.is_relative_to(home))
