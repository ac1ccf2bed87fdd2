"""A second copy of a cache's metadata, from which `repair` restores what was damaged.

Manifest, frame keys and Zarr metadata are written once and never change; `spare.json` holds the
text of each, with one checksum over all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from cache_tools import layout
from cache_tools.checksums import canonical_json, digest, parse_json
from cache_tools.manifest import Manifest
from fd3d.durable import write_durably

# A file of the cache or of one of its arrays: the copy comes from the disk and is not trusted.
_INSIDE = re.compile(r"([^/.][^/]*/)?[^/.][^/]*\.json")


def save(folder: Path, cache: Manifest) -> None:
    """Write the copy of the metadata that is there now."""
    texts = {name: (folder / name).read_text() for name in _names(cache)}
    content = {"files": texts, "checksum": digest(canonical_json(texts))}
    write_durably(folder / layout.SPARE, canonical_json(content))


def load(folder: Path) -> dict[str, bytes] | None:
    """File name -> its bytes as they were written; None where the copy is missing or damaged."""
    try:
        content = parse_json((folder / layout.SPARE).read_bytes())
        texts = content["files"]
        if content["checksum"] != digest(canonical_json(texts)):
            return None
        if not all(_INSIDE.fullmatch(name) for name in texts):
            return None
        return {name: text.encode() for name, text in texts.items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def differing(folder: Path, spare: Mapping[str, bytes]) -> list[str]:
    """The metadata files that are missing or not as they were written."""
    return [name for name, text in spare.items() if _read(folder / name) != text]


def _names(cache: Manifest) -> tuple[str, ...]:
    return (layout.MANIFEST, layout.TOKENS, *layout.metadata_files(cache.arrays))


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
