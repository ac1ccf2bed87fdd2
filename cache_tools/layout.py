"""Where things lie in a cache folder, and which frames share a shard.

    CACHE.zarr/zarr.json         a Zarr v3 group
    CACHE.zarr/manifest.json     what the cache is (cache_tools/manifest.py)
    CACHE.zarr/tokens.json       frame keys, in the order of the arrays' first axis
    CACHE.zarr/spare.json        a copy of these and of the arrays' metadata, for repair
    CACHE.zarr/bev_part.safetensors   the expert behind its splat (fd3d/distill/bev_part.py)
    CACHE.zarr/bev/c.3.0.0.0     shard 3 of the array `bev`
    CACHE.zarr/commits/00003.json   the record that makes shard 3's frames exist
    CACHE.zarr/report.json       measured things: errors, times, machine

Shard files lie flat in their array's folder ("." as separator), so one fsync of one folder makes
a shard's name durable. The first index in a file's name is the shard, in every array.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from cache_tools.presets import SignalCodec
from fd3d.distill.signals import SignalSpec
from fd3d.errors import UsageError

MANIFEST = "manifest.json"
TOKENS = "tokens.json"
COMMITS = "commits"
REPORT = "report.json"
SPARE = "spare.json"
BEV_PART = "bev_part.safetensors"
ATTRIBUTE = "fd3d_cache"

# Says after how many rows the differences in an array begin anew.
DIFFERENCE = "fd3d_rows_are_differences_in_tiles_of"

# Of a frame that was not written, in the array that says which tiles a frame has.
ABSENT = 255


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One Zarr array: `shape` and `chunk` are those of one frame."""

    name: str
    signal: str
    suffix: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str
    fill: float
    blosc: SignalCodec | None

    @property
    def difference(self) -> bool:
        """Whether its rows are differences, see `cache_tools.differences`."""
        return self.blosc is not None and self.blosc.difference

    def file_of(self, shard: int) -> str:
        """The path inside the cache of a shard's file."""
        return f"{self.name}/c.{shard}" + ".0" * len(self.shape)


def arrays_of(spec: SignalSpec, codec: SignalCodec) -> tuple[ArraySpec, ...]:
    """The arrays that hold one signal, its own first.

    A chunk that is missing must not pass for data, so fill values are ones that no frame has
    where the dtype offers one: NaN, or -1 rows.
    """
    name, shape = spec.name, spec.shape

    def cut(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-2], *(min(codec.tile, cells) for cells in shape[-2:]))

    chunk = cut(shape) if len(shape) == 3 else shape

    def array(suffix: str, shape, chunk, dtype: str, fill: float, blosc=None) -> ArraySpec:
        return ArraySpec(
            name=f"{name}_{suffix}" if suffix else name,
            signal=name,
            suffix=suffix,
            shape=tuple(shape),
            chunk=tuple(chunk),
            dtype=dtype,
            fill=fill,
            blosc=blosc,
        )

    if codec.kind == "int8":
        channels = shape[:1]
        found = (
            array("", shape, chunk, "int8", 0, codec),
            array("scale", channels, channels, "float32", np.nan),
            array("zero", channels, channels, "float32", np.nan),
            array("exact", shape, chunk, spec.dtype, np.nan, codec.exactly()),
        )
        if not codec.coarse:
            return found
        means = (shape[0], *(-(-cells // codec.coarse) for cells in shape[1:]))
        tiles = tuple(-(-cells // edge) for cells, edge in zip(shape[1:], chunk[1:], strict=True))
        return (
            *found,
            array("coarse", means, cut(means), "int8", 0, codec),
            array("tiles", tiles, tiles, "uint8", ABSENT),
        )
    own = array("", shape, chunk, spec.dtype, np.nan, codec)
    if codec.kind == "table":
        return own, array("count", (1,), (1,), "int32", -1)
    return (own,)


def all_arrays(
    signals: Mapping[str, SignalSpec], codecs: Mapping[str, SignalCodec]
) -> dict[str, ArraySpec]:
    """Every array of a cache by name; two signals that would share one raise `UsageError`."""
    found: dict[str, ArraySpec] = {}
    for name, spec in signals.items():
        for array in arrays_of(spec, codecs[name]):
            if array.name in found or array.name == COMMITS:
                raise UsageError(f"signal {name!r} needs an array that exists already: rename it")
            found[array.name] = array
    return found


def create_arrays(
    folder: Path, *, arrays: Mapping[str, ArraySpec], frames: int, shard: int
) -> None:
    """Write the group's and arrays' metadata into the empty `folder`; no frame yet."""
    group = zarr.create_group(folder, zarr_format=3, attributes={ATTRIBUTE: MANIFEST})
    for array in arrays.values():
        # A table's or vector's chunk is one frame of it; per-channel numbers are too small for
        # that, so a shard's worth of them is one chunk.
        sharded = array.blosc is not None
        whole = tuple(-(-n // c) * c for n, c in zip(array.shape, array.chunk, strict=True))
        compressors = [Crc32cCodec()]
        if sharded:
            compressors.insert(0, _blosc(array.blosc, array.dtype))
        group.create_array(
            array.name,
            shape=(frames, *array.shape),
            dtype=array.dtype,
            shards=(shard, *whole) if sharded else None,
            chunks=(1, *array.chunk) if sharded else (shard, *array.chunk),
            compressors=compressors,
            fill_value=array.fill,
            attributes={DIFFERENCE: array.chunk[-2]} if array.difference else None,
            chunk_key_encoding={"name": "default", "separator": "."},
        )


def cache_around(path: Path) -> Path | None:
    """The cache that `path` is, or lies in; None where there is none."""
    home = path.resolve()
    both = (MANIFEST, TOKENS)
    around = (home, *home.parents)
    return next((one for one in around if all((one / name).exists() for name in both)), None)


def raw_frame_bytes(signals: Iterable[SignalSpec]) -> int:
    """Bytes of one frame's signals as plain arrays, tables at their longest."""
    return sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in signals)


def metadata_files(arrays: Mapping[str, ArraySpec]) -> tuple[str, ...]:
    """Paths of all Zarr metadata inside a cache; their digests are in the manifest."""
    return ("zarr.json", *(f"{name}/zarr.json" for name in arrays))


def record_file(shard: int) -> str:
    """The path inside the cache of a shard's commit record."""
    return f"{COMMITS}/{shard:05d}.json"


def shard_count(frames: int, shard_frames: int) -> int:
    """How many shards hold so many frames."""
    return -(-frames // shard_frames)


def frames_of(shard: int, *, frames: int, shard_frames: int) -> range:
    """Positions of a shard's frames; the last shard may have fewer."""
    return range(shard * shard_frames, min((shard + 1) * shard_frames, frames))


def shard_of_file(path: Path) -> int | None:
    """The shard that a data file or its leftover `.partial` belongs to; None for other files."""
    head, *rest = path.name.split(".")
    if head == "c" and rest and rest[0].isdigit():
        return int(rest[0])
    if path.parent.name == COMMITS and head.isdigit():
        return int(head)
    return None


def _blosc(codec: SignalCodec, dtype: str) -> BloscCodec:
    return BloscCodec(
        typesize=np.dtype(dtype).itemsize,
        cname=codec.cname,
        clevel=codec.clevel,
        shuffle=codec.shuffle,
        blocksize=codec.blocksize,
    )
