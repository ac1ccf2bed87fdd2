"""Bytes of chunks out of local Zarr v3 shard files: few preads, bounded memory, no threads.

A file is open only while it is read from, and what is kept (shard indexes, the memory that bytes
are read into) belongs to the thread that uses it. So there is no lock that a fork could catch
closed, and no file position or buffer that two readers share.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import google_crc32c
import numpy as np

# In each thread. The index of 16 frames of 256x256 in tiles of 32x32 has 16 kB.
MAX_INDEXES = 2048
# Reading this much that nobody asked for costs about as much as another call.
GAP_BYTES = 16 << 10
RUN_BYTES = 1 << 20

_ABSENT = 2**64 - 1
_CRC_BYTES = 4


class ChunkDamaged(ValueError):
    """Stored bytes that are not what was written."""


class ThreadMemory(threading.local):
    """Arrays that are written over again and again, one set in each thread: fresh pages cost as
    much as the work. Pickles as an empty one."""

    def __init__(self) -> None:
        self._arrays: dict[Hashable, np.ndarray] = {}
        self.indexes: dict[Hashable, np.ndarray] = {}

    def array(self, key: Hashable, shape: tuple[int, ...], dtype: str | np.dtype) -> np.ndarray:
        """The array of that name with whatever was left in it; valid until the next call."""
        found = self._arrays.get(key)
        if found is None or found.shape != shape or found.dtype != dtype:
            found = self._arrays[key] = np.empty(shape, dtype)
        return found

    def bytes(self, size: int) -> np.ndarray:
        """(size,) uint8, as `array`; grows and does not shrink."""
        found = self._arrays.get(None)
        if found is None or len(found) < size:
            found = self._arrays[None] = np.empty(size, np.uint8)
        return found[:size]

    def __reduce__(self):
        return ThreadMemory, ()


class ShardFiles:
    """Reads chunks of shard files. Threads may share one, and a fork may go on with it.

    Args:
        max_indexes: shard indexes that each thread keeps.
        gap_bytes: chunks no further apart than this are read in one go.
        run_bytes: most that one go reads, unless a single chunk is longer.
    """

    def __init__(
        self,
        *,
        max_indexes: int = MAX_INDEXES,
        gap_bytes: int = GAP_BYTES,
        run_bytes: int = RUN_BYTES,
    ) -> None:
        self._max_indexes, self._gap_bytes, self._run_bytes = max_indexes, gap_bytes, run_bytes
        self.memory = ThreadMemory()

    def whole(self, path: Path) -> np.ndarray:
        """All bytes of a file, (size,) uint8, valid until the next read of this thread.

        A file that is not there raises `FileNotFoundError`.
        """
        with open(path, "rb", buffering=0) as file:
            return self._read(file, 0, os.fstat(file.fileno()).st_size)

    def chunks(
        self, path: Path, numbers: Sequence[int], *, count: int, index_at_end: bool = True
    ) -> Iterator[tuple[int, np.ndarray | None]]:
        """(number, stored bytes) of each of the chunks, in the order of the file; None for a chunk
        that the shard does not hold.

        Args:
            path: the shard. One that is not there raises `FileNotFoundError`.
            numbers: which chunks, each once, counted in C order inside the shard.
            count: chunks that a full shard has.
            index_at_end: where the shard's index is.

        The bytes are (n,) uint8 and valid until the next step. An index that is damaged raises
        `ChunkDamaged`.
        """
        with open(path, "rb", buffering=0) as file:
            index = self._index(path, file, count, index_at_end)
            asked = np.asarray(numbers, np.int64)
            there = index[asked, 0] != _ABSENT
            for number in asked[~there]:
                yield int(number), None
            asked = asked[there]
            asked = asked[np.argsort(index[asked, 0])]
            places = [(int(number), *map(int, index[number])) for number in asked]
            for run in self._runs(places):
                first = run[0][1]
                end = max(start + length for _, start, length in run)
                content = self._read(file, first, end - first)
                for number, start, length in run:
                    yield number, content[start - first : start - first + length]

    def _runs(self, places: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
        """(number, start, length) by start, put together to what one pread fetches."""
        run: list[tuple[int, int, int]] = []
        for place in places:
            _, start, length = place
            if run:
                end = run[-1][1] + run[-1][2]
                too_long = start + length - run[0][1] > self._run_bytes
                if too_long or start - end > self._gap_bytes:
                    yield run
                    run = []
            run.append(place)
        if run:
            yield run

    def _index(self, path: Path, file, count: int, at_end: bool) -> np.ndarray:
        """(count, 2) uint64: offset and length of each chunk, both all ones for none."""
        stat = os.fstat(file.fileno())
        # A file that was replaced since is another one.
        key = (path, count, stat.st_size, stat.st_ino, stat.st_mtime_ns)
        kept = self.memory.indexes
        index = kept.pop(key, None)
        if index is None:
            index = self._read_index(file, stat.st_size, count, at_end)
        # Those used last are at the end.
        kept[key] = index
        if len(kept) > self._max_indexes:
            del kept[next(iter(kept))]
        return index

    def _read_index(self, file, size: int, count: int, at_end: bool) -> np.ndarray:
        length = 16 * count + _CRC_BYTES
        if size < length:
            raise ChunkDamaged(f"{size} bytes, its index alone has {length}")
        stored = self._read(file, size - length if at_end else 0, length)
        index = checked(stored, "the shard's index").copy().view("<u8").reshape(count, 2)
        starts, lengths = index[index[:, 0] != _ABSENT].T
        # Differences, for a sum of two such numbers may wrap around.
        if ((starts > size) | (lengths > size - np.minimum(starts, size))).any():
            raise ChunkDamaged("the shard's index points beyond its end")
        return index

    def _read(self, file, start: int, length: int) -> np.ndarray:
        into = self.memory.bytes(length)
        done = 0
        while done < length:
            got = os.preadv(file.fileno(), [into[done:]], start + done)
            if not got:
                raise ChunkDamaged(f"it ends at byte {start + done}, {start + length} are needed")
            done += got
        return into


def checked(stored: np.ndarray, what: str) -> np.ndarray:
    """The bytes before a crc32c that agrees with them; else `ChunkDamaged` that says `what`."""
    content, tail = stored[:-_CRC_BYTES], stored[-_CRC_BYTES:]
    wanted = int.from_bytes(tail.tobytes(), "little")
    found = google_crc32c.value(content)
    if len(tail) < _CRC_BYTES or found != wanted:
        raise ChunkDamaged(f"crc32c of {what} is {found:08x}, stored is {wanted:08x}")
    return content
