"""Commit records: a shard's frames exist if and only if its record does, and agrees.

The record is the last thing written for a shard, after all its files are on the disk, and names
each of them with length and crc32c. It carries its own crc32c and the id of the cache it belongs
to, so neither a torn nor a foreign record counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from cache_tools import layout
from cache_tools.checksums import canonical_json, parse_json
from cache_tools.manifest import Manifest
from fd3d.durable import write_durably


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of one committed shard.

    Args:
        shard: its number.
        cache_id: of the cache that it belongs to.
        tokens: keys of its frames, in order.
        files: path inside the cache -> (bytes, crc32c as 8 hex digits).
        errors: signal -> relative error of each frame; worst_channels: the same of each frame's
            worst channel. Maps only; see `cache_tools.codecs`.
        rows: table signal -> rows of each frame.
        exact: signal -> keys of frames that are stored exactly, because they would be above the
            codec's budget; errors are those of what is stored.
    """

    shard: int
    cache_id: str
    tokens: tuple[str, ...]
    files: Mapping[str, tuple[int, str]]
    errors: Mapping[str, tuple[float, ...]]
    worst_channels: Mapping[str, tuple[float, ...]]
    rows: Mapping[str, tuple[int, ...]]
    exact: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Damage:
    """Why a shard with a record does not exist all the same: the file and what is wrong with it."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


def save(folder: Path, record: Record) -> None:
    """Write a record durably: from here on the shard's frames exist."""
    content = json.loads(canonical_json(asdict(record)))
    content["crc32c"] = _crc(content)
    path = folder / layout.record_file(record.shard)
    write_durably(path, json.dumps(content, indent=1).encode())


def load(folder: Path, shard: int, manifest: Manifest) -> Record | Damage | None:
    """A shard's record, None where there is none, or what is wrong with it.

    The record itself and the lengths of its files are checked, not their contents: `verify` does
    that.
    """
    name = layout.record_file(shard)
    try:
        content = parse_json((folder / name).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return Damage(file=name, what="is damaged (not JSON)")
    try:
        record = _parse(content, shard, manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Damage(file=name, what=f"is damaged ({error})")
    for file, (size, _) in record.files.items():
        try:
            found = os.stat(folder / file).st_size
        except FileNotFoundError:
            return Damage(file=file, what="is missing")
        if found != size:
            return Damage(file=file, what=f"has {found} bytes, its record says {size}")
    return record


def load_all(folder: Path, manifest: Manifest) -> tuple[dict[int, Record], dict[int, Damage]]:
    """(valid records by shard, damage by shard where a record is there but not right)."""
    good: dict[int, Record] = {}
    bad: dict[int, Damage] = {}
    for shard in range(manifest.shards):
        found = load(folder, shard, manifest)
        if isinstance(found, Record):
            good[shard] = found
        elif found is not None:
            bad[shard] = found
    return good, bad


def _parse(content: dict[str, Any], shard: int, manifest: Manifest) -> Record:
    crc = content.pop("crc32c")
    if crc != _crc(content):
        raise ValueError("its checksum does not match")
    record = Record(
        shard=content["shard"],
        cache_id=content["cache_id"],
        tokens=tuple(content["tokens"]),
        files={name: (size, value) for name, (size, value) in content["files"].items()},
        errors={name: tuple(values) for name, values in content["errors"].items()},
        worst_channels={name: tuple(v) for name, v in content["worst_channels"].items()},
        rows={name: tuple(values) for name, values in content["rows"].items()},
        exact={name: tuple(values) for name, values in content["exact"].items()},
    )
    if record.cache_id != manifest.cache_id:
        raise ValueError(f"it belongs to cache {record.cache_id}, not {manifest.cache_id}")
    if record.shard != shard:
        raise ValueError(f"it is the record of shard {record.shard}")
    if set(record.files) != {array.file_of(shard) for array in manifest.arrays.values()}:
        raise ValueError("it does not name this cache's arrays")
    return record


def _crc(content: Mapping[str, Any]) -> str:
    return f"{google_crc32c.value(canonical_json(content)):08x}"
