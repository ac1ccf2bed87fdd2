"""More frames for a cache: shards are shared, the expert sees new frames only, the old cache
stays."""

import errno
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from made_cache import IDENTITY, SIGNALS, build, compute, keys

from cache_tools import append, records
from cache_tools.append import appended_keys
from cache_tools.cli import main
from cache_tools.manifest import load
from cache_tools.parts import Part
from cache_tools.reader import CacheReader
from cache_tools.repair import repair
from cache_tools.verify import verify
from fd3d.errors import CheckFailed, UsageError

SHARD = 4


def files_of(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def arrays_of(folder) -> list:
    """The arrays' shard files."""
    return [p for p in folder.glob("*/c*") if p.is_file()] or [
        p for p in folder.rglob("c/*") if p.is_file()
    ]


@pytest.fixture(params=["lossless", "balanced"])
def base(tmp_path, request):
    """Frames 0 to 9 of a data set, in whole shards but for the last two frames."""
    out = tmp_path / "base.zarr"
    build(out, frames=10, shard_frames=SHARD, batch=1, preset=request.param)
    return out


def grow(base, out, *, count=15, **changes):
    """A cache of more frames on that base, and the positions for which the expert was asked."""
    wanted = appended_keys(base, keys(count))
    asked = []

    def counted(positions):
        asked.extend(wanted[position] for position in positions)
        return compute([keys(count).index(wanted[position]) for position in positions])

    known = load(base)
    arguments = {
        "keys": wanted,
        "compute": counted,
        "base": base,
        "shard_frames": SHARD,
        "batch": 1,
        "preset": known.preset,
    }
    report = build(out, **{**arguments, **changes})
    return report, asked


def test_the_expert_sees_new_frames_alone_and_values_are_the_same(base, tmp_path):
    before = files_of(base)
    report, asked = grow(base, tmp_path / "new.zarr")
    # Eight frames lie in whole shards; the two behind them are built again with the new ones.
    assert asked == keys(15)[8:] and report.complete and report.built == 7
    assert files_of(base) == before
    new, old = CacheReader(tmp_path / "new.zarr"), CacheReader(base)
    assert new.cache_id != old.cache_id and new.tokens == tuple(keys(15))
    build(tmp_path / "whole.zarr", frames=15, shard_frames=SHARD, batch=1, preset=load(base).preset)
    whole = CacheReader(tmp_path / "whole.zarr")
    assert whole.cache_id == new.cache_id
    for token in new.tokens:
        for name in SIGNALS:
            np.testing.assert_array_equal(
                new.read(token, [name])[name], whole.read(token, [name])[name]
            )
    assert verify(tmp_path / "new.zarr").ok
    linked = [p for p in arrays_of(tmp_path / "new.zarr") if p.stat().st_nlink == 2]
    assert len(linked) >= 2 * len(SIGNALS)


def test_frames_between_the_old_ones_come_behind_them(base, tmp_path):
    wanted = [*keys(5), "between", *keys(10)[5:]]
    assert appended_keys(base, wanted) == (*keys(8), "between", *keys(10)[8:])
    fewer = [key for key in keys(10) if key != keys(10)[1]]
    order = appended_keys(base, fewer)
    assert order[:4] == tuple(keys(10)[4:8]) and set(order) == set(fewer)


def test_shards_move_to_other_places(base, tmp_path):
    """Without a frame of the first shard the second becomes the first."""
    wanted = appended_keys(base, keys(12)[1:])
    position = {key: i for i, key in enumerate(keys(12))}

    def ask(rows):
        return compute([position[wanted[row]] for row in rows])

    report = build(
        tmp_path / "new.zarr",
        keys=wanted,
        compute=ask,
        base=base,
        shard_frames=SHARD,
        batch=1,
        preset=load(base).preset,
    )
    assert report.built == len(wanted) - SHARD
    new, old = CacheReader(tmp_path / "new.zarr"), CacheReader(base)
    for token in keys(12)[4:8]:
        np.testing.assert_array_equal(
            new.read(token, ["bev"])["bev"], old.read(token, ["bev"])["bev"]
        )
    assert verify(tmp_path / "new.zarr").ok


def test_a_copy_serves_where_links_do_not(base, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "another file system")

    # In this module alone: zarr-python links files too.
    monkeypatch.setattr(append, "os", SimpleNamespace(link=refuse))
    report, asked = grow(base, tmp_path / "new.zarr")
    assert report.complete and len(asked) == 7
    assert all(p.stat().st_nlink == 1 for p in arrays_of(tmp_path / "new.zarr"))


def test_what_differs_is_refused_with_both_named(base, tmp_path):
    other = "tiny"
    with pytest.raises(UsageError, match=f"preset {load(base).preset}.*preset {other}.*codecs"):
        grow(base, tmp_path / "new.zarr", preset=other)
    with pytest.raises(UsageError, match="differ in expert"):
        grow(base, tmp_path / "new.zarr", identity=replace(IDENTITY, expert="another"))
    assert not (tmp_path / "new.zarr").exists()


def test_a_damaged_base_is_refused(base, tmp_path):
    victim = arrays_of(base)[0]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(bytes(content))
    with pytest.raises(CheckFailed, match="damaged"):
        grow(base, tmp_path / "new.zarr")


def test_mending_one_cache_leaves_the_other_alone(base, tmp_path):
    """The record of a shared shard goes, and repair and a build make its files anew."""
    new = tmp_path / "new.zarr"
    grow(base, new)
    before = files_of(base)
    shared = next(p for p in arrays_of(new) if p.stat().st_nlink == 2)
    shared.unlink()
    assert not verify(new).ok
    repair(new)
    report, _ = grow(base, new)
    assert report.complete and verify(new).ok
    assert files_of(base) == before and verify(base).ok


def test_a_kill_before_the_record_is_mended_by_the_next_build(base, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    monkeypatch.setattr(append.records, "save", killed)
    with pytest.raises(Killed):
        grow(base, tmp_path / "new.zarr")
    monkeypatch.undo()
    before = files_of(base)
    report, asked = grow(base, tmp_path / "new.zarr")
    assert report.complete and len(asked) == 7 and files_of(base) == before


def test_parts_share_their_own_shards(base, tmp_path):
    new = tmp_path / "new.zarr"
    for number in (1, 2):
        report, _ = grow(base, new, part=Part(number=number, of=2))
    assert report.complete
    done, bad = records.load_all(new, load(new))
    assert len(done) == 4 and not bad


def test_the_command_shares_a_split_s_cache(synthetic, tmp_path, capsys):
    """An unfinished cache as the base: its one shard is not built again."""
    words = f"--expert bevdepth-tiny-h --init-seed 3 --version {synthetic.version} --split train "
    words += "--signals bev --workers 0 --shard-frames 2"
    flags = ["build", *words.split(), "--dataroot", str(synthetic.dataroot), "--out"]
    old, new = tmp_path / "old.zarr", tmp_path / "new.zarr"
    assert main([*flags, str(old)]) == 0
    kept = len(CacheReader(old))
    token = CacheReader(old).tokens
    less = tmp_path / "less.txt"
    less.write_text("\n".join(token[:4]) + "\n")
    assert main(["export", str(old), str(tmp_path / "part.zarr"), "--keys", str(less)]) == 0
    base = ["--base", str(tmp_path / "part.zarr")]
    shutil.rmtree(old)
    capsys.readouterr()
    assert main([*flags, str(new), *base]) == 0
    assert "2 of the shards are shared" in capsys.readouterr().out
    other = [word if word != "train" else "val" for word in flags]
    assert main([*other, str(tmp_path / "val.zarr"), *base]) == 2
    assert "shares no shard" in capsys.readouterr().err
    assert len(CacheReader(new)) == kept
    assert main(["verify", str(new)]) == 0
    assert main([*flags, str(tmp_path / "x.zarr"), "--base", str(tmp_path / "none")]) == 2
    assert "there is no cache" in capsys.readouterr().err
