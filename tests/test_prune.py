"""`fd3d-cache prune` removes what killed builds left, and not a byte of anything else."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time

import made_cache
import numpy as np
import pytest

from cache_tools.cli import main
from cache_tools.prune import prune
from cache_tools.reader import CacheReader
from cache_tools.verify import verify
from fd3d.errors import CheckFailed, UsageError

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    out = tmp_path_factory.mktemp("sound") / "c.zarr"
    made_cache.build(out, preset="balanced", bev_part=lambda: b"weights")
    return out


@pytest.fixture
def cache(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "c.zarr")


@pytest.fixture
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def contents(folder):
    """Path -> bytes of everything in a folder and in what lies beside it."""
    files = (path for path in folder.parent.rglob("*") if path.is_file())
    return {path.relative_to(folder.parent).as_posix(): path.read_bytes() for path in files}


def leave(cache, dead):
    """What killed builds leave, as names that `prune` gives."""
    names = [
        "bev/c.1.0.0.0.0123456789abcdef0123456789abcdef.partial",
        "commits/00001.json.0a.partial",
        "report.json.0a.partial",
        f"lease-1-of-2-{HOST}-{dead}",
    ]
    for name in names:
        (cache / name).write_bytes(b"half")
    unborn = cache.with_name(f".c.zarr.unborn-{HOST}-{dead}")
    (unborn / "bev").mkdir(parents=True)
    (unborn / "bev" / "zarr.json").write_bytes(b"12345")
    return [*names, f"../{unborn.name}"]


def test_leftovers_are_listed_then_removed_and_nothing_else_changes(cache, dead):
    before = contents(cache)
    names = leave(cache, dead)
    left = contents(cache)
    listed = prune(cache)
    assert sorted(one.file for one in listed.found) == sorted(names)
    assert listed.bytes == 4 * 4 + 5 and not listed.removed and not listed.left_alone
    assert contents(cache) == left
    done = prune(cache, remove=True)
    assert done.removed and done.found == listed.found
    assert contents(cache) == before
    assert not cache.with_name(f".c.zarr.unborn-{HOST}-{dead}").exists()
    assert not prune(cache).found


def test_files_of_shards_without_a_valid_record_go_and_the_next_build_makes_them(cache):
    whole = contents(cache)
    (cache / "commits" / "00000.json").unlink()
    record = cache / "commits" / "00002.json"
    record.write_bytes(record.read_bytes().replace(b"frame-008", b"frame-088"))
    report = prune(cache, remove=True)
    files = {one.file for one in report.found}
    arrays = {path.parent.name for path in cache.rglob("c.1.*")}
    assert len(arrays) > 4 and len(files) == 2 * len(arrays) + 1
    assert "commits/00002.json" in files and "bev_scale/c.2.0" in files
    assert not any(".1." in name or "00001" in name for name in files)
    reader = CacheReader(cache, allow_partial=True)
    assert [token in reader for token in reader.tokens] == 4 * [False] + 4 * [True] + 3 * [False]
    assert not verify(cache).problems
    assert made_cache.build(cache, preset="balanced", bev_part=lambda: b"weights").built == 7
    assert verify(cache).ok
    mended = contents(cache)
    assert {n for n in whole if mended[n] != whole[n]} <= {"c.zarr/report.json"}


def test_a_record_whose_file_is_short_does_not_keep_its_shard(cache):
    path = cache / "heatmap" / "c.1.0.0.0"
    path.write_bytes(path.read_bytes()[:-1])
    files = {one.file for one in prune(cache, remove=True).found}
    assert {"commits/00001.json", "heatmap/c.1.0.0.0", "bev/c.1.0.0.0"} <= files
    assert not any("c.0." in name or "c.2." in name for name in files)
    np.testing.assert_array_equal(
        CacheReader(cache, allow_partial=True).read("frame-000")["detections"],
        made_cache.values(0)["detections"],
    )


STRANGERS = (
    "notes.txt",
    "notes.partial",
    "bev/c.9.0.0.0",
    "bev/c.0.0",
    "bev/c.0.0.0.0.bak",
    "commits/00099.json",
    "mine/c.0.0.0.0",
    "mine/00000.json.0a.partial",
    "lease-of-my-flat",
)


def test_files_that_no_build_makes_are_left_alone_and_named(cache, capsys):
    for name in STRANGERS:
        (cache / name).parent.mkdir(exist_ok=True)
        (cache / name).write_bytes(b"mine")
    for name in ("c.zarr.unborn-x-1", f".d.zarr.unborn-{HOST}-1", ".c.zarr.unborn-elsewhere-1"):
        cache.with_name(name).mkdir()
        (cache.with_name(name) / "file").write_bytes(b"mine")
    before = contents(cache)
    assert main(["prune", str(cache), "--yes"]) == 0
    assert contents(cache) == before
    said = capsys.readouterr().out
    for name in STRANGERS:
        assert f"not ours, left alone: {name}\n" in said
    assert "nothing to prune" in said


def test_a_cache_that_is_being_built_is_refused(cache, dead, capsys):
    leave(cache, dead)
    holder = subprocess.Popen(["sleep", "60"])
    try:
        note = cache / f"lease-1-of-2-{HOST}-{holder.pid}"
        note.touch()
        before = contents(cache)
        for words in ([], ["--yes"], ["--json"]):
            assert main(["prune", str(cache), *words]) == 2
            said = capsys.readouterr()
            assert said.err.count("\n") == 1 and f"process {holder.pid}" in said.err
            assert not said.out
        assert contents(cache) == before
        # Elsewhere nobody can look for the process: its heartbeat counts.
        note.rename(cache / "lease-2-of-2-elsewhere-1")
        with pytest.raises(UsageError, match="on elsewhere"):
            prune(cache, remove=True)
        silent = time.time() - 3600
        os.utime(cache / "lease-2-of-2-elsewhere-1", (silent, silent))
        assert "lease-2-of-2-elsewhere-1" in {one.file for one in prune(cache).found}
        prune(cache, remove=True)
        assert not list(cache.glob("lease-*"))
    finally:
        holder.kill()
        holder.wait()


def test_an_unborn_folder_of_a_living_process_stays(cache):
    unborn = cache.with_name(f".c.zarr.unborn-{HOST}-{os.getpid()}")
    unborn.mkdir()
    assert not prune(cache, remove=True).found
    assert unborn.is_dir()


def test_an_unborn_folder_beside_what_a_link_points_to_is_found(cache, dead, tmp_path):
    leave(cache, dead)
    link = tmp_path / "elsewhere" / "link.zarr"
    link.parent.mkdir()
    link.symlink_to(cache)
    assert len(prune(link, remove=True).found) == 5
    assert not prune(cache).found


def test_what_it_says(cache, dead, capsys):
    names = leave(cache, dead)
    assert main(["prune", str(cache)]) == 0
    said = capsys.readouterr().out
    assert all(f"would remove: {name} (" in said for name in names) and "--yes" in said
    assert main(["prune", str(cache), "--yes", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["removed"] and {one["file"] for one in found["found"]} == set(names)
    assert main(["prune", str(cache), "--yes"]) == 0
    assert capsys.readouterr().out == f"nothing to prune in {cache}\n"


def test_what_is_not_a_sound_cache_is_not_pruned(cache, dead, tmp_path):
    leave(cache, dead)
    with pytest.raises(UsageError, match="no cache"):
        prune(tmp_path / "nothing.zarr", remove=True)
    (cache / "manifest.json").write_text("{")
    before = contents(cache)
    with pytest.raises(CheckFailed, match="damaged"):
        prune(cache, remove=True)
    assert contents(cache) == before
