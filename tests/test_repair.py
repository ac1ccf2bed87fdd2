"""`repair` and the build after it give back what was damaged, whatever it was."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import made_cache
import numpy as np
import pytest

from cache_tools import commands, layout, spare
from cache_tools.reader import CacheReader
from cache_tools.repair import repair
from cache_tools.verify import verify
from fd3d.errors import CheckFailed, UsageError

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "c.zarr"
    made_cache.build(out)
    return out


@pytest.fixture
def cache(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "c.zarr")


def contents(folder):
    """Every file but those that tell of measurements."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != layout.REPORT
    }


def metadata(folder):
    names = [layout.MANIFEST, layout.TOKENS, layout.SPARE, "zarr.json"]
    return names + [path.relative_to(folder).as_posix() for path in folder.glob("*/zarr.json")]


def test_nothing_is_done_to_a_sound_cache(cache, whole):
    report = repair(cache)
    assert report.complete and not (report.restored or report.shards or report.problems)
    assert contents(cache) == contents(whole)


def test_no_build_begins_while_a_cache_is_checked(cache, monkeypatch):
    """Its new record would be taken for the damaged one."""
    path = cache / "bev" / "c.0.0.0.0"
    damaged = path.read_bytes()
    path.write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))

    code = f"import made_cache; made_cache.build({str(cache)!r})"
    tried = []

    def slow(folder, **options):
        build = [sys.executable, "-c", code]
        tried.append(subprocess.run(build, cwd=TESTS, capture_output=True, text=True).stderr)
        return verify(folder, **options)

    monkeypatch.setattr("cache_tools.repair.verify", slow)
    report = repair(cache)
    assert "is being built by" in tried[0] and report.shards == (0,)


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "other JSON"])
def test_every_metadata_file_is_restored_to_the_byte(cache, whole, damage):
    for name in metadata(cache):
        path = cache / name
        before = path.read_bytes()
        if damage == "missing":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(before[: len(before) // 2])
        elif damage == "flipped":
            path.write_bytes(before[:20] + bytes([before[20] ^ 1]) + before[21:])
        else:
            path.write_text('{"a": 1}')
        report = repair(cache)
        assert report.restored == (name,) and report.complete
        assert contents(cache) == contents(whole)


def test_all_metadata_at_once_comes_back_from_the_copy(cache, whole):
    for name in metadata(cache):
        if name != layout.SPARE:
            (cache / name).write_bytes(b"")
    assert len(repair(cache).restored) == len(metadata(cache)) - 1
    assert contents(cache) == contents(whole)


def test_what_is_damaged_in_both_copies_is_said_in_one_sentence(cache):
    (cache / layout.SPARE).write_bytes(b"{")
    (cache / layout.TOKENS).write_bytes(b"[")
    before = contents(cache)
    with pytest.raises(CheckFailed, match=r"tokens\.json is damaged"):
        repair(cache)
    assert contents(cache) == before


@pytest.mark.parametrize("names", [["../outside.json"], ["/tmp/outside.json"], ["a/b/c.json"]])
def test_a_copy_that_names_files_elsewhere_is_not_used(cache, names):
    texts = dict.fromkeys(names, "x")
    content = {"files": texts, "checksum": spare.digest(spare.canonical_json(texts))}
    (cache / layout.SPARE).write_text(json.dumps(content))
    assert spare.load(cache) is None
    (cache / layout.TOKENS).write_bytes(b"[")
    with pytest.raises(CheckFailed):
        repair(cache)
    assert not (cache.parent / "outside.json").exists()


def test_damaged_shards_are_forgotten_and_built_anew(cache, whole):
    reader = CacheReader(whole)
    wanted = {token: reader.read(token) for token in reader.tokens}
    rng = np.random.default_rng(0)
    names = [n for n in contents(cache) if n.rsplit("/")[-1].startswith("c.") or "commits" in n]
    for name in rng.choice(names, 12, replace=False):
        path = cache / name
        torn = bytearray(path.read_bytes())
        torn[int(rng.integers(len(torn)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(torn)
        if not verify(cache).problems:
            continue  # white space in a record
        report = repair(cache)
        assert len(report.shards) == 1 and not report.complete and not report.restored
        assert verify(cache).problems == () and report.frames < report.expected
        made_cache.build(cache)
        assert verify(cache).ok
        again = CacheReader(cache)
        for token, signals in wanted.items():
            for name_, value in again.read(token).items():
                assert value.tobytes() == signals[name_].tobytes()


def test_a_cache_that_is_being_built_is_left_alone(cache):
    import os
    import socket

    (cache / f"lease-1-of-1-{socket.gethostname()}-{os.getpid()}").touch()
    with pytest.raises(UsageError, match="is being built by process"):
        repair(cache)


def test_what_is_not_a_cache_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no cache"):
        repair(tmp_path / "none.zarr")
    with pytest.raises(UsageError, match="not a cache"):
        repair(tmp_path)


def test_the_verb_says_what_it_did_and_what_to_run_next(cache, capsys):
    commands.run(["repair", str(cache), "--json"])
    assert json.loads(capsys.readouterr().out)["complete"]
    (cache / layout.TOKENS).unlink()
    (cache / "bev" / "c.0.0.0.0").write_bytes(b"")
    with pytest.raises(CheckFailed, match="run the build command again"):
        commands.run(["repair", str(cache)])
    said = capsys.readouterr().out
    assert "restored: tokens.json" in said and "forgotten: commits/00000.json" in said
