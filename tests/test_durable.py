"""Files that are whole or not there: what a reader sees, and when it is on the disk."""

import errno
import json
import os

import pytest

from fd3d.durable import replacing, sync, write_durably, write_json


def test_a_file_appears_whole_and_alone(tmp_path):
    with replacing(tmp_path / "a.txt") as partial:
        partial.write_text("new")
        assert partial.parent == tmp_path and not (tmp_path / "a.txt").exists()
    write_json(tmp_path / "a.json", {"path": tmp_path, "n": 1})
    assert (tmp_path / "a.txt").read_text() == "new"
    assert json.loads((tmp_path / "a.json").read_text()) == {"path": str(tmp_path), "n": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.txt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_after_an_error_the_old_file_stays_and_nothing_is_beside_it(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path, monkeypatch
):
    events = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle):
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def watched_replace(source, target):
        events.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_durably(tmp_path / "a.bin", b"content")
    first, *rest = events
    assert first.startswith(str(tmp_path / "a.bin.")) and rest == ["replace", str(tmp_path)]


@pytest.mark.parametrize(("code", "raised"), [(errno.EIO, True), (errno.EINVAL, False)])
def test_only_a_file_system_that_cannot_sync_folders_is_let_off(
    tmp_path, monkeypatch, code, raised
):
    def fails(handle):
        raise OSError(code, "no")

    (tmp_path / "a").touch()
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError):
        sync(tmp_path / "a")
    if raised:
        with pytest.raises(OSError):
            sync(tmp_path)
    else:
        sync(tmp_path)
