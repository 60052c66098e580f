"""Set-up: the lock, the Makefile, the script that finds Python and system libraries, and the wheel."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

LOCK_LINE = re.compile(r"[a-z0-9][a-z0-9.-]*==[A-Za-z0-9.+!]+( ; [a-zA-Z0-9_ !='\"<>().]+)?")


def lock_lines(repository: Path) -> list[str]:
    lines = (repository / "requirements.lock").read_text().splitlines()
    return [line for line in lines if not line.lstrip().startswith("#")]


def bash(script: str, repository: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run bash code with the functions of tools/setup.sh, from the checkout."""
    code = f"source tools/setup.sh; set +e; {script}"
    return subprocess.run(
        ["bash", "-c", code], cwd=repository, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_lock_holds_exact_versions_and_no_addresses(repository: Path) -> None:
    wrong = [line for line in lock_lines(repository) if not LOCK_LINE.fullmatch(line)]
    assert not wrong
    assert len(lock_lines(repository)) > 100


def test_lock_satisfies_pyproject(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    locked = {line.split("==")[0]: line.split(" ")[0].split("==")[1] for line in lock_lines(repository)}
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["dev"], *extras["loggers"]]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(locked[requirement.name.lower()], prereleases=True), line


def test_this_environment_is_exactly_the_lock(repository: Path) -> None:
    for line in lock_lines(repository):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            version = line.split(" ")[0].split("==")[1]
            assert importlib.metadata.version(requirement.name) == version


def test_make_lists_every_target_and_ci_runs_the_documented_test_command(repository: Path) -> None:
    makefile = (repository / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    shown = subprocess.run(["make", "--no-print-directory"], cwd=repository, capture_output=True, text=True, check=True)
    assert set(re.findall(r"^  make ([a-z-]+) ", shown.stdout, flags=re.MULTILINE)) == targets
    assert (repository / ".ci" / "run").read_text().splitlines()[-1] == "exec make test"
    assert "make test" in (repository / "README.md").read_text()


def test_dead_shims_are_passed_over(repository: Path, tmp_path: Path) -> None:
    """A version manager may leave names on the PATH that do not run; a working Python 3.12 behind them is found."""
    for name in ("python3.12", "python3", "uv"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 127\n")
        (tmp_path / name).chmod(0o755)
    behind = tmp_path / "home" / ".pyenv" / "versions" / "3.12.1" / "bin" / "python3.12"
    behind.parent.mkdir(parents=True)
    behind.symlink_to(sys.executable)
    path = f"{tmp_path}:/usr/bin:/bin"
    found = bash("find_python", repository, PATH=path, HOME=str(tmp_path / "home"), PYENV_ROOT="", PYTHON="")
    version = subprocess.run([found.stdout.strip(), "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("Python 3.12")
    assert bash("VENV=none find_uv", repository, PATH=path, HOME=str(tmp_path)).stdout == ""


def test_a_python_that_is_named_but_unfit_is_refused(repository: Path) -> None:
    done = bash("find_python", repository, PYTHON="/bin/false")
    assert done.returncode == 1
    assert done.stderr.startswith("error: setup: PYTHON=/bin/false")


def test_without_root_missing_packages_are_named_in_one_message(repository: Path) -> None:
    """`id` and `missing_libraries` are replaced: the test can neither drop root nor remove libraries."""
    pretend = 'id() { echo 1000; }; missing_libraries() { [[ $2 == required ]] && echo "libegl1 libgl1"; }'
    done = bash(f"{pretend}; system_libraries python3", repository)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "apt-get install libegl1 libgl1" in done.stderr


def test_system_libraries_are_told_from_missing_ones(repository: Path) -> None:
    spec = importlib.util.spec_from_file_location("system_libraries", repository / "tools" / "system_libraries.py")
    assert spec is not None
    assert spec.loader is not None
    libraries = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(libraries)
    assert libraries.loads("libnothing.so.9", "libc.so.6")
    assert not libraries.loads("libnothing.so.9")
    assert not [package for need, package in libraries.missing() if need == "required"]


def test_no_machine_path_and_no_registry_host_is_in_the_repository(repository: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=repository, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    hosts = re.compile(r"py" + r"pi\.org|python" + r"hosted|index-url\s*[=:]|/wor" + r"k/|/roo" + r"t/")
    for name in tracked:
        path = repository / name
        if path.suffix in (".py", ".sh", ".yaml", ".toml", ".md", ".lock", "") and path.is_file():
            assert not hosts.search(path.read_text(encoding="utf-8", errors="ignore")), name


@pytest.fixture(scope="module")
def installed_wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel of this checkout, far away from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=repository, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_wheel_works_outside_the_checkout(installed_wheel: Path, repository: Path, tmp_path: Path) -> None:
    """The configuration travels inside, and a folder of the user's own adds to it."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text("# @package _global_\nname: my-own-run\n")
    command = [sys.executable, "-m", "dtvla.train", "--config-dir", "mine", "+experiment=own", "--cfg", "job"]
    # -P and PYTHONPATH put the wheel before the editable installation of the checkout.
    environment = {**os.environ, "PYTHONPATH": str(installed_wheel)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "name: my-own-run" in done.stdout
    where = "import dtvla, dtvla.cli; print(dtvla.__file__, dtvla.cli.config_dir())"
    shown = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert str(repository / "dtvla") not in shown.stdout
    assert shown.stdout.count(str(installed_wheel)) == 2


def test_wheel_holds_every_configuration(installed_wheel: Path, repository: Path) -> None:
    expected = {path.relative_to(repository / "conf") for path in (repository / "conf").rglob("*.yaml")}
    inside = installed_wheel / "dtvla" / "conf"
    assert {path.relative_to(inside) for path in inside.rglob("*.yaml")} == expected
