"""`verify` finds every damaged byte and says which file and frames it is in."""

from __future__ import annotations

import json
import shutil

import made_cache
import numpy as np
import pytest

from cache_tools.repair import repair
from cache_tools.verify import verify
from fd3d.errors import CheckFailed, UsageError


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    out = tmp_path_factory.mktemp("sound") / "c.zarr"
    made_cache.build(out, preset="balanced")
    return out


@pytest.fixture
def copy(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "copy.zarr")


def shard_of(path):
    return int(path.name.split(".")[1])


def test_a_sound_cache_is_sound(sound):
    found = verify(sound)
    assert found.ok and found.complete and found.frames == 11
    assert found.bytes == sum(path.stat().st_size for path in sound.rglob("c.*"))


def test_a_flipped_byte_in_any_data_file_is_named(copy):
    rng = np.random.default_rng(1)
    for path in sorted(copy.rglob("c.*")):
        whole = path.read_bytes()
        for at in rng.choice(len(whole), min(2, len(whole)), replace=False):
            torn = bytearray(whole)
            torn[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(torn)
            found = verify(copy)
            assert not found.ok
            assert [problem.file for problem in found.problems] == [
                path.relative_to(copy).as_posix()
            ]
            first = 4 * shard_of(path)
            assert set(found.problems[0].tokens) <= set(made_cache.keys(11)[first : first + 4])
        path.write_bytes(whole)
    assert verify(copy).ok


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_spare_copy_that_is_none_is_named(copy, damage):
    spare = copy / "spare.json"
    if damage == "missing":
        spare.unlink()
    else:
        spare.write_bytes(spare.read_bytes()[:-5])
    found = verify(copy)
    assert [problem.file for problem in found.problems] == ["spare.json"] and not found.ok
    repair(copy)
    assert verify(copy).ok


def test_one_damaged_tile_leaves_the_other_frames_of_the_shard_sound(copy):
    path = copy / "bev" / "c.1.0.0.0"
    torn = bytearray(path.read_bytes())
    torn[10] ^= 1
    path.write_bytes(torn)
    assert [problem.tokens for problem in verify(copy).problems] == [("frame-004",)]


def test_every_flipped_byte_of_a_commit_record_is_noticed_or_harmless(copy):
    path = copy / "commits" / "00001.json"
    whole = path.read_bytes()
    for at in range(0, len(whole), 31):
        torn = bytearray(whole)
        torn[at] ^= 1
        path.write_bytes(torn)
        if verify(copy).ok:
            # White space between two JSON tokens, or a digit beyond the precision of a float.
            assert json.loads(torn) == json.loads(whole)


def test_files_that_are_missing_short_or_of_another_shard_are_named(copy):
    (copy / "bev" / "c.0.0.0.0").unlink()
    short = copy / "heatmap" / "c.1.0.0.0"
    short.write_bytes(short.read_bytes()[:-5])
    found = verify(copy)
    assert {problem.file for problem in found.problems} == {"bev/c.0.0.0.0", "heatmap/c.1.0.0.0"}
    assert found.frames == 3
    shutil.copy(copy / "commits" / "00002.json", copy / "commits" / "00000.json")
    assert "commits/00000.json" in {problem.file for problem in verify(copy).problems}


def test_damage_that_verify_named_is_mended_by_its_advice(copy):
    """Delete the record, build again."""
    path = copy / "bev" / "c.2.0.0.0"
    torn = bytearray(path.read_bytes())
    torn[20] ^= 4
    path.write_bytes(torn)
    assert verify(copy).problems[0].shard == 2
    (copy / "commits" / "00002.json").unlink()
    assert made_cache.build(copy, preset="balanced").built == 3
    assert verify(copy).ok


def test_an_unfinished_cache_is_not_ok_though_nothing_is_damaged(copy):
    (copy / "commits" / "00001.json").unlink()
    found = verify(copy)
    assert not found.ok and not found.complete and not found.problems
    assert found.frames == 7 and found.expected == 11


def test_what_cannot_be_verified_at_all_is_refused(copy, tmp_path):
    with pytest.raises(UsageError, match="no cache"):
        verify(tmp_path / "nothing.zarr")
    (copy / "manifest.json").write_text("{")
    with pytest.raises(CheckFailed, match="manifest.json is damaged"):
        verify(copy)
