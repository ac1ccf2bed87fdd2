"""Two parts of one build at once, killed with SIGKILL at any moment, then gone on with.

Every frame must be there once with the values of an unbroken build, and nothing else. The quick
test kills a few builds, the slow one (`pytest -m slow tests/faults`) 200, at least 40 of them while
a shard is being published.
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import made_cache

from cache_tools.lease import is_lease
from cache_tools.parts import Part
from cache_tools.reader import CacheReader
from cache_tools.verify import verify
from cache_tools.writer import ShardWriter

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["cache_tools.build"])

SHAPE = {"frames": 16, "shard_frames": 2}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> CacheReader:
    out = tmp_path_factory.mktemp("unbroken") / "u.zarr"
    made_cache.build(out, **SHAPE)
    return CacheReader(out)


def test_two_parts_killed_a_few_times(tmp_path, unbroken):
    _kill(tmp_path, unbroken, kills=8, seed=0)


@pytest.mark.slow
def test_two_parts_killed_200_times(tmp_path, unbroken):
    assert _kill(tmp_path, unbroken, kills=200, seed=1) >= 40


def _build_part(out: Path, number: int, of: int, publishing) -> None:
    """Build a part; `publishing.value` is 1 while a shard is being put into the cache."""
    publish = ShardWriter.publish

    def noted(writer, shard):
        publishing.value = 1
        record = publish(writer, shard)
        publishing.value = 0
        return record

    ShardWriter.publish = noted
    made_cache.build(out, part=Part(number=number, of=of), **SHAPE)


def _kill(folder: Path, unbroken: CacheReader, *, kills: int, seed: int) -> int:
    """Kill so many builders, of caches that two of them build; how many were publishing then."""
    rng = np.random.default_rng(seed)
    start = time.perf_counter()
    _end(_start(folder / "timed.zarr", of=2))
    whole = time.perf_counter() - start
    killed = published = 0
    for number in itertools.count():
        out = folder / f"{number}.zarr"
        # Some are killed twice, the second time in another number of parts.
        for of in (2, 3) if rng.random() < 0.3 else (2,):
            parts = _start(out, of=of)
            if rng.random() < 0.5:
                time.sleep(rng.uniform(0, whole))
            else:
                _wait_for_publication(parts, skip=int(rng.integers(5)))
            both = rng.random() < 0.5
            for process, publishing in parts[: len(parts) if both else 1]:
                process.kill()
                process.join()
                if process.exitcode != 0:
                    killed += 1
                    published += publishing.value
            _end(parts, killed=True)
        _end(_start(out, of=int(rng.integers(1, 4))))
        _check(out, unbroken)
        if killed >= kills:
            return published


def _start(out: Path, *, of: int) -> list:
    """Builders of all parts of a cache at once: (process, whether it publishes now)."""
    started = []
    for number in range(1, of + 1):
        publishing = FORKS.Value("i", 0, lock=False)
        process = FORKS.Process(target=_build_part, args=(out, number, of, publishing))
        process.start()
        started.append((process, publishing))
    return started


def _wait_for_publication(parts: list, *, skip: int) -> None:
    """Until the first of the parts publishes a shard, `skip` shards left out, or has ended."""
    process, publishing = parts[0]
    for wanted in (1, 0) * skip + (1,):
        while publishing.value != wanted and process.is_alive():
            time.sleep(0.0002)


def _end(parts: list, *, killed: bool = False) -> None:
    for process, _ in parts:
        process.join()
        assert process.exitcode == 0 or (killed and process.exitcode < 0)


def _check(out: Path, unbroken: CacheReader) -> None:
    found = CacheReader(out)
    assert found.tokens == unbroken.tokens and found.cache_id == unbroken.cache_id
    for token in unbroken.tokens:
        mine, theirs = found.read(token), unbroken.read(token)
        for name, value in theirs.items():
            np.testing.assert_array_equal(mine[name], value, err_msg=f"{out} {token} {name}")
    report = verify(out)
    assert report.ok and not report.leftovers, (report.problems, report.leftovers)
    assert (out / "report.json").exists()
    assert not [path for path in out.iterdir() if is_lease(path.name)]
    assert not list(out.parent.glob(f".{out.name}*")), "a half-made folder was left behind"
