"""Checksums of files, and the one spelling of JSON that digests are taken of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import google_crc32c

_READ_BYTES = 8 << 20


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


def file_digest(path: Path) -> str:
    """`digest` of a file's content, "" where there is no such file."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except FileNotFoundError:
        return ""


def digest(content: bytes) -> str:
    """blake2b of `content`, 32 hex digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
