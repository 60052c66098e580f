"""Protects the command ``dtvla review``: it serves, exports and imports, survives a kill, and names what is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from review_data import keys, thought, write_annotated

from dtvla.cli import config_dir
from dtvla.cot.review.decisions import read_decisions
from dtvla.errors import UserError
from dtvla.review import run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_annotated(tmp_path_factory.mktemp("data") / "soup")


def review(*overrides: str) -> None:
    """The command, in this process."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        run(compose("review", overrides=list(overrides)))


@contextmanager
def served(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of the command, and the address that it prints."""
    command = [sys.executable, "-m", "dtvla.review", "port=0", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


def post(address: str, **told: object) -> dict[str, object]:
    body = json.dumps(told).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return dict(json.load(answer))


def test_decisions_outlive_a_kill_and_an_interrupt_ends_in_peace(dataset: Path, tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    for number, key in enumerate(keys()[:2]):
        with served(f"dataset={dataset}", f"decisions={path}", "reviewer=eve") as (process, address):
            told = {"episode": key[0], "frame": key[1], "thought": thought(*key), "before": thought(*key)}
            post(f"{address}api/decisions", decision="accept", decided="", page="one", **told)
            if number:
                process.send_signal(signal.SIGINT)
                assert process.stdout is not None
                assert "3 of 12 frames reviewed" in process.stdout.read()
                assert process.wait() == 0
    assert {key: (d.decision, d.reviewer) for key, d in read_decisions(path).items()} == dict.fromkeys(
        keys()[:2], ("accept", "eve")
    )


def test_a_bundle_goes_out_and_its_decisions_come_back(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, home = tmp_path / "out/soup.zip", tmp_path / "home.jsonl"
    review(f"dataset={dataset}", f"decisions={home}", f"export={bundle}")
    assert "11 frames" in capsys.readouterr().out
    key = keys()[3]
    with served(f"bundle={bundle}", "reviewer=bob") as (_, address):
        told = {"episode": key[0], "frame": key[1], "thought": "", "before": thought(*key)}
        post(f"{address}api/decisions", decision="reject", decided="", page="one", **told)
    away = tmp_path / "out/soup.zip.decisions.jsonl"
    assert read_decisions(away)[key].decision == "reject"
    review(f"dataset={dataset}", f"decisions={home}", f"import=[{away}]")
    assert "1 decisions taken" in capsys.readouterr().out
    assert read_decisions(home) == read_decisions(away)
    review(f"dataset={dataset}", f"decisions={home}", f"import={away}")
    assert "0 decisions taken, 1 known" in capsys.readouterr().out


def test_decisions_lie_beside_the_dataset_and_not_in_it(tmp_path: Path) -> None:
    dataset = write_annotated(tmp_path / "soup.v1")
    before = sorted(path.relative_to(dataset) for path in dataset.rglob("*"))
    review(f"dataset={dataset}/", f"export={tmp_path}/soup.zip")
    assert (tmp_path / "soup.v1.decisions.jsonl").is_file()
    assert sorted(path.relative_to(dataset) for path in dataset.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "dataset: found neither"),
        (["dataset={data}", "bundle=x.zip"], "dataset: found both"),
        (["dataset=nowhere"], "nowhere: no such dataset"),
        (["bundle=nowhere.zip"], "bundle: .*cannot be read"),
        (["dataset={data}", "show=some"], "show: 'some' is unknown"),
        (["dataset={data}", "export=a.zip", "import=b"], "export: found import"),
        (["dataset={data}", "import=nowhere.jsonl"], "decisions: .*nowhere.jsonl cannot be read"),
        (["dataset={data}", "+schema.longest=4"], "schema.longest: there is no such setting"),
        (["dataset={data}", "+schema.min_words=0"], "schema.min_words"),
        (["dataset={data}", "episodes=[4]"], "episodes: .* no episode 4"),
        (["dataset={data}", "port=-1"], "host, port: 127.0.0.1:-1"),
        (["dataset={data}", "changes=maybe"], "changes: found 'maybe', expected a valid boolean"),
        (["dataset={data}", "episodes=1"], "episodes: found 1, expected a valid list"),
        (["dataset={data}", "strip=[1.5]"], "strip: found"),
        (["dataset={data}", "schema=3"], "schema: found 3"),
        (["dataset={data}", "decisions=/proc/none/d.jsonl"], "decisions: .* cannot be written"),
    ],
)
def test_what_is_wrong_is_named(dataset: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    own = [] if any(word.startswith("decisions") for word in overrides) else [f"decisions={tmp_path}/d.jsonl"]
    with pytest.raises(UserError, match=message):
        review(*own, *(word.format(data=dataset) for word in overrides))


def test_help_loads_neither_the_server_nor_a_model() -> None:
    code = (
        "import runpy, sys\nsys.argv = ['review', '--help']\n"
        "try:\n    runpy.run_module('dtvla.review', run_name='__main__')\nexcept SystemExit as end:\n"
        "    assert not end.code\nprint(sorted({'flask', 'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
