"""The console command and the way errors reach a user."""

import importlib.util
import sys
from pathlib import Path

import pytest

from dtvla import cli
from dtvla.errors import UserError


@pytest.fixture
def own_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration folder of the test's own, with one value that is free and one that must be given."""
    (tmp_path / "demo.yaml").write_text("defaults: [_self_]\nspeed: 1\nneeded: ???\nhydra: {output_subdir: null}\n")
    (tmp_path / "train.yaml").write_text("{}\n")
    monkeypatch.setattr(cli, "config_dir", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run an entry point whose function rejects speed=2 and reads the value that must be given."""

    @cli.entry("demo")
    def main(cfg: object) -> None:
        if cfg.speed == 2:  # type: ignore[attr-defined]
            raise UserError("speed: found 2; choose another")
        print("needed", cfg.needed)  # type: ignore[attr-defined]

    monkeypatch.setattr(sys, "argv", ["demo", *arguments])
    main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("speed=2",), "error: speed: found 2; choose another"),
        ((), "error: needed: not given; set needed=..."),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(own_conf, monkeypatch, capsys, arguments, message) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code == cli.USER_ERROR_EXIT_CODE
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(message)


def test_misspelled_option_is_named_without_a_stack(own_conf, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "sped=3")
    assert stopped.value.code != 0
    error = capsys.readouterr().err
    assert "sped" in error
    assert "Traceback" not in error


def test_a_users_own_config_folder_adds_to_the_shipped_one(own_conf, monkeypatch, capsys, tmp_path) -> None:
    (tmp_path / "mine" / "extra").mkdir(parents=True)
    (tmp_path / "mine" / "extra" / "fast.yaml").write_text("# @package _global_\nneeded: from my folder\n")
    run(monkeypatch, "--config-dir", str(tmp_path / "mine"), "+extra=fast")
    assert "needed from my folder" in capsys.readouterr().out


def test_a_users_own_file_wins_over_the_shipped_one_of_the_same_name(own_conf, monkeypatch, capsys, tmp_path) -> None:
    (tmp_path / "size").mkdir()
    (tmp_path / "mine" / "size").mkdir(parents=True)
    (tmp_path / "size" / "nano.yaml").write_text("# @package _global_\nneeded: shipped\n")
    (tmp_path / "mine" / "size" / "nano.yaml").write_text("# @package _global_\nneeded: mine\n")
    run(monkeypatch, "+size=nano")
    run(monkeypatch, f"--config-dir={tmp_path / 'mine'}", "+size=nano")
    assert capsys.readouterr().out.split("\n")[:2] == ["needed shipped", "needed mine"]


def test_a_missing_config_folder_is_named(own_conf, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--config-dir", "nowhere", "needed=1")
    assert "nowhere is not a folder" in capsys.readouterr().err


def test_unknown_command_lists_the_known_ones(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["dtvla", "trian"])
    with pytest.raises(SystemExit):
        cli.main()
    error = capsys.readouterr().err
    assert "trian" in error
    assert "train" in error


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_a_module_and_commented_settings(command) -> None:
    assert importlib.util.find_spec(f"dtvla.{command}") is not None
    first_line = (cli.config_dir() / f"{command}.yaml").read_text().splitlines()[0]
    assert first_line.replace("python -m dtvla.", "dtvla ").startswith(f"# dtvla {command}:")


def test_broken_installation_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "dtvla" / "cli.py"))
    with pytest.raises(UserError, match="install dtvla again"):
        cli.config_dir()
