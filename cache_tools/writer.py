"""Making a cache folder and publishing shards in it, so that a kill at any point costs one shard.

Order of a shard: each of its array files, whole, fsync, renamed into place, fsync of its folder;
then the commit record in the same way. Until the record is there the shard does not exist and the
next build writes it anew.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cache_tools import focal, layout, manifest, records, spare
from cache_tools.checksums import canonical_json, digest, file_digest, size_and_crc32c
from cache_tools.codecs import FrameError, encode
from cache_tools.lease import alive
from cache_tools.manifest import SHORT, Manifest, short
from cache_tools.parts import WHOLE, Part
from cache_tools.shard_builder import ShardBuilder
from fd3d.durable import PARTIAL, replacing, sync, write_durably
from fd3d.errors import CheckFailed, UsageError


def create_or_open(
    folder: Path, wanted: Manifest, keys: Sequence[str], bev_part: bytes = b""
) -> None:
    """Make the cache `wanted` at `folder`, or find it there; see `check_out`.

    `bev_part` is that file's content, put back where an existing cache lost it.

    A new cache appears in one rename, complete with manifest and without frames.
    """
    # A link to an empty folder, or to none yet, stands for what it points to.
    home = folder.resolve()
    for path in unborn_of_dead(home):
        shutil.rmtree(path, ignore_errors=True)
    check_out(folder, wanted)
    if _vacant(home):
        _create(home, wanted, keys, bev_part)
        check_out(folder, wanted)
    path = folder / layout.BEV_PART
    if bev_part and file_digest(path) != manifest.load(folder).bev_part == digest(bev_part):
        write_durably(path, bev_part)
    # Git and some copying tools drop empty folders.
    (folder / layout.COMMITS).mkdir(exist_ok=True)


def check_out(folder: Path, wanted: Manifest) -> None:
    """Nothing at `folder`, or the cache `wanted`; anything else raises `UsageError`, saying what
    it is."""
    if _vacant(folder):
        # Not the folder itself: another part of the build may have made it a moment ago.
        around = layout.cache_around(folder.resolve().parent)
        if around is not None:
            raise UsageError(f"{folder} lies inside of {around}: choose another --out")
        return
    found = manifest.load(folder)
    if found.cache_id != wanted.cache_id:
        raise UsageError(
            f"{folder} is cache {short(found.cache_id)} (expert {found.identity.expert}, split "
            f"{found.identity.split}, preset {found.preset}) and this build would make "
            f"{short(wanted.cache_id)} (expert {wanted.identity.expert}, split "
            f"{wanted.identity.split}, preset {wanted.preset}); they differ in "
            f"{', '.join(_apart(found, wanted))}: go on with the words that it was begun with, or "
            "choose another --out"
        )
    manifest.load_tokens(folder, found)


def _apart(found: Manifest, wanted: Manifest) -> list[str]:
    """What two caches differ in, for people, with the values where they are short."""
    told = []
    for name in found.differences(wanted):
        values = [getattr(one, name, getattr(one.identity, name, None)) for one in (found, wanted)]
        short_ones = all(isinstance(v, (int, str)) and len(str(v)) <= 2 * SHORT for v in values)
        told.append(f"{name} ({values[0]} there, {values[1]} here)" if short_ones else name)
    return told


# More than this share of frames over the budget (and more than one) means that the preset does not
# suit the signal.
OVER_BUDGET = 0.01


class ShardWriter:
    """Encodes the frames of one shard after the other and publishes each shard whole.

    Args:
        folder: the cache, made by `create_or_open`.
        cache: its manifest.
        keys: all frame keys, in the order of the arrays.
        frames: how many this writer is to answer for in all, those of earlier runs included; None =
            the whole cache.
        over_budget: signal -> how many of them are stored exactly already. most_over_budget: the
            largest share of them, above which (and above one) it raises `CheckFailed`.
    """

    def __init__(
        self,
        *,
        folder: Path,
        cache: Manifest,
        keys: Sequence[str],
        frames: int | None = None,
        over_budget: Mapping[str, int] | None = None,
        most_over_budget: float = OVER_BUDGET,
    ) -> None:
        self._folder, self._cache, self._keys = folder, cache, keys
        self._frames = cache.frames if frames is None else frames
        self._over, self._most_over = dict(over_budget or {}), most_over_budget
        self._begin()

    def _begin(self) -> None:
        self._shards = {
            name: ShardBuilder(array=array, shard_frames=self._cache.shard_frames)
            for name, array in self._cache.arrays.items()
        }
        self._errors: dict[str, list[FrameError]] = {}
        self._rows: dict[str, list[int]] = {}
        self._exact: dict[str, list[str]] = {}

    def add(self, position: int, values: Mapping[str, np.ndarray]) -> None:
        """Encode and pack the signals of the frame at `position`; frames come in order.

        `values` has an array for each signal, and under `focal.FOCUS` a mask for codecs that ask
        for one.
        """
        for name, spec in self._cache.signals.items():
            if name not in values:
                raise UsageError(f"the expert gave no {name}: leave it out of the signals")
            stored, error = encode(
                values[name],
                spec=spec,
                codec=self._cache.codecs[name],
                frame=self._keys[position],
                focus=values.get(focal.FOCUS),
            )
            kept = focal.places(stored["tiles"]) if "tiles" in stored else None
            for suffix, array in stored.items():
                shard = self._shards[f"{name}_{suffix}" if suffix else name]
                try:
                    row = position % self._cache.shard_frames
                    shard.add(row, array, None if suffix else kept)
                except MemoryError:
                    raise UsageError(
                        f"a shard of {self._cache.shard_frames} frames does not fit into memory: "
                        "lower --shard-frames"
                    ) from None
            if error is not None:
                self._errors.setdefault(name, []).append(error)
            if "exact" in stored:
                self._exact.setdefault(name, []).append(self._keys[position])
                self._check_budget(name, self._keys[position])
            if "count" in stored:
                self._rows.setdefault(name, []).append(int(stored["count"][0]))

    def _check_budget(self, name: str, key: str) -> None:
        self._over[name] = self._over.get(name, 0) + 1
        if self._over[name] <= max(1, self._most_over * self._frames):
            return
        budget = 100 * self._cache.codecs[name].budget
        raise CheckFailed(
            f"{self._over[name]} of {self._frames} frames are over the budget of preset "
            f"{self._cache.preset} in {name} ({budget:g} % relative error), frame {key} the last: "
            "build with another preset, lossless or fast, in another --out"
        )

    def publish(self, shard: int) -> records.Record:
        """Write the shard of the frames added last, make it durable, then commit it."""
        cache = self._cache
        frames = cache.frames_of(shard)
        forget(self._folder, shard)
        files: dict[str, tuple[int, str]] = {}
        for name, array in cache.arrays.items():
            path = self._folder / array.file_of(shard)
            with replacing(path) as partial, open(partial, "wb") as file:
                file.writelines(self._shards[name].parts())
            files[array.file_of(shard)] = size_and_crc32c(path)
        record = records.Record(
            shard=shard,
            cache_id=cache.cache_id,
            tokens=tuple(self._keys[i] for i in frames),
            files=files,
            errors={n: tuple(e.frame for e in found) for n, found in self._errors.items()},
            worst_channels={
                n: tuple(e.worst_channel for e in found) for n, found in self._errors.items()
            },
            rows={n: tuple(found) for n, found in self._rows.items()},
            exact={n: tuple(found) for n, found in self._exact.items()},
        )
        records.save(self._folder, record)
        self._begin()
        return record


def forget(folder: Path, shard: int) -> None:
    """Remove a shard's record, if there is one: it says nothing of the files to be written."""
    path = folder / layout.record_file(shard)
    if path.exists():
        path.unlink()
        sync(path.parent)


