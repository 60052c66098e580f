"""Checkpoints on a hub: a real exchange with a small hub on this machine, and what an unreachable one gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtvla.errors import UserError
from dtvla.policy.hub import find_checkpoint, locate

from .local_hub import LocalHub, local_hub
from .published_folder import random_weights, read_weights, write_published

EXCHANGE = """
import sys
from hydra import compose, initialize_config_dir
from dtvla.cli import config_dir
from dtvla.errors import UserError
from dtvla.export import export
from dtvla.policy.hub import find_checkpoint
from dtvla.policy.policy import Policy

folder, output = sys.argv[1:]
with initialize_config_dir(str(config_dir()), version_base="1.3"):
    cfg = compose("export", [f"checkpoint={folder}", f"output={output}", "push_to_hub=me/tiny"])
export(cfg)
policy = Policy.load("me/tiny")
assert policy.processor.normalizer.statistics.digest() == Policy.load(output).processor.normalizer.statistics.digest()
print("snapshot", find_checkpoint("me/tiny@main"))
for name in ("me/absent", "me/tiny@nobranch"):
    try:
        find_checkpoint(name)
    except UserError as error:
        print("refused", error)
"""


def run(hub: LocalHub, home: Path, *arguments: str) -> str:
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_nobody",
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"{done.stderr}\n{hub.requests}"
    return done.stdout


def test_an_export_is_pushed_privately_and_loaded_by_its_hub_id(tmp_path: Path) -> None:
    tensors = random_weights()
    write_published(tmp_path / "sft", tensors)
    with local_hub() as hub:
        printed = run(hub, tmp_path / "home", "-c", EXCHANGE, str(tmp_path / "sft"), str(tmp_path / "out"))
    assert [(made["name"], made["organization"]) for made in hub.created] == [("tiny", "me")]
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    assert f"pushed: {hub.url}/me/tiny/commit/" in printed
    stored = hub.files["me/tiny"]
    assert stored.keys() == {file.name for file in (tmp_path / "out").iterdir()}
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in stored.items())
    snapshot = Path(next(line.split(maxsplit=1)[1] for line in printed.splitlines() if line.startswith("snapshot")))
    downloaded = read_weights(snapshot)
    assert downloaded.keys() == tensors.keys()
    assert all((downloaded[name] == tensors[name]).all() for name in tensors)
    asked = [request for request in hub.requests if request.endswith("model.safetensors") and "GET" in request]
    assert len(asked) == 1  # the second look-up used the cache
    absent, branch = (line for line in printed.splitlines() if line.startswith("refused"))
    assert "'hf download me/absent --local-dir checkpoints/absent'" in absent
    assert "'hf download me/tiny --revision nobranch --local-dir" in branch


def test_without_a_network_the_command_that_fetches_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"checkpoint: me/model is neither a folder nor .* 'hf download me/model --local"
    ):
        find_checkpoint("me/model")
    with pytest.raises(UserError, match="no folder a/b/c; give the folder of a saved policy or a hub id"):
        find_checkpoint("a/b/c")
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert find_checkpoint("me/model") == Path("me/model")
    with pytest.raises(UserError, match="checkpoint me/model: an empty folder"):
        locate("me/model")
