"""Reading a cache: checked at the door, by frame key, never zeros for what is not there.

This reads through plain zarr-python, which checks the crc32c of every tile and shard index; the
length of a shard's file is compared with its commit record first, because to zarr-python a
missing file is a map of fill values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import zarr

from cache_tools import layout, lease, manifest, records
from cache_tools.codecs import decode
from cache_tools.expectation import Expectation, check_expectation, check_signals
from cache_tools.manifest import Manifest
from fd3d.errors import CheckFailed, UsageError


class CacheReader:
    """Frames of a finished cache as numpy arrays.

    May be pickled and forked: each process opens the files for itself at its first read.

    Args:
        path: the cache folder.
        expect: what it must be.
        allow_partial: take a cache whose build has not finished or that has damaged shards; their
            frames raise when they are read.
    """

    def __init__(
        self, path: str | Path, *, expect: Expectation | None = None, allow_partial: bool = False
    ) -> None:
        self.path = Path(path)
        self.manifest = manifest.load(self.path)
        if expect is not None:
            check_expectation(self.path, self.manifest, expect)
        self.tokens = manifest.load_tokens(self.path, self.manifest)
        self._position = {token: i for i, token in enumerate(self.tokens)}
        self._records, self._damage = records.load_all(self.path, self.manifest)
        if not allow_partial:
            self._check_shard(min(self._damage, default=None))
            _check_complete(self.path, self.manifest, self._records)
        self._opened: tuple[int, dict[str, zarr.Array]] | None = None

    @property
    def specs(self):
        """Signal name -> `SignalSpec`."""
        return self.manifest.signals

    @property
    def signals_id(self) -> str:
        return self.manifest.signals_id

    @property
    def cache_id(self) -> str:
        return self.manifest.cache_id

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: str) -> bool:
        position = self._position.get(token)
        return position is not None and position // self.manifest.shard_frames in self._records

    def read(self, token: str, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """The named signals (default: all) of one frame, decoded, in their specs' shape and dtype.

        A frame or signal that the cache does not have raises `UsageError`, damage `CheckFailed`.
        """
        position = self._position.get(token)
        if position is None:
            raise UsageError(
                f"{self.path} has no frame {token!r}: it was built for split "
                f"{self.manifest.identity.split} of {self.manifest.identity.dataset_version}"
            )
        names = tuple(self.specs) if names is None else tuple(names)
        check_signals(self.path, self.manifest, names)
        shard = position // self.manifest.shard_frames
        self._check_shard(shard)
        record = self._records.get(shard)
        if record is None:
            raise UsageError(f"{self.path}: frame {token} is not built yet: finish the build")
        return {name: self._signal(name, position, record) for name in names}

    def _check_shard(self, shard: int | None) -> None:
        if shard in self._damage:
            raise CheckFailed(
                f"{self.path} is damaged: {self._damage[shard]}; run the build command again, it "
                f"makes that shard anew"
            )

    def _signal(self, name: str, position: int, record: records.Record) -> np.ndarray:
        spec, codec = self.specs[name], self.manifest.codecs[name]
        stored = {}
        for array in layout.arrays_of(spec, codec):
            stored[array.suffix] = self._array(array, position, record)
        try:
            return decode(stored, spec=spec, codec=codec)
        except CheckFailed as error:
            raise CheckFailed(f"{self.path}: frame {self.tokens[position]}: {error}") from None

    def _array(self, array: layout.ArraySpec, position: int, record: records.Record) -> np.ndarray:
        file = array.file_of(record.shard)
        try:
            size = os.stat(self.path / file).st_size
            if size != record.files[file][0]:
                raise ValueError(f"{size} bytes instead of {record.files[file][0]}")
            return self._stores()[array.name][position]
        # Damaged bytes surface as whatever the codec that met them raises.
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            what = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
            raise CheckFailed(
                f"{self.path / file} is {what}, so frame {self.tokens[position]} cannot be read: "
                f"run `fd3d-cache verify {self.path}`"
            ) from error

    def _stores(self) -> dict[str, zarr.Array]:
        if self._opened is None or self._opened[0] != os.getpid():
            group = zarr.open_group(self.path, mode="r", zarr_format=3)
            self._opened = os.getpid(), {name: group[name] for name in self.manifest.arrays}
        return self._opened[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None}


def _check_complete(path: Path, cache: Manifest, done: Mapping[int, records.Record]) -> None:
    if len(done) == cache.shards:
        return
    holder = lease.holder(path)
    how = (
        f"process {holder.pid} on {holder.host} is building it: wait for it"
        if holder
        else "nobody is building it now: run the build command again, it goes on where it stopped"
    )
    frames = sum(len(record.tokens) for record in done.values())
    raise UsageError(f"{path} is not finished ({frames} of {cache.frames} frames), and {how}")
