"""Parts of a build: every shard has one owner, parts may meet in a folder but never in a shard."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import made_cache
import numpy as np
import pytest

from cache_tools import writer
from cache_tools.info import cache_info, describe, survey
from cache_tools.parts import Part, parse_part
from cache_tools.reader import CacheReader
from cache_tools.verify import verify
from fd3d.errors import UsageError


def part(text):
    return parse_part(text)


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_every_shard_has_one_owner(of):
    parts = [Part(number=number, of=of) for number in range(1, of + 1)]
    for shard in range(20):
        assert sum(part.owns(shard) for part in parts) == 1


def test_parts_meet_where_they_own_a_shard_in_common():
    parts = [Part(number=number, of=of) for of in range(1, 7) for number in range(1, of + 1)]
    for one in parts:
        for other in parts:
            common = any(one.owns(shard) and other.owns(shard) for shard in range(60))
            assert one.meets(other) == common, (one, other)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1/0", "2", "1/2/3", "-1/2", "a/b", ""])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(UsageError, match="--part"):
        parse_part(text)


def test_parts_one_after_the_other_make_the_cache_that_one_build_makes(tmp_path):
    out, whole = tmp_path / "c.zarr", tmp_path / "whole.zarr"
    made_cache.build(whole)
    first = made_cache.build(out, part=part("2/2"))
    assert (first.built, first.frames, first.complete) == (4, 4, False)
    assert not (out / "report.json").exists() and not cache_info(out)["ready"]
    last = made_cache.build(out, part=part("1/2"))
    assert (last.built, last.frames, last.complete) == (7, 11, True)
    assert json.loads((out / "report.json").read_text())["frames"] == 11
    for name in ("manifest.json", "tokens.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    mine, theirs = CacheReader(out), CacheReader(whole)
    for token in theirs.tokens:
        for name, value in theirs.read(token).items():
            np.testing.assert_array_equal(mine.read(token)[name], value)
    assert verify(out).ok and not verify(out).leftovers


def test_a_build_in_parts_may_go_on_in_another_number_of_them(tmp_path):
    out, built = tmp_path / "c.zarr", []

    def noting(positions):
        built.extend(positions)
        return made_cache.compute(positions)

    options = {"frames": 20, "shard_frames": 2, "compute": noting}
    for text in ("1/2", "3/3", "1/3", "2/3"):
        made_cache.build(out, part=part(text), **options)
    assert sorted(built) == list(range(20)), "a frame was built twice, or never"
    assert verify(out).ok


def test_a_cache_that_another_part_has_just_made_is_not_in_the_way(tmp_path, monkeypatch):
    """Two parts start at once: one finds nothing at --out, and a moment later the other's cache."""
    out = tmp_path / "c.zarr"
    made_cache.build(out)
    seen = iter([True])
    vacant = writer._vacant
    monkeypatch.setattr(writer, "_vacant", lambda folder: next(seen, None) or vacant(folder))
    made_cache.build(out)
    assert verify(out).ok
    with pytest.raises(UsageError, match="lies inside of"):
        made_cache.build(out / "inside.zarr")


def test_a_part_without_shards_does_nothing(tmp_path):
    report = made_cache.build(tmp_path / "c.zarr", part=part("9/9"))
    assert report.built == report.frames == 0


@pytest.fixture
def beside(tmp_path):
    """(a cache of which another process builds part 1/2, that process's number)."""
    out = tmp_path / "c.zarr"
    made_cache.build(out, part=part("2/2"))
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (out / f"lease-1-of-2-{socket.gethostname()}-{process.pid}").touch()
    yield out, process.pid
    process.kill()
    process.wait()


@pytest.mark.parametrize("text", ["1/2", "3/4", "1/1", "2/3"])
def test_a_part_with_shards_of_a_living_one_is_refused_in_a_sentence(beside, text):
    out, pid = beside
    with pytest.raises(UsageError, match=rf"process {pid} on .* \(part 1/2\): wait") as refusal:
        made_cache.build(out, part=part(text))
    assert "\n" not in str(refusal.value)
    assert cache_info(out)["frames"] == 4
    assert f"process {pid}" in describe(survey(out)) and "(part 1/2)" in describe(survey(out))
    with pytest.raises(UsageError, match="4 of 11 frames.*part 1/2"):
        CacheReader(out)


def test_a_part_beside_a_living_one_leaves_its_unfinished_files_alone(beside):
    out, _ = beside
    foreign = [
        out / "bev" / "c.0.0.0.0.0a.partial",
        out / "commits" / "00002.json.0a.partial",
        out / "report.json.0a.partial",
    ]
    mine = out / "bev" / "c.1.0.0.0.0a.partial"
    for path in (*foreign, mine):
        path.write_bytes(b"x")
    made_cache.build(out, part=part("2/2"))
    assert all(path.exists() for path in foreign) and not mine.exists()
