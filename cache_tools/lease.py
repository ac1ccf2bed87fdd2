"""Notes saying who builds a cache now, so that a second build stops before it wastes hours.

A lease only warns. What keeps builds apart is that shards belong to parts by arithmetic and that
whole files are renamed into place; a lease left by a killed build stops nobody.

A lease is an empty file named after its part, host and process: it cannot be half-written, and no
two builds share one. Its time of change is the heartbeat.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cache_tools.parts import Part
from fd3d.errors import UsageError

HEARTBEAT_SECONDS = 5.0
# Without a heartbeat for so long a lease is dead, whatever its process id says now.
STALE_SECONDS = 60.0

_NAME = re.compile(r"lease-([1-9]\d*)-of-([1-9]\d*)-(.+)-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that builds a part of a cache, and how long ago it last said so."""

    part: Part
    host: str
    pid: int
    silent_seconds: float

    def __str__(self) -> str:
        part = "" if self.part.whole else f" (part {self.part})"
        return f"process {self.pid} on {self.host}{part}"

    @property
    def file(self) -> str:
        """The lease's name in the cache folder."""
        return f"lease-{self.part.number}-of-{self.part.of}-{self.host}-{self.pid}"


def holders(folder: Path) -> tuple[Holder, ...]:
    """Who builds the cache at `folder` now, by part."""
    return tuple(holder for holder in _noted(folder) if _living(holder))


def stale(folder: Path) -> tuple[Holder, ...]:
    """Leases of processes that no longer build: ended, or silent for too long."""
    return tuple(holder for holder in _noted(folder) if not _living(holder))


def is_lease(name: str) -> bool:
    """True for the name of a lease."""
    return _NAME.fullmatch(name) is not None


@contextlib.contextmanager
def held(folder: Path, part: Part) -> Iterator[tuple[Holder, ...]]:
    """Hold the lease of a part, with a heartbeat; yields the living holders of other parts.

    A living holder of shards of this part raises `UsageError`. Of two that start at the same
    moment at least one is refused: each leaves its note before it looks for others.
    """
    mine = Holder(part=part, host=socket.gethostname(), pid=os.getpid(), silent_seconds=0.0)
    path = folder / mine.file
    path.touch()
    try:
        others = [h for h in _noted(folder) if (h.host, h.pid) != (mine.host, mine.pid)]
        living = tuple(filter(_living, others))
        for other in living:
            if part.meets(other.part):
                raise UsageError(
                    f"{folder} is being built by {other}: wait for it to end, or stop it and run "
                    "the same command again"
                )
        for dead in set(others) - set(living):
            (folder / dead.file).unlink(missing_ok=True)
        with _beating(path):
            yield living
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def _beating(path: Path) -> Iterator[None]:
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                path.touch()

    thread = threading.Thread(target=beat, name="cache-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _noted(folder: Path) -> list[Holder]:
    """All leases, of the living and the dead."""
    found = []
    for path in folder.glob("lease-*"):
        name = _NAME.fullmatch(path.name)
        if name is None or int(name[1]) > int(name[2]):
            continue
        with contextlib.suppress(FileNotFoundError):
            found.append(
                Holder(
                    part=Part(number=int(name[1]), of=int(name[2])),
                    host=name[3],
                    pid=int(name[4]),
                    silent_seconds=time.time() - path.stat().st_mtime,
                )
            )
    return sorted(found, key=lambda holder: (holder.part.of, holder.part.number))


def _living(holder: Holder) -> bool:
    here = holder.host == socket.gethostname()
    return holder.silent_seconds <= STALE_SECONDS and not (here and not alive(holder.pid))


def alive(pid: int) -> bool:
    """True while a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
