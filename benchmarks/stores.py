"""Ways to keep one float16 map a frame on disk: ours, and what people do by hand."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zarr
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache_tools.build import build_cache
from cache_tools.manifest import Identity
from cache_tools.reader import CacheReader
from fd3d.distill.signals import SignalSpec


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
    """Frames in a folder of its own. What `write` made, `read` finds by number."""

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
    """One file, one data set, a frame after the other, not packed."""

    def write(self, maps):
        import h5py

        with h5py.File(self.folder / "all.h5", "w") as file:
            shape = (len(maps), *maps[0].shape)
            made = file.create_dataset("bev", shape, "float16", chunks=(1, *shape[1:]))
            for frame, value in enumerate(maps):
                made[frame] = value

    def read(self, frame):
        import h5py

        if self._opened is None:
            self._opened = h5py.File(self.folder / "all.h5", "r")
        return Stored(numbers=torch.from_numpy(self._opened["bev"][frame])[None])


class Lmdb(Store):
    """One value a frame, read in place from the mapped file."""

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


class Cache(Store):
    """Ours, read directly, as the codec keeps it."""

    _reader = None

    def __init__(self, folder: Path, preset: str) -> None:
        super().__init__(folder)
        self.preset = preset

    def write(self, maps):
        who = {"expert": "benchmark", "tensors": "none", "dataset_version": "none"}
        self.report = build_cache(
            out=self.folder,
            identity=Identity(**who, preprocessing={}, mode="clean", split="all"),
            signals={"bev": SignalSpec(name="bev", shape=maps[0].shape, dtype="float16")},
            keys=[str(frame) for frame in range(len(maps))],
            compute=lambda frames: {"bev": [maps[frame] for frame in frames]},
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
        numbers = torch.from_numpy(self._group["bev"][frame])[None]
        if self.preset == "lossless":
            return Stored(numbers=numbers)
        steps = (self._group[f"bev_{name}"][frame] for name in ("scale", "zero"))
        scale, zero = map(torch.from_numpy, steps)
        return Stored(numbers=numbers, scale=scale, zero=zero)
