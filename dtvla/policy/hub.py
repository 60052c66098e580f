"""Where a checkpoint lies and what kind it is: a folder, or a repository of the Hugging Face hub.

Nothing here loads torch or reads weights, so that a command can refuse a wrong name at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dtvla.errors import UserError

POLICY_FILE = "policy.json"  # dtvla's own: everything besides weights, configuration and tokenizer
STATISTICS_FILE = "norm_stats.json"  # the published one
ADAPTER_FILE, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
REQUIRED_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
REASON_LENGTH = 300  # characters of a library's error inside of ours
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".h5")  # never read: loading them can run code


@dataclass(frozen=True)
class Source:
    """A checkpoint whose files are all there.

    Attributes:
        name: of the base, as it was given: a path or a hub id.
        folder: what was asked for.
        base: holds configuration, tokenizer and weights: the folder itself, or what its adapters belong to.
        adapters: folders of the adapters, in the order in which they were trained.
    """

    name: str
    folder: Path
    base: Path
    adapters: tuple[Path, ...] = ()

    @property
    def policy_file(self) -> Path | None:
        """What dtvla wrote, the last adapter's rather than the base's; None in a published checkpoint."""
        return self._last(POLICY_FILE)

    @property
    def statistics_file(self) -> Path | None:
        """The published statistics; None in a base model, which has seen no robot."""
        return self._last(STATISTICS_FILE)

    def files(self) -> Iterator[Path]:
        """The files that decide what the policy does."""
        for folder in (self.base, *self.adapters):
            yield from sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])

    def digest(self) -> str:
        """See :func:`digest`, over :meth:`files`."""
        return digest(self.files())

    def _last(self, name: str) -> Path | None:
        found = [folder / name for folder in (self.base, *self.adapters) if (folder / name).is_file()]
        return found[-1] if found else None


def digest(files: Iterable[Path]) -> str:
    """One sha256 over names and contents of files."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def locate(name: str | Path, download: bool = True, setting: str = "checkpoint") -> Source:
    """Find a checkpoint (downloading it if need be) and check that its files are there.

    Args:
        name: a folder with a policy, a published checkpoint or adapters; or a hub id, ``OWNER/NAME[@REVISION]``.
        download: whether the hub may be asked; otherwise only the local cache is.
        setting: what to blame when there is no checkpoint of that name.

    Raises:
        UserError: it is none of these, files are missing, or its weights are pickled.
    """
    base_name = str(name)
    folder = base = find_checkpoint(base_name, setting, download)
    adapters: list[Path] = []
    while (base / ADAPTER_FILE).is_file():
        if base in adapters:
            raise UserError(f"checkpoint {base}: its adapters are based on themselves; correct its {ADAPTER_FILE}")
        adapters.insert(0, base)
        base_name = _base_of(base)
        base = find_checkpoint(base_name, f"checkpoint {base}: its base_model_name_or_path", download)
    _check(base)
    return Source(base_name, folder, base, tuple(adapters))


def find_checkpoint(name: str, setting: str = "checkpoint", download: bool = True) -> Path:
    """The folder of a checkpoint: a path, or a hub id, which is downloaded unless the local cache has it.

    Args:
        name: folder or hub id, ``OWNER/NAME[@REVISION]``.
        setting: what to blame in an error.
        download: whether the hub may be asked.

    Raises:
        UserError: neither a folder nor a repository that can be had; says how to download it elsewhere.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    ignored = [f"*{ending}" for ending in PICKLED]
    try:
        try:
            found = snapshot_download(
                repository, revision=revision or None, ignore_patterns=ignored, local_files_only=True
            )
        except LocalEntryNotFoundError:
            if not download:
                raise
            found = snapshot_download(repository, revision=revision or None, ignore_patterns=ignored)
    except HFValidationError:
        raise UserError(f"{setting}: no folder {name}; give the folder of a saved policy or a hub id") from None
    except Exception as error:  # of the disk, the network, the hub: many kinds, some of other libraries
        short, at = repository.rsplit("/", 1)[-1], f" --revision {revision}" if revision else ""
        raise UserError(
            f"{setting}: {name} is neither a folder nor in the local Hugging Face cache, and the hub did not give it "
            f"({reason(error)}); check the name, or download it where there is a network with "
            f"'hf download {repository}{at} --local-dir checkpoints/{short}' and use the folder checkpoints/{short}"
        ) from None
    return Path(found)


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload a folder to a repository of the hub, which is made if it is not there.

    Args:
        folder: what to upload.
        repository: ``OWNER/NAME``.
        private: visibility of a new repository.

    Returns:
        The address of the commit.

    Raises:
        UserError: the hub refused, or can't be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload with dtvla export"))
    except Exception as error:  # as in find_checkpoint
        raise UserError(
            f"push_to_hub: {repository} was not written ({reason(error)}); log in with 'hf auth login', then repeat "
            f"with 'hf upload {repository} {folder}'"
        ) from None


def reason(error: Exception) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split())[:REASON_LENGTH] or type(error).__name__


def _base_of(folder: Path) -> str:
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"checkpoint {folder}: no {ADAPTER_WEIGHTS} beside {ADAPTER_FILE}; copy it again")
    try:
        name = json.loads((folder / ADAPTER_FILE).read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"checkpoint {folder}: {ADAPTER_FILE} is damaged ({error!r}); copy it again") from None
    if not name:
        raise UserError(
            f"checkpoint {folder}: {ADAPTER_FILE} names no base model; write its folder or hub id there as "
            "base_model_name_or_path"
        )
    return str(name)


def _check(folder: Path) -> None:
    present = {path.name for path in folder.iterdir()}
    missing = [name for name in REQUIRED_FILES if name not in present]
    pickled = sorted(name for name in present if name.startswith("pytorch_model") and name.endswith(PICKLED))
    if not present & {WEIGHTS_FILE, INDEX_FILE}:
        if pickled:
            raise UserError(
                f"checkpoint {folder}: its weights are pickled ({pickled[0]}), and reading them could run any code; "
                "convert them with transformers: model.save_pretrained(folder, safe_serialization=True)"
            )
        missing.append(WEIGHTS_FILE)
    if missing:
        found = f"no {', '.join(missing)}" if present else "an empty folder"
        raise UserError(
            f"checkpoint {folder}: {found}; give the folder of a saved policy or of a downloaded model, with all files"
        )
