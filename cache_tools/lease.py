"""A note saying who builds a cache now, so that a second build stops before it wastes hours.

The lease only warns. What keeps two builds apart is that shards belong to builders by arithmetic
and that whole files are renamed into place; a lease left by a killed build stops nobody.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cache_tools import layout
from fd3d.durable import write_durably
from fd3d.errors import UsageError

HEARTBEAT_SECONDS = 5.0
# Without a heartbeat for so long a lease is dead, whatever its process id says now.
STALE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that builds a cache, and how long ago it last said so."""

    host: str
    pid: int
    silent_seconds: float


def holder(folder: Path) -> Holder | None:
    """Who builds the cache at `folder` now; None if nobody does."""
    path = folder / layout.LEASE
    try:
        content = json.loads(path.read_bytes())
        silent = time.time() - path.stat().st_mtime
        found = Holder(host=content["host"], pid=int(content["pid"]), silent_seconds=silent)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    here = found.host == socket.gethostname()
    if silent > STALE_SECONDS or (here and not alive(found.pid)):
        return None
    return found


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the cache's lease, with a heartbeat; a living holder raises `UsageError`."""
    path = folder / layout.LEASE
    other = holder(folder)
    if other is not None and (other.host, other.pid) != (socket.gethostname(), os.getpid()):
        raise UsageError(
            f"{folder} is being built by process {other.pid} on {other.host}: wait for it to end, "
            f"or stop it and run the same command again"
        )
    write_durably(path, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, name="cache-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with contextlib.suppress(OSError):
            path.unlink()


def alive(pid: int) -> bool:
    """True while a process of this number runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
