"""Run notebooks from top to bottom and store their outputs, without anything that tells where or when they ran.

python tools/notebooks.py                              all of notebooks/
python tools/notebooks.py notebooks/02_ablations.ipynb

A cell that fails stops it, and the notebook stays as it was.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
SECONDS_PER_CELL = 120
NO_WIDGETS = "ignore:IProgress not found"  # said by progress bars, which these notebooks do not show
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(path: Path) -> NotebookNode:
    """The notebook with fresh outputs, cleaned; its folder is the working directory."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=SECONDS_PER_CELL,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        coalesce_streams=True,  # else what a cell prints comes in as many parts as it happened to be sent in
    )
    client.execute(env=os.environ | {"PYTHONWARNINGS": NO_WIDGETS})
    return clean(notebook)


def clean(notebook: NotebookNode) -> NotebookNode:
    """Leave out times, versions, and names of cells that change with every run."""
    notebook.metadata = NotebookNode({"kernelspec": NotebookNode(KERNEL), "language_info": {"name": "python"}})
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02d}", NotebookNode()
    return notebook


def main() -> None:
    """Execute the notebooks that are named, or all."""
    for path in map(Path, sys.argv[1:] or sorted(map(str, FOLDER.glob("*.ipynb")))):
        nbformat.write(execute(path.resolve()), path)
        print(path.name)


if __name__ == "__main__":
    main()
