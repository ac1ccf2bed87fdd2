"""Ways to keep one float16 map a frame on disk: ours, and what people do by hand."""

from __future__ import annotations

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zarr
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache_tools import layout
from cache_tools.build import build_cache
from cache_tools.focal import FOCUS
from cache_tools.manifest import Identity
from cache_tools.reader import CacheReader
from fd3d.distill.signals import SignalSpec
from fd3d.grid import BEVGrid


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A map as it came from the disk: value = zero + scale * numbers.

    numbers: (1, C, Y, X) float16 or int8. scale, zero: (C,) float32, or None = 1 and 0.
    """

    numbers: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None

    def float(self) -> Tensor:
        value = self.numbers.float()
        if self.scale is None:
            return value
        return value.mul_(self.scale.view(1, -1, 1, 1)).add_(self.zero.view(1, -1, 1, 1))


class Store(ABC):
    """Frames in a folder of its own. What `write` made, `read` finds by number.

    `package`: what it needs beyond this project, "" for nothing.
    """

    package = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened = None

    @abstractmethod
    def write(self, maps: Sequence[np.ndarray]) -> None:
        """Keep the maps, each (C, Y, X) float16, in the empty folder."""

    @abstractmethod
    def read(self, frame: int) -> Stored:
        """One frame."""

    def close(self) -> None:
        """Let go of what is open: mapped pages cannot be taken out of memory."""
        if self._opened is not None:
            self._opened.close()
        self._opened = None

    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def evict(self) -> None:
        """Ask the system to forget the files' bytes, so that the next read is from the disk."""
        self.close()
        for path in self.files():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def installed(made: dict[str, Store]) -> dict[str, Store]:
    """Those of the stores whose package is there; a line says which are left out."""
    found = {n: s for n, s in made.items() if not s.package or importlib.util.find_spec(s.package)}
    for name in made.keys() - found.keys():
        print(f"left out: {name} (pip install 'fd3d[bench]' brings {made[name].package})")
    return found


class Npy(Store):
    def write(self, maps):
        for frame, value in enumerate(maps):
            np.save(self.folder / f"{frame}.npy", value)

    def read(self, frame):
        return Stored(numbers=torch.from_numpy(np.load(self.folder / f"{frame}.npy"))[None])


class NpyMapped(Npy):
    def read(self, frame):
        mapped = np.load(self.folder / f"{frame}.npy", mmap_mode="c")
        return Stored(numbers=torch.from_numpy(mapped)[None])


class Npz(Store):
    """Deflated, as `np.savez_compressed` does it."""

    def write(self, maps):
        for frame, value in enumerate(maps):
            np.savez_compressed(self.folder / f"{frame}.npz", bev=value)

    def read(self, frame):
        with np.load(self.folder / f"{frame}.npz") as found:
            return Stored(numbers=torch.from_numpy(found["bev"])[None])


class NpyInt8(Store):
    """The numbers of preset `balanced`, channels-last, not packed and without checksums."""

    def write(self, maps):
        cache = Cache(self.folder / "made", "balanced")
        cache.write(maps)
        for frame in range(len(maps)):
            found = cache.reader().read_stored(str(frame), "bev")
            np.save(self.folder / f"{frame}.npy", found.stored.transpose(1, 2, 0))
            np.save(self.folder / f"{frame}-steps.npy", np.stack([found.scale, found.zero]))
        for path in cache.files():
            path.unlink()

    def read(self, frame):
        last = torch.from_numpy(np.load(self.folder / f"{frame}.npy"))
        scale, zero = torch.from_numpy(np.load(self.folder / f"{frame}-steps.npy"))
        return Stored(numbers=last.permute(2, 0, 1)[None], scale=scale, zero=zero)


class TorchSave(Store):
    def write(self, maps):
        for frame, value in enumerate(maps):
            torch.save(torch.from_numpy(value), self.folder / f"{frame}.pt")

    def read(self, frame):
        return Stored(numbers=torch.load(self.folder / f"{frame}.pt", weights_only=True)[None])


class Safetensors(Store):
    def write(self, maps):
        for frame, value in enumerate(maps):
            save_file({"bev": torch.from_numpy(value)}, self.folder / f"{frame}.safetensors")

    def read(self, frame):
        return Stored(numbers=load_file(self.folder / f"{frame}.safetensors")["bev"][None])


class Hdf5(Store):
    """One file, one data set, a frame after the other; `packing` as h5py calls it."""

    package = "h5py"

    def __init__(self, folder: Path, packing: str | None = None) -> None:
        super().__init__(folder)
        self.packing = packing

    def write(self, maps):
        import h5py

        with h5py.File(self.folder / "all.h5", "w") as file:
            shape = (len(maps), *maps[0].shape)
            how = {"chunks": (1, *shape[1:]), "compression": self.packing}
            made = file.create_dataset("bev", shape, "float16", **how)
            for frame, value in enumerate(maps):
                made[frame] = value

    def read(self, frame):
        import h5py

        if self._opened is None:
            self._opened = h5py.File(self.folder / "all.h5", "r")
        return Stored(numbers=torch.from_numpy(self._opened["bev"][frame])[None])


