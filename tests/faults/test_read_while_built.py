"""A reader that polls a cache while other processes make, kill, mend and finish it: every frame
that it gets is whole and right, and what is not there yet is said to be so, never damage.

The quick tests watch a build or two; the slow one (`pytest -m slow tests/faults`) 40.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import made_cache

from cache_tools.parts import Part
from cache_tools.reader import CacheReader
from cache_tools.repair import repair
from fd3d.errors import UsageError

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["cache_tools.build"])

SHAPE = {"frames": 24, "shard_frames": 2, "batch": 2}
Frames = dict[str, dict[str, np.ndarray]]


@pytest.fixture(scope="module", params=["balanced", "focal"])
def preset(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def wanted(preset, tmp_path_factory) -> Frames:
    out = tmp_path_factory.mktemp("unbroken") / "u.zarr"
    made_cache.build(out, preset=preset, **SHAPE)
    reader = CacheReader(out)
    return {token: reader.read(token) for token in reader.tokens}


def test_one_build_is_watched(tmp_path, preset, wanted):
    _watch_builds(tmp_path, preset, wanted, builds=1, seed=0)


def test_damaged_shards_are_made_anew_under_a_reader(tmp_path, preset, wanted):
    out = tmp_path / "c.zarr"
    made_cache.build(out, preset=preset, **SHAPE)
    for file in sorted((out / "bev").glob("c.*")):
        torn = bytearray(file.read_bytes())
        torn[len(torn) // 2] ^= 1
        file.write_bytes(torn)
    assert len(repair(out).shards) == SHAPE["frames"] // SHAPE["shard_frames"]
    assert _watch(out, [_build(out, preset)], wanted)
    assert _whole(CacheReader(out), wanted) == SHAPE["frames"]


@pytest.mark.slow
def test_20_builds_of_two_parts_are_watched_each_killed_once(tmp_path, preset, wanted):
    assert _watch_builds(tmp_path, preset, wanted, builds=20, seed=1, of=2) > 20


def _watch_builds(
    folder: Path, preset: str, wanted: Frames, *, builds: int, seed: int, of: int = 1
) -> int:
    """Watch builds that are killed after some frames and gone on with; how many unfinished
    states of them were read."""
    rng = np.random.default_rng(seed)
    states = 0
    for number in range(builds):
        out = folder / f"{number}.zarr"
        until = int(rng.integers(1, SHAPE["frames"]))
        parts = [Part(number=i + 1, of=of) for i in range(of)]
        states += _watch(out, [_build(out, preset, part) for part in parts], wanted, until)
        states += _watch(out, [_build(out, preset)], wanted)
        assert _whole(CacheReader(out), wanted) == SHAPE["frames"]
    assert states >= builds, "the reader was too late for every build"
    return states


def _build(out: Path, preset: str, part: Part | None = None):
    changes = {**SHAPE, "preset": preset, **({"part": part} if part else {})}
    child = FORKS.Process(target=made_cache.build, args=(out,), kwargs=changes)
    child.start()
    return child


def _watch(out: Path, children: list, wanted: Frames, until: int | None = None) -> int:
    """Read again and again while the children build, and kill them when `until` frames are there;
    in how many states of the cache between none and all of the frames."""
    states = set()
    old = None
    while any(child.is_alive() for child in children):
        try:
            reader = CacheReader(out, allow_partial=True)
        except UsageError as error:
            assert "there is no cache" in str(error) and not states
            continue
        frames = _whole(reader, wanted)
        states.add(frames)
        if old is not None:
            # One that was opened earlier knows the frames of then, and they stay.
            _whole(old, wanted)
        old = reader
        for child in children if until is not None and frames >= until else ():
            child.kill()
    for child in children:
        child.join()
        assert child.exitcode == 0 or (until is not None and child.exitcode < 0)
    return len(states - {0, len(wanted)})


def _whole(reader: CacheReader, wanted: Frames) -> int:
    """How many frames the reader gives; each is compared to the last byte."""
    frames = 0
    for token, signals in wanted.items():
        try:
            found = reader.read(token)
        except UsageError as error:
            assert "is not built yet" in str(error) and token not in reader
            continue
        assert token in reader and set(found) == set(signals)
        for name, value in found.items():
            assert value.tobytes() == signals[name].tobytes(), (token, name)
        frames += 1
    return frames
