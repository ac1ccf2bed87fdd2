"""Encoding and publishing shards in a thread of their own, while the expert computes what follows.

One thread and one queue: frames are encoded in the order in which they were handed over, and shards
are published in that order by that thread alone, so a kill means what it meant without it. The
queue is bounded, so an expert that is faster than the disk waits instead of filling the memory.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from cache_tools.writer import ShardWriter

# As many as an encoder needs in order not to stand still; see docs/cache.md for what they cost.
WAITING_FRAMES = 4


@dataclass(frozen=True, kw_only=True)
class _Frame:
    position: int
    values: Mapping[str, np.ndarray]
    ends: int | None


class BackgroundWriter:
    """Feeds a `ShardWriter` from a thread; use as a context manager.

    What fails in the thread is raised by the next `add`, or at the end of the block. The block ends
    when everything is published. After an error in the block the shards that are whole already are
    still published, as they would have been without a thread, and the other frames are dropped.

    Args:
        writer: used by nothing else meanwhile.
        waiting: how many frames the queue holds at most; one more is in the encoder's hands.
    """

    def __init__(self, *, writer: ShardWriter, waiting: int = WAITING_FRAMES) -> None:
        self._writer = writer
        self._queue: queue.Queue[_Frame | None] = queue.Queue(maxsize=waiting)
        self._error: BaseException | None = None
        self._abandoned = False
        # Each is counted by one thread only, so that no lock is needed.
        self._ends_added = self._ends_taken = 0
        self._waited = self._encoding = self._writing = 0.0
        # A daemon: an expert that never returns must not keep a second Ctrl-C from ending it all.
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cache-writer", daemon=True)

    @property
    def seconds(self) -> dict[str, float]:
        """How long the callers of `add` and of the block's end waited, and what the thread did."""
        return {"wait": self._waited, "encode": self._encoding, "write": self._writing}

    def add(
        self, position: int, values: Mapping[str, np.ndarray], *, ends: int | None = None
    ) -> None:
        """Hand over the frame at `position`, and publish the shard `ends` after it.

        Waits while the queue is full. Nothing may write to the arrays of `values` afterwards.
        """
        start = time.perf_counter()
        try:
            self._queue.put(_Frame(position=position, values=values, ends=ends))
        finally:
            self._waited += time.perf_counter() - start
        self._ends_added += ends is not None
        if self._error is not None:
            raise self._error

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._abandoned = kind is not None
        start = time.perf_counter()
        try:
            self._end()
        except BaseException:
            # Ctrl-C while the last frames are written: the shard that is not whole is dropped.
            self._abandoned = True
            self._end()
            raise
        finally:
            self._waited += time.perf_counter() - start
        # What failed here concerns earlier frames than what failed in the block.
        if self._error not in (None, error) and (kind is None or issubclass(kind, Exception)):
            raise self._error

    def _end(self) -> None:
        self._queue.put(None)
        # Not Thread.join: interrupted by Ctrl-C, it takes the thread for ended from then on
        # (Python before 3.13).
        self._ended.wait()

    def _run(self) -> None:
        try:
            self._empty()
        finally:
            self._ended.set()

    def _empty(self) -> None:
        # The queue is emptied to its end whatever happens: nobody ever waits for a place in vain.
        while (frame := self._queue.get()) is not None:
            if self._error is None and not self._dropping():
                try:
                    self._write(frame)
                except BaseException as error:
                    self._error = error
            self._ends_taken += frame.ends is not None
            # Not kept while waiting for the next one.
            frame = None

    def _dropping(self) -> bool:
        """True when no whole shard is in the queue any more, and none will be."""
        return self._abandoned and self._ends_taken >= self._ends_added

    def _write(self, frame: _Frame) -> None:
        start = time.perf_counter()
        self._writer.add(frame.position, frame.values)
        encoded = time.perf_counter()
        self._encoding += encoded - start
        if frame.ends is not None:
            self._writer.publish(frame.ends)
            self._writing += time.perf_counter() - encoded
