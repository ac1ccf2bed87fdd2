"""How far the signals of two caches are apart, frame by frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache_tools.codecs import error_of
from cache_tools.reader import CacheReader
from fd3d.errors import UsageError
from fd3d.progress import Progress


@dataclass(frozen=True, kw_only=True)
class MapDifference:
    """Relative L2 errors of a map, channel means removed, over the frames: mean and worst of whole
    maps, the frame of the worst, and the worst single channel of any frame."""

    mean: float
    worst: float
    worst_token: str
    worst_channel: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Of two caches over `frames` common frames: maps by signal, and for tables the number of
    frames that differ. `left_out`: signals that only one has, or with another shape."""

    frames: int
    maps: Mapping[str, MapDifference]
    tables: Mapping[str, int]
    left_out: tuple[str, ...]


def compare(first: str | Path, second: str | Path, *, quiet: bool = True) -> Comparison:
    """The second cache's signals against the first's, over the frames that both have.

    Caches without a common frame or signal raise `UsageError`; damage raises `CheckFailed`.
    """
    one, other = (CacheReader(path, allow_partial=True) for path in (first, second))
    tokens = [token for token in one.tokens if token in one and token in other]
    specs = {
        name: spec
        for name, spec in one.specs.items()
        if name in other.specs and other.specs[name].shape == spec.shape
    }
    if not tokens or not specs:
        what = "signal" if tokens else "frame"
        raise UsageError(f"{first} and {second} have no {what} in common: compare others")
    errors = {name: [] for name, spec in specs.items() if len(spec.shape) == 3}
    differing = {name: 0 for name in specs if name not in errors}
    with Progress(total=len(tokens), unit="frames", title="comparing", quiet=quiet) as progress:
        for token in tokens:
            mine, theirs = one.read(token, tuple(specs)), other.read(token, tuple(specs))
            for name in specs:
                if name in errors:
                    value = mine[name].astype(np.float32)
                    errors[name].append(error_of(value, theirs[name]))
                else:
                    same = np.array_equal(mine[name], theirs[name], equal_nan=True)
                    differing[name] += not same
            progress.advance(1)
    return Comparison(
        frames=len(tokens),
        maps={name: _summary(tokens, found) for name, found in errors.items()},
        tables=differing,
        left_out=tuple(sorted((set(one.specs) | set(other.specs)) - set(specs))),
    )


def _summary(tokens, found) -> MapDifference:
    frames = [error.frame for error in found]
    worst = int(np.argmax(frames))
    return MapDifference(
        mean=float(np.mean(frames)),
        worst=frames[worst],
        worst_token=tokens[worst],
        worst_channel=max(error.worst_channel for error in found),
    )
