"""The doctor: its judgement of good and bad findings, and its screen on this machine."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from dtvla.doctor import LINE_WIDTH, render_findings
from dtvla.health import checks, probes, simulator
from dtvla.health.checks import Finding

GOOD_FRAME = {"floor": 178.0, "contrast": 45.0, "seconds": 0.1}
DARK_FRAME = {"floor": 121.4, "contrast": 40.0, "seconds": 0.1}
BROKEN = {"error": "no context"}


@pytest.mark.sim
@pytest.mark.slow
def test_this_machine_is_fit() -> None:
    """Really renders with both backends, lets the scene settle, and reads every version."""
    done = subprocess.run([sys.executable, "-m", "dtvla.doctor"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "this machine is fit"
    assert len(lines) <= 40
    assert max(map(len, lines)) <= LINE_WIDTH
    assert any("mujoco" in line and "3.3.2" in line for line in lines)


def test_exit_code_is_1_when_something_is_wrong(tmp_path: Path) -> None:
    """A file where the output folder should be: the cheap checks find it, the probes run into their time limit."""
    (tmp_path / "file").write_text("")
    settings = [f"paths.root={tmp_path / 'file' / 'outputs'}", "probe_timeout_s=0.01"]
    command = [sys.executable, "-m", "dtvla.doctor", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "not fit:" in done.stdout.splitlines()[-1]
    assert "output folder" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("line", "status"),
    [("mujoco==3.3.2", "ok"), ("mujoco==3.4.0", "fail"), ("numpy>=1000", "fail"), ("no-such-package-1>=1", "fail")],
)
def test_versions_are_compared_with_what_is_required(line: str, status: str) -> None:
    finding = checks.check_requirement(Requirement(line))
    assert finding.status == status
    assert bool(finding.fix) == (status == "fail")


def test_one_working_renderer_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    statuses = [f.status for f in simulator.judge_renderers({"egl": GOOD_FRAME, "osmesa": BROKEN})]
    assert statuses == ["ok", "note"]
    statuses = [f.status for f in simulator.judge_renderers({"egl": BROKEN, "osmesa": BROKEN})]
    assert statuses == ["fail", "fail"]
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    statuses = [f.status for f in simulator.judge_renderers({"egl": GOOD_FRAME, "osmesa": BROKEN})]
    assert statuses == ["ok", "fail"]


def test_a_black_picture_is_no_working_renderer() -> None:
    black = {"floor": 0.0, "contrast": 0.0, "seconds": 0.1}
    assert [f.status for f in simulator.judge_renderers({"egl": black, "osmesa": black})] == ["fail", "fail"]


def test_floor_probe_tells_mujoco_versions_apart() -> None:
    """178 and 121 were measured with MuJoCo 3.3.2 and 3.3.3, bit for bit the same scene."""
    assert simulator.judge_floor({"egl": GOOD_FRAME, "osmesa": BROKEN}).status == "ok"
    assert simulator.judge_floor({"egl": DARK_FRAME, "osmesa": DARK_FRAME}).status == "fail"


def test_settle_probe_tells_mujoco_versions_apart() -> None:
    """Bowl positions after ten settle steps, measured with MuJoCo 3.3.2 and 3.4.0."""
    for position_m, status in (((-0.2114, 0.2021, 0.9344), "ok"), ((-0.2118, 0.1678, 0.9429), "fail")):
        off_m = float(np.linalg.norm(np.subtract(position_m, probes.SETTLE_POSITION_M)))
        assert simulator.judge_settle({"position_m": position_m, "off_m": off_m}).status == status
    assert simulator.judge_settle(BROKEN).status == "fail"


def test_every_gpu_is_named_and_a_failing_one_is_a_fault() -> None:
    device = {"name": "GPU X", "free_bytes": 70e9, "total_bytes": 80e9}
    finding = simulator.judge_gpu({"devices": [device, device], "cuda_build": "13.0"})
    assert finding.status == "ok"
    assert finding.found.count("GPU X (70 of 80 GB free)") == 2
    assert simulator.judge_gpu(BROKEN).status == "fail"


def test_a_probe_that_hangs_or_dies_is_a_finding() -> None:
    assert "0.01 s" in probes.run_probe("settle", timeout_s=0.01)["error"]
    assert "KeyError" in probes.run_probe("no-such-probe")["error"]


def test_little_memory_and_a_full_disk_are_faults(tmp_path: Path) -> None:
    assert checks.check_machine(0.1).status == "ok"
    assert checks.check_machine(1e6).status == "fail"
    assert checks.check_disk(tmp_path / "not" / "there", 0)[0].status == "ok"
    assert checks.check_disk(tmp_path, 1e9)[0].status == "fail"
    assert not (tmp_path / "not").exists()


def test_the_screen_names_what_is_wrong_and_the_fix() -> None:
    findings = [Finding("ok", "Python", "3.12.1"), Finding("fail", "disk", "1 GB free " * 30, "free some " * 30)]
    screen = render_findings(findings)
    assert max(map(len, screen.splitlines())) <= LINE_WIDTH
    assert "-> free some" in screen
    assert screen.splitlines()[-1] == "not fit: disk"
    assert "\x1b[" in render_findings(findings, colour=True)
