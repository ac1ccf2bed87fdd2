"""Files that are whole or not there, whatever kills the writer: a full disk, a kill, a power cut.

Everything is written beside its place, forced to the disk, and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

# Zarr's own ending for a file that is being written; with the same here, one sweep finds all.
PARTIAL = ".partial"


def sync(path: Path | str) -> None:
    """Force a file's bytes, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # What a file system says that has no such call for folders; there is nothing to wait for.
        if error.errno != errno.EINVAL or not os.path.isdir(path):
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A new file to write, which takes the place of `path` when the block ends without error.

    A reader sees the old file or the whole new one, never a part; after an error the old one
    stays and nothing is left beside it.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        # On a full disk the half-written file is what stands in the way of the next try.
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync(path.parent)


def write_durably(path: Path | str, content: bytes) -> None:
    """Put `content` at `path`, as `replacing` does."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path | str, values: Mapping) -> None:
    """Put `values` at `path` as indented JSON, as `replacing` does; odd types become text."""
    write_durably(path, (json.dumps(values, indent=1, default=str) + "\n").encode())