class Lmdb(Store):
    """One value a frame, read in place from the mapped file."""

    package = "lmdb"

    def write(self, maps):
        import lmdb

        size = 2 * sum(value.nbytes for value in maps) + (1 << 20)
        with lmdb.open(str(self.folder), map_size=size) as file, file.begin(write=True) as all:
            for frame, value in enumerate(maps):
                all.put(str(frame).encode(), value.tobytes())
        np.save(self.folder / "shape.npy", maps[0].shape)

    def read(self, frame):
        import lmdb

        if self._opened is None:
            self._opened = lmdb.open(str(self.folder), readonly=True, lock=False)
            self._shape = tuple(np.load(self.folder / "shape.npy"))
        with self._opened.begin(buffers=True) as all:
            flat = np.frombuffer(all.get(str(frame).encode()), np.float16)
            # The buffer is good only inside the transaction.
            return Stored(numbers=torch.from_numpy(flat.reshape(self._shape).copy())[None])


class WebDataset(Store):
    """One tar, read by its library from the first frame to the last and around again."""

    package = "webdataset"
    _stream: Iterator | None = None

    def write(self, maps):
        import webdataset

        with webdataset.TarWriter(str(self.folder / "all.tar")) as all:
            for frame, value in enumerate(maps):
                all.write({"__key__": str(frame), "npy": value})

    def read(self, frame):
        for _ in range(2):
            for found in self._stream or ():
                if found["__key__"] == str(frame):
                    return Stored(numbers=torch.from_numpy(found["npy"])[None])
            self._stream = self._from_the_start()
        raise KeyError(frame)

    def _from_the_start(self) -> Iterator:
        import webdataset

        path = str(self.folder / "all.tar")
        return iter(webdataset.WebDataset(path, shardshuffle=False).decode())

    def close(self):
        """Nothing: a stream that starts again reads everything before a frame."""


class ZarrDefaults(Store):
    """An array a frame as `zarr.save_array` makes it, chunks and packing by default."""

    def write(self, maps):
        for frame, value in enumerate(maps):
            zarr.save_array(self.folder / f"{frame}.zarr", value)

    def read(self, frame):
        found = zarr.open_array(self.folder / f"{frame}.zarr", mode="r")[:]
        return Stored(numbers=torch.from_numpy(found)[None])


class Cache(Store):
    """Ours, read directly, as the codec keeps it.

    `grid` and `focus`, which gives the mask of a frame by number, are for preset focal.
    """

    _reader = None

    def __init__(
        self,
        folder: Path,
        preset: str,
        *,
        grid: BEVGrid | None = None,
        focus: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        super().__init__(folder)
        self.preset, self.grid, self.focus = preset, grid, focus

    def write(self, maps):
        who = {"expert": "benchmark", "tensors": "none", "dataset_version": "none"}
        bev = SignalSpec(name="bev", shape=maps[0].shape, dtype="float16", grid=self.grid)

        def compute(frames: Sequence[int]) -> dict[str, list[np.ndarray]]:
            found = {"bev": [maps[frame] for frame in frames]}
            return {**found, FOCUS: list(map(self.focus, frames))} if self.focus else found

        self.report = build_cache(
            out=self.folder,
            identity=Identity(**who, preprocessing={}, mode="clean", split="all"),
            signals={"bev": bev},
            keys=[str(frame) for frame in range(len(maps))],
            compute=compute,
            preset=self.preset,
            shard_frames=16,
            quiet=True,
        )

    def reader(self) -> CacheReader:
        if self._reader is None:
            self._reader = CacheReader(self.folder)
            self._memory = None
        return self._reader

    def read(self, frame):
        found = self.reader().read_stored(str(frame), "bev", out=self._memory)
        self._memory = found.stored
        numbers = torch.from_numpy(found.stored)[None]
        if found.scale is None:
            return Stored(numbers=numbers)
        scale, zero = torch.from_numpy(found.scale), torch.from_numpy(found.zero)
        return Stored(numbers=numbers, scale=scale, zero=zero)


class CacheDecoded(Cache):
    """Ours, decoded to float16, as `CachedExpert` gives it."""

    def read(self, frame):
        value = self.reader().read(str(frame), ["bev"])["bev"]
        return Stored(numbers=torch.from_numpy(value)[None])


class PlainZarr(Cache):
    """The same cache through zarr-python."""

    _group = None

    def read(self, frame):
        if self._group is None:
            self._group = zarr.open_group(self.folder, mode="r")
        found = self._group["bev"][frame]
        tile = self._group["bev"].attrs.get(layout.DIFFERENCE, 0)
        for row in range(0, found.shape[1] if tile else 0, tile or 1):
            rows = found[:, row : row + tile]
            np.cumsum(rows, axis=1, dtype=rows.dtype, out=rows)
        numbers = torch.from_numpy(found)[None]
        if self.preset == "lossless":
            return Stored(numbers=numbers)
        steps = (self._group[f"bev_{name}"][frame] for name in ("scale", "zero"))
        scale, zero = map(torch.from_numpy, steps)
        return Stored(numbers=numbers, scale=scale, zero=zero)
