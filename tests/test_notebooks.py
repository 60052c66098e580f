"""The notebooks run from top to bottom on the repository's data, say what is stored, and name no machine."""

import base64
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
NAMES = ["quickstart_results", "ablations", "published_vs_ours", "grpo", "latency", "look_inside"]
MOST_FIGURE_BYTES = 200_000
LINK = re.compile(r"\]\(([^)]+)\)")
RENEW = "run python tools/notebooks.py"
ABSOLUTE = re.compile(r"(?<![\w.:/<>})~-])(?:/(?:home|root|work|tmp|usr|var|opt|mnt|Users)\b|[A-Za-z]:\\)|file://")

sys.path.insert(0, str(REPOSITORY / "tools"))
from notebooks import clean, execute  # noqa: E402

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook: NotebookNode) -> Iterator[str]:
    """All that is written in a notebook, pictures and films left out."""
    for cell in notebook.cells:
        yield cell.source
        for output in cell.get("outputs", []):
            yield output.get("text", "")
            for kind, value in output.get("data", {}).items():
                if kind.startswith("text/"):
                    yield re.sub(r"data:[\w/]+;base64,[\w+/=]+", "", value)


def figures(notebook: NotebookNode) -> list[bytes]:
    datas = [output.get("data", {}) for cell in code(notebook) for output in cell.outputs]
    return [base64.b64decode(data["image/png"]) for data in datas if "image/png" in data]


def answers(notebook: NotebookNode) -> list[list[str]]:
    """What every cell says on a page: tables, printed lines and warnings of the analysis."""
    return [
        [o.data["text/markdown"] for o in cell.outputs if "text/markdown" in o.get("data", {})]
        + [o.text for o in cell.outputs if o.get("name") == "stdout" or o.get("text", "").startswith("warning: ")]
        for cell in code(notebook)
    ]


def test_all_notebooks_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == [f"{n:02d}_{name}" for n, name in enumerate(NAMES, 1)]


@each
def test_a_stored_notebook_is_whole_and_clean(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), RENEW
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)
    assert clean(read(path)) == notebook
    assert [(path.stem, len(figure)) for figure in figures(notebook) if len(figure) > MOST_FIGURE_BYTES] == []
    assert figures(notebook)


@each
def test_nothing_stored_names_a_machine(path: Path) -> None:
    for text in texts(read(path)):
        assert not ABSOLUTE.search(text), ABSOLUTE.search(text)
        assert str(REPOSITORY) not in text


@pytest.mark.parametrize("text", ["a /tmp/x", "'/home/me'", "C:\\Users", "see file:///a", "(/root)"])
def test_paths_of_a_machine_would_be_found(text: str) -> None:
    assert ABSOLUTE.search(text)


@each
def test_links_lead_somewhere(path: Path) -> None:
    linked = [link for cell in read(path).cells if cell.cell_type == "markdown" for link in LINK.findall(cell.source)]
    assert linked
    missing = [link for link in linked if "://" not in link and not (path.parent / link.partition("#")[0]).exists()]
    assert missing == []


@each
def test_a_notebook_runs_and_says_what_is_stored(path: Path) -> None:
    fresh, stored = execute(path), read(path)
    assert len(figures(fresh)) == len(figures(stored)), RENEW
    found, expected = answers(fresh), answers(stored)
    if "look_inside" in path.stem:  # arithmetic of a model, whose last digits depend on the machine
        assert [list(map(len, cell)) for cell in found] == [list(map(len, cell)) for cell in expected], RENEW
    else:
        assert found == expected, RENEW
