"""Datasets by Hugging Face id: found on disk, or downloaded once into the data folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dtvla.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
TIMEOUT_S = 10


def locate(root: str | Path, download_dir: Path, setting: str = "data.root") -> Path:
    """The local folder of a dataset.

    Args:
        root: a folder, or a hub id ``user/name``. A relative path whose parent exists is always a folder.
        download_dir: where hub datasets are kept, as ``user--name``.
        setting: what to blame in an error.

    Returns:
        The folder; it need not exist when ``root`` is a path.

    Raises:
        UserError: a hub id that is neither on disk nor can be downloaded.
    """
    path = Path(root)
    if path.exists() or path.parent.is_dir() or not HUB_ID.fullmatch(str(root)):
        return path
    target = Path(download_dir) / str(root).replace("/", "--")
    if not target.exists():
        _download(str(root), target, setting)
    return target


def _download(repo_id: str, target: Path, setting: str) -> None:
    """Fetch into ``<target>.download``, which a second try resumes, then rename."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    staging = Path(f"{target}.download")
    try:
        snapshot_download(repo_id, repo_type="dataset", local_dir=staging, etag_timeout=TIMEOUT_S)
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{setting}: dataset {repo_id!r} is not at {target} and can't be downloaded ({reason}); where there is a "
            f"network run `hf download {repo_id} --repo-type dataset --local-dir {target}`"
        ) from None
    os.replace(staging, target)
