"""Bytes that went wrong in any file of a cache are noticed or harmless, never other values.

The quick tests damage a few bytes; the slow ones (`pytest -m slow tests/faults`) 2,000 and 200.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import made_cache

from cache_tools.reader import CacheReader
from fd3d.errors import CheckFailed, UsageError

# Not read with the frames: what was measured, and the copy that `repair` reads.
ASIDE = ("report.json", "spare.json")


@pytest.fixture(scope="module", params=["lossless", "balanced"])
def cache(request, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("damage") / "c.zarr"
    made_cache.build(out, preset=request.param)
    return out


@pytest.fixture(scope="module")
def sound(cache) -> dict[str, dict[str, np.ndarray]]:
    reader = CacheReader(cache)
    return {token: reader.read(token) for token in reader.tokens}


def test_a_few_flipped_bytes(cache, sound):
    _flip(cache, sound, times=80, seed=0)


def test_a_few_truncations(cache, sound):
    _truncate(cache, sound, times=20, seed=0)


@pytest.mark.slow
def test_1000_flipped_bytes_in_each_preset(cache, sound):
    _flip(cache, sound, times=1000, seed=1)


@pytest.mark.slow
def test_100_truncations_in_each_preset(cache, sound):
    _truncate(cache, sound, times=100, seed=1)


def _flip(cache: Path, sound: dict, *, times: int, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def flipped(whole: bytes) -> bytes:
        torn = bytearray(whole)
        # Half of them near the end, where a shard's index is.
        near = len(torn) if rng.random() < 0.5 else min(len(torn), 300)
        torn[len(torn) - 1 - int(rng.integers(near))] ^= 1 << int(rng.integers(8))
        return bytes(torn)

    noticed = _damage(cache, sound, flipped, times=times, rng=rng)
    # White space between JSON tokens is all that may be changed without a word.
    assert noticed["data"] == noticed["data files"] and noticed["metadata"] > 0


def _truncate(cache: Path, sound: dict, *, times: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    noticed = _damage(
        cache, sound, lambda whole: whole[: int(rng.integers(len(whole)))], times=times, rng=rng
    )
    assert sum(noticed[kind] for kind in ("data", "metadata")) == times


def _damage(cache: Path, sound: dict, change, *, times: int, rng) -> Counter:
    """Change one file at a time and read everything; how often it was noticed, by kind of file."""
    files = [path for path in sorted(cache.rglob("*")) if path.is_file()]
    files = [path for path in files if path.name not in ASIDE]
    noticed: Counter = Counter()
    for _ in range(times):
        path = files[int(rng.integers(len(files)))]
        whole = path.read_bytes()
        kind = "data" if path.name.startswith("c.") else "metadata"
        noticed[f"{kind} files"] += 1
        try:
            path.write_bytes(change(whole))
            noticed[kind] += _noticed(cache, sound, path)
        finally:
            path.write_bytes(whole)
    assert not _noticed(cache, sound, cache), "the cache was not left as it was"
    return noticed


def _noticed(cache: Path, sound: dict, path: Path) -> bool:
    """True where an error names the damaged file, and the frame if the cache could be opened."""
    try:
        reader = CacheReader(cache, allow_partial=True)
    except (CheckFailed, UsageError) as error:
        assert _names(error, path, cache)
        return True
    found = False
    for token, signals in sound.items():
        try:
            values = reader.read(token)
        except (CheckFailed, UsageError) as error:
            assert _names(error, path, cache) and "frame-" in str(error)
            found = True
            continue
        for name, value in values.items():
            assert value.tobytes() == signals[name].tobytes(), (path, token, name)
    return found


def _names(error: Exception, path: Path, cache: Path) -> bool:
    return path.relative_to(cache).as_posix() in str(error)
