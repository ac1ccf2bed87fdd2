"""More frames for a cache: a new one, with an id of its own, that shares the old one's files.

What a cache holds is part of its ids, so frames cannot be put into one that apprentices have
recorded. The new cache begins with the old one's whole shards; those that are the same frame for
frame are linked (copied where the file system cannot), with commit records of their own, and the
expert runs for the others only. The old cache is only read. No file of a cache is ever changed in
place, so neither can spoil the other's; damage to a shared file on the disk is damage to both, and
`verify` names it in both.

The order, old shards first, suits experts without memory alone. One that carries a state from frame
to frame must be built anew.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cache_tools import manifest, records
from cache_tools.checksums import size_and_crc32c
from cache_tools.manifest import Manifest
from cache_tools.parts import WHOLE, Part
from fd3d.durable import replacing
from fd3d.errors import CheckFailed, UsageError

# What two caches that share shards may differ in.
_FREE = {"frames", "keys_digest", "split"}


def appended_keys(base: str | Path, keys: Sequence[str]) -> tuple[str, ...]:
    """`keys` in the order that shares most with the cache `base`: its whole shards, as far as all
    of their frames are asked for, then the others as they were given."""
    base = Path(base)
    known = manifest.load(base)
    tokens = manifest.load_tokens(base, known)
    wanted = set(keys)
    first: list[str] = []
    for shard in range(known.frames // known.shard_frames):
        own = [tokens[i] for i in known.frames_of(shard)]
        if wanted.issuperset(own):
            first += own
    taken = set(first)
    return (*first, *(key for key in keys if key not in taken))


def check_base(base: str | Path, wanted: Manifest) -> Manifest:
    """The manifest of `base`; one whose values or storage are not those of `wanted` raises
    `UsageError`."""
    known = manifest.load(Path(base))
    apart = [name for name in known.differences(wanted) if name not in _FREE]
    if apart:
        raise UsageError(
            f"{base} is of expert {known.identity.expert}, preset {known.preset}, this build of "
            f"expert {wanted.identity.expert}, preset {wanted.preset}; they differ in "
            f"{', '.join(apart)}: build with those of {base}, or leave --base out"
        )
    return known


def shared_shards(base: str | Path, wanted: Manifest, keys: Sequence[str]) -> tuple[int, ...]:
    """Which shards of the cache `wanted` the cache `base` has, frame for frame."""
    there, _ = records.load_all(Path(base), check_base(base, wanted))
    found = {record.tokens for record in there.values()}
    every = range(wanted.shards)
    return tuple(n for n in every if tuple(keys[i] for i in wanted.frames_of(n)) in found)


def share(
    base: str | Path, out: Path, wanted: Manifest, keys: Sequence[str], *, part: Part = WHOLE
) -> int:
    """Take over the shards of `base` that the cache `wanted` at `out` lacks; how many.

    A shard that is damaged in `base` raises `CheckFailed`: it would be damaged in both.
    """
    base = Path(base)
    known = check_base(base, wanted)
    there, _ = records.load_all(base, known)
    by_tokens = {record.tokens: record for record in there.values()}
    done, _ = records.load_all(out, wanted)
    shared = 0
    for shard in range(wanted.shards):
        if shard in done or not part.owns(shard):
            continue
        found = by_tokens.get(tuple(keys[i] for i in wanted.frames_of(shard)))
        if found is None:
            continue
        files = {}
        for array in wanted.arrays.values():
            source, target = array.file_of(found.shard), array.file_of(shard)
            files[target] = _take(base / source, out / target, found.files[source])
        # The record last: until it is there the next build takes the shard over anew.
        records.save(out, replace(found, shard=shard, cache_id=wanted.cache_id, files=files))
        shared += 1
    return shared


def _take(source: Path, target: Path, expected: tuple[int, str]) -> tuple[int, str]:
    if size_and_crc32c(source) != expected:
        raise CheckFailed(f"{source} is damaged: run fd3d-cache repair on its cache and build it")
    with replacing(target) as partial:
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)
    return expected
