"""signals.json: what an expert that was run elsewhere wrote, checked to the last field.

    DIR/signals.json          what this file reads
    DIR/FRAME.SIGNAL.npy      one array for each frame and signal, or
    DIR/FRAME.safetensors     one file for each frame, its tensors named by signal

Nothing in it is trusted: file names are made of frame keys, and a key must not lead elsewhere.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_tools.checksums import parse_json
from cache_tools.manifest import Identity
from cache_tools.manifest_fields import Taker, check_spec
from fd3d.distill.signals import SignalSpec, check_mode
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid

ABOUT = "signals.json"
FORMAT = "fd3d-signals"
FORMAT_VERSION = 1

# What a key must not have in it, for it is the beginning of a file's name.
_LEADING_ELSEWHERE = ("/", "\\", "\0", "..")

# One chunk of a table is a frame at its longest, and Blosc takes no more at a time.
_MOST_FRAME_BYTES = 2**31 - 1

_FIX = "correct it, see docs/cache.md, section Signals written elsewhere"


@dataclass(frozen=True, kw_only=True)
class ForeignFolder:
    """What a folder of foreign signals says it holds.

    Args:
        path: the folder.
        identity: where the values come from.
        signals: by name, what is there of each frame.
        frames: their keys in the order of the cache; each can begin a file's name.
    """

    path: Path
    identity: Identity
    signals: Mapping[str, SignalSpec]
    frames: tuple[str, ...]


def load(folder: str | Path) -> ForeignFolder:
    """What DIR/signals.json says; a folder without a good one raises `UsageError`."""
    folder = Path(folder)
    path = folder / ABOUT
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}: give the one that holds {ABOUT}")
    if not path.is_file():
        raise UsageError(
            f"{folder} has no {ABOUT}, which a writer writes last: let it finish, or give the "
            "folder that it wrote to"
        )
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}): {_FIX}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f'{path} does not say "format": "{FORMAT}": {_FIX}')
    version = content.get("format_version")
    # True equals 1 to Python.
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise UsageError(
            f"{path} has format version {reprlib.repr(version)}, this code reads "
            f"{FORMAT_VERSION}: write it with the writer of this release"
        )
    take = Taker(path, content, fix=_FIX)
    found = ForeignFolder(
        path=folder,
        identity=_identity(path, Taker(path, take("identity", dict), "identity.", fix=_FIX)),
        signals={
            name: _signal(path, name, values)
            for name, values in sorted(take("signals", dict).items())
        },
        frames=_frames(path, take("frames", list)),
    )
    take.finish("format", "format_version")
    if not found.signals:
        raise UsageError(f"{path} names no signal: {_FIX}")
    return found


def _identity(path: Path, take: Taker) -> Identity:
    words = ("expert", "tensors", "mode", "dataset_version", "split", "adjacency")
    values: dict[str, Any] = {name: take(name, str) for name in words}
    empty = [name for name in words if not values[name]]
    if empty:
        raise UsageError(f"{path}: identity.{empty[0]} is empty: {_FIX}")
    values["preprocessing"] = take("preprocessing", dict)
    values["origin"] = take.optional("origin", str) or ""
    take.finish()
    try:
        check_mode(values["mode"])
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return Identity(**values)


def _signal(path: Path, name: str, values: Any) -> SignalSpec:
    take = Taker(path, values, f"signals.{name}.", fix=_FIX)
    shape = tuple(take("shape", list))
    if not shape or any(type(n) is not int or n < 1 for n in shape):
        raise UsageError(
            f"{path}: signals.{name}.shape is {reprlib.repr(list(shape))}, not whole numbers "
            f"from 1: {_FIX}"
        )
    if 4 * math.prod(shape) > _MOST_FRAME_BYTES:
        raise UsageError(
            f"{path}: signals.{name}.shape {reprlib.repr(list(shape))} is more than 2 GB a frame: "
            f"{_FIX}"
        )
    spec = SignalSpec(
        name=name,
        shape=shape,
        dtype=take("dtype", str),
        ragged=take("ragged", bool),
        grid=_grid(path, name, take.optional("grid", dict)),
    )
    take.finish()
    try:
        check_spec(name, spec)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    if spec.grid is not None and (spec.ragged or shape[1:] != spec.grid.shape or len(shape) != 3):
        raise UsageError(
            f"{path}: signals.{name} has shape {list(shape)} and a grid of {spec.grid.ny} rows "
            f"(y) and {spec.grid.nx} columns (x), but a map is (C, Y, X): {_FIX}"
        )
    return spec


def _grid(path: Path, name: str, values: Any) -> BEVGrid | None:
    if values is None:
        return None
    take = Taker(path, values, f"signals.{name}.grid.", fix=_FIX)
    bounds = {bound: take(bound, float) for bound in ("x_min", "x_max", "y_min", "y_max")}
    cells = {count: take(count, int) for count in ("nx", "ny")}
    frame = take("frame", str)
    take.finish()
    try:
        # 51 and 51.0 are one bound and must give one id; JSON has 1e999 and 400 digits, too.
        bounds = {bound: float(value) for bound, value in bounds.items()}
        if not all(map(math.isfinite, bounds.values())):
            raise OverflowError
        return BEVGrid(**bounds, **cells, frame=frame)
    except OverflowError:
        raise UsageError(f"{path}: signals.{name}.grid is not finite: {_FIX}") from None
    except UsageError as error:
        raise UsageError(f"{path}: signals.{name}.grid: {error}") from None


def _frames(path: Path, keys: list) -> tuple[str, ...]:
    seen: set[str] = set()
    for key in keys:
        if not isinstance(key, str) or not key:
            raise UsageError(f"{path}: frame key {reprlib.repr(key)} is not a word: {_FIX}")
        # Files that begin with a dot are hidden, and left behind by what copies DIR/*.
        if key.startswith(".") or any(part in key for part in _LEADING_ELSEWHERE):
            raise UsageError(
                f"{path}: frame key {reprlib.repr(key)} cannot name a file: write the frames under "
                "keys without /, \\ and .. and without a dot in front"
            )
        if key in seen:
            raise UsageError(
                f"{path}: frame key {reprlib.repr(key)} is there twice: name each frame once"
            )
        seen.add(key)
    if not keys:
        raise UsageError(f"{path} names no frame: {_FIX}")
    return tuple(keys)
