"""A multirun as a Slurm array, against scripts that stand for Slurm's commands."""

from __future__ import annotations

import os
import re
import stat
import sys
from pathlib import Path

import pytest
from multirun_script import records, run, write_script

FAKE_SLURM = {
    "sbatch": """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
open(sys.argv[0] + ".seen", "w").write(script)
(size,) = re.findall(r"--array=0-(\\d+)", script)
for task in range(int(size) + 1):
    environment = dict(os.environ, SLURM_JOB_ID=f"8{{task}}", SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID=str(task),
                       SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0", SLURM_JOB_NUM_NODES="1",
                       SLURM_JOB_NODELIST="node1")
    run = f"bash {{sys.argv[-1]}} >&- 2>&-; echo $? > {{sys.argv[0]}}.{{task}}"
    subprocess.Popen(["bash", "-c", run], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 77")
""",
    "srun": """#!{python}
import os, sys
program = next(i for i, word in enumerate(sys.argv) if word.endswith(("python", "python3", "python3.12")))
os.execv(sys.argv[program], sys.argv[program:])
""",
    "sacct": """#!{python}
import pathlib
print("JobID|State|NodeList")
for task in range(9):
    code = pathlib.Path(__file__).with_name(f"sbatch.{{task}}")
    state = "RUNNING" if not code.exists() else "COMPLETED" if code.read_text() == "0\\n" else "OUT_OF_MEMORY"
    print(f"77_{{task}}|{{state}}|node1")
""",
}


@pytest.mark.slow
def test_slurm_gets_one_array_of_jobs_of_which_one_can_be_lost(tmp_path: Path) -> None:
    """The cluster is played by three scripts that stand for Slurm's commands and run each task at once."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, text in FAKE_SLURM.items():
        (bin_folder / name).write_text(text.format(python=sys.executable))
        (bin_folder / name).chmod(stat.S_IRWXU)
    settings = ["partition=gpu", "gpus_per_node=1", "cpus_per_task=8", "mem_gb=64", "timeout_min=90"]
    chosen = ["hydra/launcher=submitit_slurm", *(f"hydra.launcher.{setting}" for setting in settings)]
    path = {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    done = run(write_script(tmp_path), "-m", *chosen, "x=1,2,5,3,4", environment=path)
    assert done.returncode == 2, done.stderr
    assert [(r.name, r.state, r.reason) for r in records(tmp_path / "out")] == [
        ("x=1", "done", None),
        ("x=2", "failed", "x: found 2; choose another"),
        ("x=5", "failed", "it was lost: killed, or out of memory or time (state OUT_OF_MEMORY)"),
        ("x=3", "failed", "Odd: a defect and no more"),
        ("x=4", "done", None),
    ]
    assert "2 failed  x=5" in done.stdout
    assert records(tmp_path / "out")[2].log == ".submitit/77_2/77_2_0_log.err"
    options = re.findall(r"^#SBATCH --(\S+)", (bin_folder / "sbatch.seen").read_text(), flags=re.MULTILINE)
    expected = "partition=gpu gpus-per-node=1 cpus-per-task=8 mem=64GB time=90 nodes=1 array=0-4%5"
    assert set(expected.split()) <= set(options)
