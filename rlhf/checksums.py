"""Checksums of a folder's files, and what is wrong with files that have them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.files import write_atomic

CHECKSUMS = "checksums.json"


def write_checksums(folder: Path, leave_out: Sequence[str] = ()) -> None:
    """Writes what `damaged` compares with: of all files but these, and but those in folders of these names."""
    paths = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    files = {str(p): checksum(folder / p) for p in paths if p.parts[0] not in (*leave_out, CHECKSUMS)}
    write_atomic(folder / CHECKSUMS, json.dumps(files, indent=1))


def damaged(folder: Path) -> str | None:
    """The first file of a finished folder that is not as it was written; None: all are."""
    try:
        files = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{CHECKSUMS} is missing or cannot be read"
    return wrong(folder, files)


def wrong(folder: Path, files: Mapping[str, Sequence[Any]]) -> str | None:
    """The first of these files that is missing or has another size or checksum than said; None: none."""
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if checksum(path)[1] != digest:
            return f"the checksum of {name} is wrong"
    return None


def checksum(path: Path) -> tuple[int, str]:
    """Size and hash of a file."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    with open(path, "rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
            size += len(part)
    return size, digest.hexdigest()
