"""Removing what killed builds left in a cache and beside it, and nothing else.

Only names that a build gives are taken; whatever else lies there is somebody's. What is removed is
decided under a lease of the whole cache, so no build can begin in between.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cache_tools import layout, lease, manifest, records
from cache_tools.manifest import Manifest
from cache_tools.parts import WHOLE
from cache_tools.verify import find_leftovers
from cache_tools.writer import forget, unborn_of_dead
from fd3d.durable import PARTIAL
from fd3d.errors import UsageError

# What our writer and zarr's put beside a file while they write it.
_HALF_WRITTEN = re.compile(rf".+\.[0-9a-f]+{re.escape(PARTIAL)}")


@dataclass(frozen=True, kw_only=True)
class Prunable:
    """Something to remove: its path inside the cache ("../" = beside it), why, and its bytes."""

    file: str
    why: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class PruneReport:
    """What `prune` found, and whether it was `removed`; `left_alone` are files that no record
    names and that no build of this project makes."""

    path: str
    cache_id: str
    removed: bool
    found: tuple[Prunable, ...]
    left_alone: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.found)


def prune(path: str | Path, *, remove: bool = False) -> PruneReport:
    """List, and with `remove` delete, what killed builds left of the cache at `path`: files
    half-written, files of shards without a valid record, leases and unborn folders of the dead.

    Readers find the same frames before and after; a shard whose record was damaged is simply not
    built. A cache that is being built, and what is not a cache, raises `UsageError`; damaged
    metadata `CheckFailed`.
    """
    folder = Path(path)
    cache = manifest.load(folder)
    manifest.load_tokens(folder, cache)
    holders = lease.holders(folder)
    if holders:
        raise UsageError(
            f"{folder} is being built by {', '.join(map(str, holders))}: prune it afterwards"
        )
    # Listed first, for taking the cache's lease removes those of the dead.
    leases = _stale_leases(folder)
    if not remove:
        return _report(folder, cache, leases, removed=False)
    with lease.held(folder, WHOLE):
        report = _report(folder, cache, leases, removed=True)
        _remove(folder, cache, report)
    return report


def _report(
    folder: Path, cache: Manifest, leases: tuple[Prunable, ...], *, removed: bool
) -> PruneReport:
    done, damaged = records.load_all(folder, cache)
    found, left_alone = list(leases), []
    for shard in damaged:
        name = layout.record_file(shard)
        found.append(_prunable(folder, name, f"a record that is not valid: {damaged[shard]}"))
    shards = _files_of_shards(cache)
    for name in find_leftovers(folder, cache, done):
        why = _why(name, cache, shards)
        if why:
            found.append(_prunable(folder, name, why))
        else:
            left_alone.append(name)
    for path in _unborn(folder):
        why = "an unfinished folder of a process that has ended"
        size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
        found.append(Prunable(file=f"../{path.name}", why=why, bytes=size))
    return PruneReport(
        path=str(folder),
        cache_id=cache.cache_id,
        removed=removed,
        found=tuple(sorted(found, key=lambda one: one.file)),
        left_alone=tuple(left_alone),
    )


def _remove(folder: Path, cache: Manifest, report: PruneReport) -> None:
    # Records before their shards' files: a kill in between leaves frames that are not built.
    records_of = {layout.record_file(shard): shard for shard in range(cache.shards)}
    for one in report.found:
        if one.file in records_of:
            forget(folder, records_of[one.file])
    unborn = {f"../{path.name}": path for path in _unborn(folder)}
    for one in report.found:
        if one.file in unborn:
            shutil.rmtree(unborn[one.file])
        elif not one.file.startswith("../"):
            (folder / one.file).unlink(missing_ok=True)


def _unborn(folder: Path) -> list[Path]:
    found = unborn_of_dead(folder.resolve())
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _why(name: str, cache: Manifest, shards: Mapping[str, int]) -> str:
    """Why a leftover is to be removed; empty for a file that no build makes."""
    if name in shards:
        return f"of shard {shards[name]}, which has no valid record"
    inner, _, file = name.rpartition("/")
    places = {"", layout.COMMITS, *cache.arrays}
    if inner in places and _HALF_WRITTEN.fullmatch(file):
        return "half-written"
    return ""


def _files_of_shards(cache: Manifest) -> dict[str, int]:
    """Path inside the cache -> shard, of every data file that the cache may have."""
    return {
        array.file_of(shard): shard
        for array in cache.arrays.values()
        for shard in range(cache.shards)
    }


def _stale_leases(folder: Path) -> tuple[Prunable, ...]:
    return tuple(
        _prunable(folder, holder.file, "a lease of a process that no longer builds")
        for holder in lease.stale(folder)
    )


def _prunable(folder: Path, name: str, why: str) -> Prunable:
    return Prunable(file=name, why=why, bytes=os.lstat(folder / name).st_size)
