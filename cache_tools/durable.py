"""Writing so that it survives a kill or a power cut, and checking what was written.

Zarr renames its files into place but never calls fsync; everything here does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import google_crc32c

# Zarr's own ending for a file that is being written; ours use the same, so one sweep finds all.
PARTIAL = ".partial"
_READ_BYTES = 8 << 20


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, content: bytes) -> None:
    """Put `content` at `path`: a reader sees the old file or the whole new one, never a part."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        # On a full disk the half-written file is what stands in the way of the next try.
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync(path.parent)


def size_and_crc32c(path: Path) -> tuple[int, str]:
    """Length in bytes and crc32c (8 hex digits) of a file, read in pieces."""
    crc, size = 0, 0
    with open(path, "rb") as file:
        while piece := file.read(_READ_BYTES):
            crc = google_crc32c.extend(crc, piece)
            size += len(piece)
    return size, f"{crc:08x}"


def canonical_json(value: Any) -> bytes:
    """The one spelling of `value` that digests are taken of; NaN and infinity raise ValueError."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode()


def parse_json(content: bytes) -> Any:
    """What `canonical_json` can spell; anything else raises ValueError."""
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> None:
    # Python's reader takes NaN and infinity, which are no JSON and no number of ours.
    raise ValueError(f"it holds {name}")


def digest(content: bytes) -> str:
    """blake2b of `content`, 32 hex digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
