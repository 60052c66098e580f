"""What holds for every test: nothing is written into the home folder or the checkout, and no hub is asked for anything.

The environment is set when pytest loads this file, before any library reads it, and is inherited by every process that
a test starts. `MUJOCO_GL` is left alone: dtvla chooses a renderer that works, or honours the one that is set.
"""

import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SCRATCH = Path(tempfile.mkdtemp(prefix="dtvla-tests-"))

os.environ.update(
    HOME=str(SCRATCH / "home"),
    XDG_CACHE_HOME=str(SCRATCH / "cache"),
    XDG_CONFIG_HOME=str(SCRATCH / "config"),
    HF_HOME=str(SCRATCH / "huggingface"),
    HF_HUB_OFFLINE="1",
    TORCH_HOME=str(SCRATCH / "torch"),
    MPLCONFIGDIR=str(SCRATCH / "matplotlib"),
    MPLBACKEND="agg",
    DTVLA_ROOT=str(SCRATCH / "outputs"),
    TOKENIZERS_PARALLELISM="false",
    TORCHINDUCTOR_VEC_ISA_OK="1",  # the processor says what it can; compiling a program to try it takes half a minute
    MESA_SHADER_CACHE_DISABLE="false",  # dtvla switches it off; here every simulator would compile the same shaders
    MESA_SHADER_CACHE_DIR=str(SCRATCH / "mesa"),
)
for folder in ("home", "mesa"):
    (SCRATCH / folder).mkdir()
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job, and by all that it starts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: a long one begun at the end would leave the other processes without work."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session", autouse=True)
def _scratch_folder() -> Iterator[None]:
    """Remove the scratch folder after the last test."""
    yield
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The last bits of what a model calculates depend on the number of threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder of the checkout."""
    return REPOSITORY