def sweep(folder: Path, cache: Manifest, *, part: Part = WHOLE, alone: bool = True) -> int:
    """Remove what a killed build left half-written in the shards of a part; the number of files
    removed. `alone`: no other part is being built."""
    removed = 0
    for inner in (*cache.arrays, layout.COMMITS):
        for path in (folder / inner).glob(f"*{PARTIAL}"):
            shard = layout.shard_of_file(path)
            if shard in range(cache.shards) and part.owns(shard):
                path.unlink(missing_ok=True)
                removed += 1
    # The cache's own files belong to all parts: this may be one that another is writing.
    for path in folder.glob(f"*{PARTIAL}") if alone else ():
        path.unlink(missing_ok=True)
        removed += 1
    return removed


def _vacant(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _create(folder: Path, wanted: Manifest, keys: Sequence[str], bev_part: bytes) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    unborn = folder.with_name(f"{_unborn_prefix(folder)}{os.getpid()}")
    try:
        layout.create_arrays(
            unborn, arrays=wanted.arrays, frames=wanted.frames, shard=wanted.shard_frames
        )
        (unborn / layout.COMMITS).mkdir()
        write_durably(unborn / layout.TOKENS, canonical_json(list(keys)))
        if bev_part:
            write_durably(unborn / layout.BEV_PART, bev_part)
        manifest.save(unborn, wanted, manifest.metadata_digests(unborn, wanted))
        spare.save(unborn, wanted)
        for path in (unborn, *unborn.rglob("*")):
            sync(path)
        # Onto an empty folder or nothing; a build that was faster makes this fail, and is used.
        with contextlib.suppress(FileExistsError):
            _rename(unborn, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(unborn, ignore_errors=True)


def _rename(unborn: Path, folder: Path) -> None:
    try:
        os.rename(unborn, folder)
    except OSError:
        if (folder / layout.MANIFEST).exists():
            raise FileExistsError(folder) from None
        raise


def _unborn_prefix(folder: Path) -> str:
    return f".{folder.name}.unborn-{socket.gethostname()}-"


def unborn_of_dead(folder: Path) -> list[Path]:
    """Folders beside the cache `folder` of builds on this machine that were killed while making
    it."""
    prefix = _unborn_prefix(folder)
    if not folder.parent.is_dir():
        return []
    found = []
    for path in folder.parent.iterdir():
        pid = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and pid.isdigit() and not alive(int(pid)):
            found.append(path)
    return sorted(found)
