"""A build killed with SIGKILL at any point, then run again, is an unbroken build.

The quick tests kill a handful of builds; the slow ones (`pytest -m slow tests/faults`) kill before
and after every single change of the disk, and at 200 random times.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import made_cache

from cache_tools.reader import CacheReader
from cache_tools.verify import verify

# Forks from a process that has imported everything but opened nothing: quick and clean.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["cache_tools.build"])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> CacheReader:
    out = tmp_path_factory.mktemp("unbroken") / "u.zarr"
    made_cache.build(out)
    return CacheReader(out)


@pytest.fixture(scope="module")
def touches(tmp_path_factory) -> int:
    """How many times a build changes the disk."""
    folder = tmp_path_factory.mktemp("touches")
    child = _child(made_cache.build_and_die, folder / "c.zarr", 0, False, folder / "count")
    child.join()
    return int((folder / "count").read_text())


def test_build_killed_at_a_few_points_resumes_to_the_unbroken_values(tmp_path, unbroken, touches):
    points = np.linspace(1, touches, 7).astype(int)
    for point in points:
        _kill_at_touch(tmp_path / f"{point}.zarr", int(point), bool(point % 2), unbroken)


def test_build_killed_again_and_again_still_gets_there(tmp_path, unbroken):
    out = tmp_path / "c.zarr"
    for point in (40, 55, 30, 70):
        child = _child(made_cache.build_and_die, out, point, False)
        child.join()
        if child.exitcode == 0:
            break
    _check_resumed(out, unbroken)


def test_build_killed_at_random_times(tmp_path, unbroken):
    _kill_at_random_times(tmp_path, unbroken, kills=4, seed=0)


@pytest.mark.slow
def test_build_killed_before_and_after_every_change_of_the_disk(tmp_path, unbroken, touches):
    for point in range(1, touches + 1):
        for after in (False, True):
            _kill_at_touch(tmp_path / f"{point}-{after}.zarr", point, after, unbroken)


@pytest.mark.slow
def test_build_killed_at_200_random_times(tmp_path, unbroken):
    _kill_at_random_times(tmp_path, unbroken, kills=200, seed=1)


def _kill_at_touch(out: Path, point: int, after: bool, unbroken: CacheReader) -> None:
    child = _child(made_cache.build_and_die, out, point, after)
    child.join()
    assert child.exitcode == -signal.SIGKILL, f"point {point} was not reached"
    _check_resumed(out, unbroken)


def _kill_at_random_times(folder: Path, unbroken: CacheReader, *, kills: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    child = _child(made_cache.build, folder / "timed.zarr")
    start = time.perf_counter()
    child.join()
    whole = time.perf_counter() - start
    for kill in range(kills):
        out = folder / f"{kill}.zarr"
        child = _child(made_cache.build, out)
        child.join(rng.uniform(0, whole))
        child.kill()
        child.join()
        _check_resumed(out, unbroken)


def _child(work, *arguments):
    child = FORKS.Process(target=work, args=arguments)
    child.start()
    return child


def _check_resumed(out: Path, unbroken: CacheReader) -> None:
    """Finish the build here, then compare every frame with the unbroken cache's."""
    made_cache.build(out)
    resumed = CacheReader(out)
    assert resumed.tokens == unbroken.tokens
    assert resumed.cache_id == unbroken.cache_id
    for token in unbroken.tokens:
        mine, theirs = resumed.read(token), unbroken.read(token)
        for name, value in theirs.items():
            np.testing.assert_array_equal(mine[name], value, err_msg=f"{out} {token} {name}")
    found = verify(out)
    assert found.ok and not found.leftovers, (found.problems, found.leftovers)
    assert not list(out.parent.glob(f".{out.name}*")), "a half-made folder was left behind"
