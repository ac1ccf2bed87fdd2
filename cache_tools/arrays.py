"""One frame, or a part of one, out of a Zarr v3 array whose first axis counts frames.

`open_array` chooses the way: our own for standard layouts in local folders (`DirectArray`),
zarr-python (`ZarrArray`) for every other store, layout and codec. Both give the same values to the
bit; a test compares them.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np
import zarr
from zarr.storage import LocalStore

from cache_tools.differences import accumulate
from cache_tools.shard_files import ChunkDamaged, ShardFiles, checked
from fd3d.resample import fused

Region = Sequence[slice]
Place = tuple[int, ...]

_COMPILED = fused.found()
_BLOSC_HEADER = 16
_AFTER_BYTES = ([], ["blosc"], ["crc32c"], ["blosc", "crc32c"])


@dataclass(frozen=True, kw_only=True)
class ZarrArray:
    """Frames of any Zarr array through zarr-python; methods as in `DirectArray`."""

    array: zarr.Array
    difference: bool = False

    def read(
        self,
        position: int,
        region: Region = (),
        out: np.ndarray | None = None,
        only: Iterable[Place] | None = None,
    ) -> np.ndarray:
        if only is not None:
            for place, values in self.chunks(position, only):
                out[tuple(_region(place, self.array.chunks[1:]))] = values
            return out
        if self.difference:
            found = self._accumulated(position, region)
        else:
            found = np.asarray(self.array[(position, *region)])
        if out is None:
            return found
        out[...] = found
        return out

    def chunks(self, position: int, places: Iterable[Place]) -> Iterator[tuple[Place, np.ndarray]]:
        for place in places:
            yield place, self.read(position, _region(place, self.array.chunks[1:]))

    def _accumulated(self, position: int, region: Region) -> np.ndarray:
        """The region with its differences undone, which begin at the first rows of tiles."""
        channels, (start, stop), columns = _bounds(region, self.array.shape[1:])
        edge = self.array.chunks[-2]
        first = start - start % edge
        found = np.array(
            self.array[position, slice(*channels), slice(first, stop), slice(*columns)]
        )
        for row in range(0, found.shape[1], edge):
            accumulate(found[:, row : row + edge])
        return found[:, start - first :]


@dataclass(frozen=True, kw_only=True)
class DirectArray:
    """Frames of an array in a local folder, read without zarr-python.

    Args:
        folder: of the array. separator: between the numbers in its file names.
        shape: (frames, ...). chunk: of what is compressed as one. shard: of one file.
        sharded: False where a file is one chunk and has no index. index_at_end: of the shard.
        dtype, fill: of the values; `fill` stands for chunks that are not there.
        blosc, crc32c: how a chunk is stored.
        difference: rows of chunks are differences (`cache_tools.differences`), which are undone.
        complete: True makes a chunk or file that is not there an error instead of `fill`.
        files: what reads the bytes.
    """

    folder: Path
    separator: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    shard: tuple[int, ...]
    sharded: bool
    index_at_end: bool
    dtype: np.dtype
    fill: np.generic
    blosc: bool
    crc32c: bool
    difference: bool
    complete: bool
    files: ShardFiles

    def read(
        self,
        position: int,
        region: Region = (),
        out: np.ndarray | None = None,
        only: Iterable[Place] | None = None,
    ) -> np.ndarray:
        """The frame at `position`, or the `region` of it: a slice for each axis, first to last,
        without steps.

        Written into `out` where it is given (right shape and dtype, any strides). Only chunks
        that the region touches are read; with `only`, which needs a whole frame in `out`, just the
        chunks that it names, and `out` keeps the rest. Damage raises `ChunkDamaged`; in a
        `complete` array a file that is not there raises `FileNotFoundError`.
        """
        bounds = _bounds(region, self.shape[1:])
        shape = tuple(stop - start for start, stop in bounds)
        if out is None:
            out = np.empty(shape, self.dtype)
        if out.shape != shape or out.dtype != self.dtype:
            raise ValueError(f"out is {out.dtype} {out.shape}, needed is {self.dtype} {shape}")
        edges = self.chunk[1:]
        touched = (
            range(start // edge, -(-stop // edge))
            for (start, stop), edge in zip(bounds, edges, strict=True)
        )
        named = itertools.product(*touched) if only is None else only
        for place, values in self.chunks(position, named):
            into, part = [], []
            for (start, stop), edge, index in zip(bounds, edges, place, strict=True):
                low, high = max(start, index * edge), min(stop, (index + 1) * edge)
                into.append(slice(low - start, high - start))
                part.append(slice(low - index * edge, high - index * edge))
            self._put(values[tuple(part)], out[tuple(into)])
        return out

    def chunks(self, position: int, places: Iterable[Place]) -> Iterator[tuple[Place, np.ndarray]]:
        """(place, values) of chunks of the frame at `position`, in the order of the file.

        A place counts chunks along each axis but the first; each is named once. Values are those
        inside the array (less than a chunk at its edges), and valid until this thread's next step
        or read. Raises as `read` does.
        """
        if not 0 <= position < self.shape[0]:
            raise IndexError(f"there is no frame {position}, the array has {self.shape[0]}")
        file, row = divmod(position, self.shard[0])
        zeros = ["0"] * (len(self.shape) - 1)
        path = self.folder / self.separator.join(("c", str(file), *zeros))
        counts = [s // c for s, c in zip(self.shard, self.chunk, strict=True)]
        numbers = {
            int(np.ravel_multi_index((row // self.chunk[0], *place), counts)): place
            for place in places
        }
        if not numbers:
            return
        chunk = self.files.memory.array("chunk", self.chunk, self.dtype)
        for number, stored in self._stored(path, list(numbers), math.prod(counts)):
            place = numbers[number]
            extent = [
                min(c, n - c * index)
                for c, n, index in zip(self.chunk[1:], self.shape[1:], place, strict=True)
            ]
            if stored is None:
                yield place, np.broadcast_to(self.fill, extent)
                continue
            self._decode(stored, chunk, place)
            if self.difference:
                accumulate(chunk[row % self.chunk[0]])
            yield place, chunk[(row % self.chunk[0], *map(slice, extent))]

    def _put(self, values: np.ndarray, into: np.ndarray) -> None:
        last = into.ndim == 3 and into.strides[0] == into.itemsize <= 4 and len(values) > 1
        if not (last and _COMPILED):
            into[...] = values
            return
        # From planar to channels-last numpy takes its time.
        from fd3d.resample.turn import turn

        bits = f"u{into.itemsize}"
        rows = self.files.memory.array("rows", (*values.shape[1:], len(values)), bits)
        turn(values.reshape(len(values), -1).view(bits), rows.reshape(-1, len(values)))
        into.transpose(1, 2, 0)[...] = rows.view(into.dtype)

    def _stored(
        self, path: Path, numbers: list[int], count: int
    ) -> Iterator[tuple[int, np.ndarray | None]]:
        try:
            if not self.sharded:
                yield 0, self.files.whole(path)
                return
            at_end = self.index_at_end
            for number, stored in self.files.chunks(
                path, numbers, count=count, index_at_end=at_end
            ):
                if stored is None and self.complete:
                    raise ChunkDamaged(f"chunk {number} is not in it")
                yield number, stored
        except FileNotFoundError:
            if self.complete:
                raise
            yield from ((number, None) for number in numbers)

    def _decode(self, stored: np.ndarray, into: np.ndarray, place: Place) -> None:
        if self.crc32c:
            stored = checked(stored, f"chunk {place}")
        size = len(stored)
        if self.blosc:
            # Blosc takes the two lengths in its header on trust.
            size = packed = 0
            if len(stored) >= _BLOSC_HEADER:
                size, packed = struct.unpack_from("<4xI4xI", stored)
            if packed != len(stored):
                raise ChunkDamaged(f"chunk {place} is not what Blosc wrote")
        if size != into.nbytes:
            raise ChunkDamaged(f"chunk {place} holds {size} bytes, not {into.nbytes}")
        if self.blosc:
            numcodecs.blosc.decompress(stored, into)
        else:
            into.reshape(-1).view(np.uint8)[:] = stored


def open_array(
    array: zarr.Array, *, files: ShardFiles, complete: bool = False, difference: bool = False
) -> DirectArray | ZarrArray:
    """Our own way to read `array` where its store, layout and codecs allow it, else zarr-python's.

    `difference` says that its rows are differences, which both ways undo.
    With `complete`, chunks that are not there are errors (on our own way) instead of fill values.
    """
    plan = _plan(array)
    if plan is None:
        return ZarrArray(array=array, difference=difference)
    return DirectArray(
        folder=Path(array.store.root) / array.path,
        shape=array.shape,
        dtype=array.dtype,
        fill=array.dtype.type(array.fill_value),
        complete=complete,
        difference=difference,
        files=files,
        **plan,
    )


def _plan(array: zarr.Array) -> dict[str, Any] | None:
    """What of `DirectArray` the metadata decides; None for what it does not know."""
    meta = array.metadata.to_dict()
    if not isinstance(array.store, LocalStore) or meta["zarr_format"] != 3 or array.ndim < 2:
        return None
    keys, codecs = meta["chunk_key_encoding"], meta["codecs"]
    plain = meta["chunk_grid"]["name"] == "regular" and not meta.get("storage_transformers")
    if keys["name"] != "default" or not plain or array.dtype.kind not in "biufc":
        return None
    sharded, at_end = codecs[0]["name"] == "sharding_indexed", True
    if sharded:
        inner = codecs[0]["configuration"]
        index_codecs = inner["index_codecs"]
        if len(codecs) > 1 or not _known(index_codecs, 8) or _names(index_codecs)[1:] != ["crc32c"]:
            return None
        codecs, at_end = inner["codecs"], inner["index_location"] == "end"
    if not _known(codecs, array.dtype.itemsize):
        return None
    shard = array.shards if sharded else array.chunks
    if any(edge < length for edge, length in zip(shard[1:], array.shape[1:], strict=True)):
        return None
    return {
        "separator": keys["configuration"]["separator"],
        "chunk": array.chunks,
        "shard": shard,
        "sharded": sharded,
        "index_at_end": at_end,
        "blosc": "blosc" in _names(codecs),
        "crc32c": "crc32c" in _names(codecs),
    }


def _known(codecs: Sequence[dict[str, Any]], itemsize: int) -> bool:
    little = itemsize == 1 or codecs[0].get("configuration", {}).get("endian") == "little"
    rest = _names(codecs)[1:]
    return codecs[0]["name"] == "bytes" and little and rest in _AFTER_BYTES


def _names(codecs: Sequence[dict[str, Any]]) -> list[str]:
    return [codec["name"] for codec in codecs]


def _bounds(region: Region, shape: Sequence[int]) -> list[tuple[int, int]]:
    filled = (*region, *[slice(None)] * (len(shape) - len(region)))
    found = []
    for part, length in zip(filled, shape, strict=True):
        start, stop, step = part.indices(length)
        if step != 1:
            raise ValueError("a region is made of slices without steps")
        found.append((start, max(start, stop)))
    return found


def _region(place: Place, edges: Sequence[int]) -> list[slice]:
    return [slice(i * edge, (i + 1) * edge) for i, edge in zip(place, edges, strict=True)]
