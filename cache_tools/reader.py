"""Reading a cache: checked at the door, by frame key, never zeros for what is not there.

Arrays are read by `cache_tools.arrays`, on our own way or through zarr-python; either checks the
crc32c of every tile and shard index. The length of a shard's file is compared with its commit
record first, because to zarr-python a missing file is a map of fill values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cache_tools import focal, layout, manifest, records
from cache_tools.arrays import DirectArray, ZarrArray, open_array
from cache_tools.checksums import file_digest
from cache_tools.codecs import check_buffer, decode
from cache_tools.expectation import (
    Expectation,
    check_complete,
    check_expectation,
    check_signals,
)
from cache_tools.shard_files import ShardFiles, ThreadMemory
from fd3d.errors import CheckFailed, UsageError


@dataclass(frozen=True, kw_only=True)
class StoredMap:
    """A map in the numbers that are stored: value = zero + scale * stored.

    Args:
        stored: (C, Y, X) int8, or the values themselves in float16 or float32.
        scale, zero: (C,) float32; None = 1 and 0.
    """

    stored: np.ndarray
    scale: np.ndarray | None = None
    zero: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class _Where:
    """A frame: its key, its position in the arrays, the record of its shard."""

    token: str
    position: int
    record: records.Record


class CacheReader:
    """Frames of a finished cache as numpy arrays.

    May be pickled, forked and used by several threads; the files are opened at the first read.

    Args:
        path: the cache folder.
        expect: what it must be.
        allow_partial: take a cache whose build has not finished or that has damaged shards; their
            frames raise when they are read.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        expect: Expectation | None = None,
        allow_partial: bool = False,
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
            check_complete(self.path, self.manifest, self._records)
        self._layout = {
            name: layout.arrays_of(spec, self.manifest.codecs[name])
            for name, spec in self.specs.items()
        }
        self._codes = ThreadMemory()
        self._opened: dict[str, DirectArray | ZarrArray] | None = None

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

    def read(
        self,
        token: str,
        names: Sequence[str] | None = None,
        *,
        out: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, np.ndarray]:
        """The named signals (default: all) of one frame, decoded, in their specs' shape and dtype.

        Signals of fixed shape that `out` names are written there and returned from there:
        contiguous arrays of the spec's shape and dtype, which spares fresh memory for every frame.
        A frame or signal that the cache does not have raises `UsageError`, damage `CheckFailed`.
        """
        names = tuple(self.specs) if names is None else tuple(names)
        where = self._locate(token, names)
        given = {
            name: check_buffer(out[name], self.specs[name]) for name in out or () if name in names
        }
        return {name: self._signal(name, where, given.get(name)) for name in names}

    def read_stored(self, token: str, name: str, *, out: np.ndarray | None = None) -> StoredMap:
        """A map as the codec keeps it, for `fd3d.resample`, which dequantises as it goes.

        The numbers lie channels-last in memory, as `resample` likes them on CPUs, or in `out`:
        right shape and dtype, any strides. Raises as `read` does.
        """
        where = self._locate(token, (name,))
        self._check_map(name)
        own, scales = self._form(name, where)
        if out is None:
            out = np.empty((*own.shape[1:], own.shape[0]), own.dtype).transpose(2, 0, 1)
        if (out.shape, out.dtype) != (own.shape, own.dtype):
            raise UsageError(
                f"{name} is stored as {own.dtype} {own.shape}, not {out.dtype} {out.shape}: "
                "correct out="
            )
        return StoredMap(stored=self._map(own, where, out), **scales)

    def bev_part(self) -> Path | None:
        """The file of the expert's weights behind its splat, checked against the manifest; None
        for a cache that has none. One that is missing or damaged raises `CheckFailed`."""
        if not self.manifest.bev_part:
            return None
        path = self.path / layout.BEV_PART
        if file_digest(path) != self.manifest.bev_part:
            what = "damaged" if path.exists() else "missing"
            raise CheckFailed(f"{path} is {what}: run the build command again, it puts it back")
        return path

    def error(self, token: str, name: str) -> float:
        """The relative error of a map of a frame, as measured when it was stored."""
        where = self._locate(token, (name,))
        self._check_map(name)
        return where.record.errors[name][where.position % self.manifest.shard_frames]

    def exact(self, token: str, name: str) -> np.ndarray:
        """(Y, X) bool: the cells of a map that hold more than means over blocks.

        All of them but in preset focal. Raises as `read` does.
        """
        where = self._locate(token, (name,))
        self._check_map(name)
        spec, codec = self.specs[name], self.manifest.codecs[name]
        if not codec.coarse or self._form(name, where)[0].suffix:
            return np.ones(spec.shape[1:], bool)
        return focal.cells(self._tiles(name, where), codec.tile, spec.shape[1:])

    def read_area(
        self,
        token: str,
        name: str,
        *,
        channels: slice = slice(None),
        rows: slice = slice(None),
        columns: slice = slice(None),
    ) -> np.ndarray:
        """A block of a map, decoded: (channels, rows, columns) in the spec's dtype.

        Only the tiles that it touches are read. Raises as `read` does.
        """
        where = self._locate(token, (name,))
        self._check_map(name)
        if self.manifest.codecs[name].coarse:
            return self._signal(name, where, None)[channels, rows, columns]
        if any(part.step not in (None, 1) for part in (channels, rows, columns)):
            raise UsageError(f"{self.path}: {name} is read in blocks: leave out the slices' steps")
        own, scales = self._form(name, where, channels)
        stored = self._array(own, where, (channels, rows, columns))
        return self._decoded(name, {own.suffix: stored, **scales})

    def read_tiles(self, token: str, name: str, tiles: Sequence[tuple[int, int]]) -> np.ndarray:
        """Tiles (row, column) of a map, decoded: (tiles, C, tile rows, tile columns) in the spec's
        dtype, in the order given. What lies beyond the map's edge is zero.

        Tiles have as many cells on an edge as the manifest's codec says. One that the map does not
        have, or that is named twice, raises `UsageError`, and so does preset focal, which may not
        have it in this frame; otherwise as `read`.
        """
        where = self._locate(token, (name,))
        self._check_map(name)
        own, scales = self._form(name, where)
        numbers = {(int(row), int(column)): i for i, (row, column) in enumerate(tiles)}
        most = [-(-n // edge) for n, edge in zip(own.shape[1:], own.chunk[1:], strict=True)]
        there = all(0 <= row < most[0] and 0 <= column < most[1] for row, column in numbers)
        if self.manifest.codecs[name].coarse:
            raise UsageError(f"{self.path} is focal and lacks tiles: use read_area and exact")
        if not there or len(numbers) != len(tiles):
            raise UsageError(
                f"{self.path}: {name} has the tiles (0, 0) to ({most[0] - 1}, {most[1] - 1}), not "
                f"{list(tiles)}: name some of them, each once"
            )
        found = np.zeros((len(tiles), *own.chunk), self.specs[name].dtype)

        def fill(array: DirectArray | ZarrArray) -> None:
            for place, values in array.chunks(where.position, [(0, *tile) for tile in numbers]):
                into = found[numbers[place[1:]], :, : values.shape[1], : values.shape[2]]
                into[...] = self._decoded(name, {own.suffix: values, **scales})

        self._from_array(own, where, fill)
        return found

    def _locate(self, token: str, names: Sequence[str]) -> _Where:
        position = self._position.get(token)
        if position is None:
            raise UsageError(
                f"{self.path} has no frame {token!r}: it was built for split "
                f"{self.manifest.identity.split} of {self.manifest.identity.dataset_version}"
            )
        check_signals(self.path, self.manifest, names)
        shard = position // self.manifest.shard_frames
        self._check_shard(shard)
        record = self._records.get(shard)
        if record is None:
            raise UsageError(f"{self.path}: frame {token} is not built yet: finish the build")
        return _Where(token=token, position=position, record=record)

    def _check_shard(self, shard: int | None) -> None:
        if shard in self._damage:
            first = shard * self.manifest.shard_frames
            frames = self.tokens[first : first + self.manifest.shard_frames]
            raise CheckFailed(
                f"{self.path} is damaged: {self._damage[shard]}, and its frames {frames[0]} to "
                f"{frames[-1]} with it; run the build command again, it makes that shard anew"
            )

    def _check_map(self, name: str) -> None:
        if len(self.specs[name].shape) != 3:
            raise UsageError(f"{self.path}: {name} is not a map: read the whole of it")

    def _form(
        self, name: str, where: _Where, channels: slice = slice(None)
    ) -> tuple[layout.ArraySpec, dict[str, np.ndarray]]:
        """The array that has a frame's values, and its scales and zeros if those are codes."""
        arrays = {array.suffix: array for array in self._layout[name]}
        if "scale" not in arrays:
            return arrays[""], {}
        scale, zero = (self._array(arrays[n], where, (channels,)) for n in ("scale", "zero"))
        # No step is zero: so are those of a frame that is stored exactly.
        if len(scale) and not scale.any():
            return arrays["exact"], {}
        return arrays[""], {"scale": scale, "zero": zero}

    def _signal(self, name: str, where: _Where, out: np.ndarray | None) -> np.ndarray:
        own, rest = self._form(name, where)
        # Codes are only passed through; what is stored exactly goes where it is wanted at once.
        into = self._codes.array(name, own.shape, own.dtype) if rest else out
        if self.specs[name].ragged:
            count = next(array for array in self._layout[name] if array.suffix == "count")
            rest = {"count": self._array(count, where)}
        stored = {own.suffix: self._map(own, where, into), **rest}
        try:
            return self._decoded(name, stored, out)
        except CheckFailed as error:
            raise CheckFailed(f"{self.path}: frame {where.token}: {error}") from None

    def _map(self, own: layout.ArraySpec, where: _Where, out: np.ndarray | None) -> np.ndarray:
        """An array of a signal; of a focal one the tiles that are there, over the means."""
        codec = self.manifest.codecs[own.signal]
        if own.suffix or not codec.coarse:
            return self._array(own, where, out=out)
        means = next(array for array in self._layout[own.signal] if array.suffix == "coarse")
        focal.spread(self._array(means, where), out, codec.coarse)
        kept = focal.places(self._tiles(own.signal, where))
        self._from_array(own, where, lambda found: found.read(where.position, (), out, kept))
        return out

    def _tiles(self, name: str, where: _Where) -> np.ndarray:
        (tiles,) = (array for array in self._layout[name] if array.suffix == "tiles")
        found = self._array(tiles, where)
        if found.max(initial=0) > 1:
            raise CheckFailed(
                f"{self.path / tiles.file_of(where.record.shard)} is damaged, so frame "
                f"{where.token} cannot be read: run `fd3d-cache verify {self.path}`"
            )
        return found

    def _decoded(
        self, name: str, stored: Mapping[str, np.ndarray], out: np.ndarray | None = None
    ) -> np.ndarray:
        return decode(stored, spec=self.specs[name], codec=self.manifest.codecs[name], out=out)

    def _array(
        self,
        array: layout.ArraySpec,
        where: _Where,
        region: Sequence[slice] = (),
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        return self._from_array(array, where, lambda found: found.read(where.position, region, out))

    def _from_array(
        self,
        array: layout.ArraySpec,
        where: _Where,
        read: Callable[[DirectArray | ZarrArray], Any],
    ) -> Any:
        file = array.file_of(where.record.shard)
        try:
            size, wanted = os.stat(self.path / file).st_size, where.record.files[file][0]
            if size != wanted:
                raise ValueError(f"{size} bytes instead of {wanted}")
            return read(self._arrays()[array.name])
        # Damaged bytes surface as whatever the codec that met them raises.
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            what = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
            raise CheckFailed(
                f"{self.path / file} is {what}, so frame {where.token} cannot be read: "
                f"run `fd3d-cache verify {self.path}`"
            ) from error

    def _arrays(self) -> dict[str, DirectArray | ZarrArray]:
        if self._opened is None:
            group = zarr.open_group(self.path, mode="r", zarr_format=3)
            files = ShardFiles()
            self._opened = {
                name: open_array(
                    group[name], files=files, complete=True, difference=array.difference
                )
                for name, array in self.manifest.arrays.items()
            }
        return self._opened

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_opened": None}
