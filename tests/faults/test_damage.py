"""Bytes that went wrong in any file of a cache are noticed or harmless, never other values; and
`repair` with the same build after it gives every one of them back.

The quick tests damage a few bytes; the slow ones (`pytest -m slow tests/faults`) 2,600 bytes and
260 files, each mended before the next.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import made_cache

from cache_tools.reader import CacheReader
from cache_tools.repair import repair
from cache_tools.verify import verify
from fd3d.errors import CheckFailed, UsageError

# Not read with the frames: what was measured, and the copy that `repair` reads.
ASIDE = ("report.json", "spare.json")
PRESETS = ("lossless", "balanced", "tiny", "focal")
SPIKY = 6
# Of the slow tests: bytes flipped; a tenth as many files are cut.
FLIPS = {"lossless": 1000, "balanced": 1000, "tiny": 300, "focal": 300}


@pytest.fixture(scope="module", params=PRESETS)
def preset(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def cache(preset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("damage") / "c.zarr"
    _build(out, preset)
    # No map of so few cells is over the budget of tiny.
    over = json.loads((out / "report.json").read_bytes())["signals"]["bev"]["over_budget"]
    assert over == (preset in ("balanced", "focal"))
    return out


@pytest.fixture(scope="module")
def sound(cache) -> dict[str, dict[str, np.ndarray]]:
    reader = CacheReader(cache)
    return {token: reader.read(token) for token in reader.tokens}


def _build(out: Path, preset: str) -> None:
    made_cache.build(out, preset=preset, compute=_compute)


def _compute(positions) -> dict[str, list[np.ndarray]]:
    """One frame has a spike, so that it is over the budget and stored exactly."""
    values = made_cache.compute(positions)
    for row, position in enumerate(positions):
        if position == SPIKY:
            values["bev"][row][:] *= 0.2
            values["bev"][row][:, 5, 5] = 60
            values["focus"][row][:] = True
    return values


def test_a_few_flipped_bytes(cache, sound):
    _flip(cache, sound, times=60, seed=0)


def test_a_few_truncations(cache, sound):
    _truncate(cache, sound, times=15, seed=0)


def test_a_few_of_both_are_mended(cache, sound, preset):
    _flip(cache, sound, times=12, seed=2, mend=preset)
    _truncate(cache, sound, times=6, seed=2, mend=preset)


def test_the_spare_copy_is_mended(cache, sound, preset):
    path = cache / "spare.json"
    whole = path.read_bytes()
    for torn in (b"", whole[:100], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]):
        path.write_bytes(torn)
        _mend(cache, sound, preset)
        assert path.read_bytes() == whole


def test_a_torn_report_is_written_anew(cache, sound, preset):
    path = cache / "report.json"
    whole = path.read_bytes()
    for torn in (b"", whole[:100], b"[]"):
        path.write_bytes(torn)
        _mend(cache, sound, preset)
        found = json.loads(path.read_bytes())
        assert found["bytes"] == json.loads(whole)["bytes"] and found["frames"] == len(sound)


@pytest.mark.slow
def test_every_one_of_many_flipped_bytes_is_mended(cache, sound, preset):
    _flip(cache, sound, times=FLIPS[preset], seed=1, mend=preset)


@pytest.mark.slow
def test_every_one_of_many_truncations_is_mended(cache, sound, preset):
    _truncate(cache, sound, times=FLIPS[preset] // 10, seed=1, mend=preset)


def _flip(cache: Path, sound: dict, *, times: int, seed: int, mend: str = "") -> None:
    rng = np.random.default_rng(seed)

    def flipped(whole: bytes) -> bytes:
        torn = bytearray(whole)
        # Half of them near the end, where a shard's index is.
        near = len(torn) if rng.random() < 0.5 else min(len(torn), 300)
        torn[len(torn) - 1 - int(rng.integers(near))] ^= 1 << int(rng.integers(8))
        return bytes(torn)

    noticed = _damage(cache, sound, flipped, times=times, rng=rng, mend=mend)
    # White space between JSON tokens is all that may be changed without a word.
    assert noticed["data"] == noticed["data files"] and noticed["metadata"] > 0


def _truncate(cache: Path, sound: dict, *, times: int, seed: int, mend: str = "") -> None:
    rng = np.random.default_rng(seed)

    def cut(whole: bytes) -> bytes:
        return whole[: int(rng.integers(len(whole)))]

    noticed = _damage(cache, sound, cut, times=times, rng=rng, mend=mend)
    assert sum(noticed[kind] for kind in ("data", "metadata")) == times


def _damage(cache: Path, sound: dict, change, *, times: int, rng, mend: str) -> Counter:
    """Change one file at a time and read everything; how often it was noticed, by kind of file.
    `mend`: the cache's preset, for it to be mended each time; "" = the file is put back."""
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
            # Frames within the budget are not in "exact": damage to its index changes nothing.
            found = _noticed(cache, sound, path) or path.parent.name.endswith("_exact")
            noticed[kind] += found
            assert not found or _named_by_verify(cache, path)
            if mend:
                _mend(cache, sound, mend)
                assert not found or path.read_bytes() == whole, path
        finally:
            path.write_bytes(whole)
    assert not _noticed(cache, sound, cache), "the cache was not left as it was"
    return noticed


def _named_by_verify(cache: Path, path: Path) -> bool:
    try:
        found = [problem.file for problem in verify(cache).problems]
    except (CheckFailed, UsageError) as error:
        return _names(error, path, cache)
    return found == [path.relative_to(cache).as_posix()]


def _mend(cache: Path, sound: dict, preset: str) -> None:
    """Repair and build; then everything must be there again and nothing else."""
    repair(cache)
    _build(cache, preset)
    report = verify(cache)
    assert report.ok and not report.leftovers, (report.problems, report.leftovers)
    reader = CacheReader(cache)
    for token, signals in sound.items():
        for name, value in reader.read(token).items():
            assert value.tobytes() == signals[name].tobytes(), (token, name)


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
