"""Shards: which frames they hold, who may write them, what a folder may become."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import made_cache
import numpy as np
import pytest

from cache_tools import layout, manifest, records
from cache_tools.cli import main
from cache_tools.presets import PRESETS
from cache_tools.reader import CacheReader
from cache_tools.verify import verify
from fd3d.errors import UsageError, exit_code


@pytest.mark.parametrize(("frames", "shard_frames"), [(1, 1), (16, 16), (17, 16), (11, 4), (3, 8)])
def test_every_frame_is_in_exactly_one_shard(frames, shard_frames):
    shards = range(layout.shard_count(frames, shard_frames))
    held = [layout.frames_of(s, frames=frames, shard_frames=shard_frames) for s in shards]
    assert [i for part in held for i in part] == list(range(frames))


def test_a_record_names_every_file_of_its_shard_with_length_and_checksum(tmp_path):
    out = tmp_path / "c.zarr"
    made_cache.build(out)
    cache = manifest.load(out)
    done, bad = records.load_all(out, cache)
    assert sorted(done) == [0, 1, 2] and not bad
    named = {file for record in done.values() for file in record.files}
    data = {p.relative_to(out).as_posix() for p in out.rglob("c.*")}
    assert named == data
    assert [t for record in done.values() for t in record.tokens] == made_cache.keys(11)


def test_every_file_is_on_the_disk_before_its_record(tmp_path, monkeypatch):
    """All of a shard's data files and their folders are fsynced before the record is renamed."""
    synced, events = set(), []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle):
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        return fsync(handle)

    def watched_replace(source, target, **kwargs):
        if os.path.basename(os.path.dirname(target)) == "commits":
            assert str(source) in synced, "the record itself"
            events.append((str(target), set(synced)))
        if str(source) in synced:
            synced.add(str(target))
        return replace(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    out = tmp_path / "c.zarr"
    made_cache.build(out)
    done, _ = records.load_all(out, manifest.load(out))
    assert len(events) == len(done) == 3
    for (_, before), shard in zip(events, sorted(done), strict=True):
        for file in done[shard].files:
            assert str(out / file) in before and str((out / file).parent) in before
    assert str(out / "commits") in synced


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"preset": "balanced"}, "preset"),
        ({"frames": 10}, "frames"),
        ({"shard_frames": 8}, "shard_frames"),
    ],
)
def test_another_cache_at_out_is_refused_with_both_ids_and_kept(tmp_path, change, differs):
    out = tmp_path / "c.zarr"
    first = made_cache.build(out)
    with pytest.raises(UsageError, match=differs) as refusal:
        made_cache.build(out, **change)
    assert first.cache_id[:12] in str(refusal.value)
    assert verify(out).ok


def test_a_folder_that_is_no_cache_is_refused_and_kept(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a cache"):
        made_cache.build(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_an_empty_folder_becomes_a_cache(tmp_path):
    made_cache.build(tmp_path)
    assert verify(tmp_path).ok


def test_frames_that_are_all_zero_are_stored_like_any_other(tmp_path):
    """Zarr leaves out chunks that equal the fill value unless told not to."""

    def zeros(positions):
        empty = {n: np.zeros(s.shape, np.float32) for n, s in made_cache.SIGNALS.items()}
        empty["focus"] = np.eye(made_cache.CELLS, dtype=bool)
        return {name: [value] * len(positions) for name, value in empty.items()}

    for preset in PRESETS:
        out = tmp_path / preset
        made_cache.build(out, compute=zeros, preset=preset)
        assert verify(out).ok
        assert (CacheReader(out).read("frame-003", ["bev"])["bev"] == 0).all()


def test_leftovers_of_a_killed_build_are_swept(tmp_path):
    out = tmp_path / "c.zarr"
    made_cache.build(out)
    torn = [
        out / "bev" / "c.1.0.0.0123abc.partial",
        out / "commits" / "00001.json.0123abc.partial",
        out / "report.json.0123abc.partial",
    ]
    for path in torn:
        path.write_bytes(b"x")
    assert len(verify(out).leftovers) == 3
    made_cache.build(out)
    assert not verify(out).leftovers


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB; skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_sentence_and_the_build_can_go_on(small_disk, tmp_path, capsys):
    out = small_disk / "c.zarr"
    frames = 40
    assert exit_code(lambda: made_cache.build(out, frames=frames)) == 1
    said = capsys.readouterr().err.strip()
    assert "no space left" in said and said.count("\n") == 0
    assert main(["info", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["ready"] and 0 < found["frames"] < frames
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    made_cache.build(out, frames=frames)
    assert verify(out).ok and not verify(out).leftovers
    made_cache.build(tmp_path / "whole.zarr", frames=frames)
    resumed, whole = CacheReader(out), CacheReader(tmp_path / "whole.zarr")
    for token in whole.tokens:
        np.testing.assert_array_equal(resumed.read(token)["bev"], whole.read(token)["bev"])
