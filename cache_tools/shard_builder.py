"""The bytes of a shard, standard Zarr v3, with the tiles of a frame one after the other.

zarr-python writes the same chunks in an order that scatters each frame over the whole shard, so
that no reader could fetch one in one go.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

import google_crc32c
import numpy as np
from numcodecs.blosc import BITSHUFFLE, NOSHUFFLE, SHUFFLE, Blosc

from cache_tools.differences import differences
from cache_tools.layout import ArraySpec

_ABSENT = 2**64 - 1
_SHUFFLES = {"noshuffle": NOSHUFFLE, "shuffle": SHUFFLE, "bitshuffle": BITSHUFFLE}


class ShardBuilder:
    """One shard of one array in the making; frames are packed as they are added.

    Args:
        array: which; see `cache_tools.layout.create_arrays` for how its chunks are stored.
        shard_frames: frames in a full shard.
    """

    def __init__(self, *, array: ArraySpec, shard_frames: int) -> None:
        self._array = array
        self._counts = [-(-n // c) for n, c in zip(array.shape, array.chunk, strict=True)]
        self._parts: list[bytes] = []
        if array.blosc is None:
            self._whole = np.full((shard_frames, *array.chunk), array.fill, array.dtype)
            return
        self._index = np.full((shard_frames, *self._counts, 2), _ABSENT, "<u8")
        self._end = 0
        self._codec = Blosc(
            cname=array.blosc.cname,
            clevel=array.blosc.clevel,
            shuffle=_SHUFFLES[array.blosc.shuffle],
            blocksize=array.blosc.blocksize,
            typesize=np.dtype(array.dtype).itemsize,
        )

    def add(
        self, row: int, frame: np.ndarray, only: Container[tuple[int, ...]] | None = None
    ) -> None:
        """Put a frame, in the array's shape and dtype, at `row` of the shard; of its chunks `only`
        those, None = all."""
        if self._array.blosc is None:
            self._whole[row] = frame
            return
        for place in np.ndindex(*self._counts):
            if only is not None and place not in only:
                continue
            chunk = np.full(self._array.chunk, self._array.fill, self._array.dtype)
            cut = frame[
                tuple(
                    slice(i * edge, (i + 1) * edge)
                    for i, edge in zip(place, self._array.chunk, strict=True)
                )
            ]
            if self._array.difference:
                cut = differences(cut)
            chunk[tuple(map(slice, cut.shape))] = cut
            stored = _sealed(self._codec.encode(chunk))
            self._parts.append(stored)
            self._index[(row, *place)] = self._end, len(stored)
            self._end += len(stored)

    def parts(self) -> Iterator[bytes]:
        """The file, piece by piece. Frames that were not added are not in it."""
        if self._array.blosc is None:
            yield _sealed(self._whole.tobytes())
            return
        yield from self._parts
        yield _sealed(self._index.tobytes())


def _sealed(content: bytes) -> bytes:
    return content + google_crc32c.value(content).to_bytes(4, "little")
