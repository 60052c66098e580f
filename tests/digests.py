"""What lies in a folder, to compare: digests, because a failed comparison of contents prints megabytes."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digests(folder: Path, *apart_from: str) -> dict[str, str]:
    """SHA-256 of every file below the folder by its path in it, apart from files of these names."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in apart_from]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
