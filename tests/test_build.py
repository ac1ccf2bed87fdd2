"""Builds: the same batches whether interrupted or not, one builder at a time, honest reports."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import made_cache
import numpy as np
import pytest

from cache_tools import lease
from cache_tools.info import cache_info
from cache_tools.parts import Part
from cache_tools.presets import PRESETS
from cache_tools.reader import CacheReader
from cache_tools.verify import verify
from fd3d.distill.signals import SignalSpec
from fd3d.errors import CheckFailed, UsageError


class Recorder:
    """The made expert, noting its batches; interrupted before batch number `until`."""

    def __init__(self, until: int | None = None) -> None:
        self.batches: list[list[int]] = []
        self.until = until

    def __call__(self, positions):
        if len(self.batches) == self.until:
            raise KeyboardInterrupt
        self.batches.append(list(positions))
        return made_cache.compute(positions)


WHOLE = [[0, 1, 2], [3], [4, 5, 6], [7], [8, 9, 10]]


def test_batches_never_cross_a_shard(tmp_path):
    expert = Recorder()
    made_cache.build(tmp_path / "c.zarr", compute=expert)
    assert expert.batches == WHOLE


@pytest.mark.parametrize("until", range(len(WHOLE)))
def test_a_resumed_build_repeats_whole_shards_with_the_same_batches(tmp_path, until):
    out, first, second = tmp_path / "c.zarr", Recorder(until), Recorder()
    with pytest.raises(KeyboardInterrupt):
        made_cache.build(out, compute=first)
    report = made_cache.build(out, compute=second)
    # Batches 0-1, 2-3 and 4 are the shards.
    assert second.batches == WHOLE[until - until % 2 :]
    assert report.frames == 11 and report.built == sum(map(len, second.batches))
    assert verify(out).ok


def test_a_finished_build_runs_nothing_and_keeps_its_report(tmp_path):
    out = tmp_path / "c.zarr"
    made_cache.build(out)
    written = (out / "report.json").read_text()
    again = Recorder()
    report = made_cache.build(out, compute=again)
    assert again.batches == [] and report.built == 0
    assert (out / "report.json").read_text() == written


def test_shards_whose_files_are_gone_or_short_are_built_anew(tmp_path):
    out, again = tmp_path / "c.zarr", Recorder()
    made_cache.build(out)
    (out / "bev" / "c.0.0.0.0").unlink()
    torn = out / "heatmap" / "c.2.0.0.0"
    torn.write_bytes(torn.read_bytes()[:-1])
    made_cache.build(out, compute=again)
    assert again.batches == [[0, 1, 2], [3], [8, 9, 10]]
    assert verify(out).ok


def test_load_is_told_all_batches_and_feeds_the_expert(tmp_path):
    told = []

    def load(batches):
        told.extend(batches)
        return ({"positions": positions} for positions in batches)

    made_cache.build(
        tmp_path / "c.zarr", load=load, compute=lambda given: made_cache.compute(given["positions"])
    )
    assert told == WHOLE
    made_cache.build(tmp_path / "plain.zarr")
    ours, plain = CacheReader(tmp_path / "c.zarr"), CacheReader(tmp_path / "plain.zarr")
    for token in plain.tokens:
        np.testing.assert_array_equal(ours.read(token)["bev"], plain.read(token)["bev"])


@pytest.mark.parametrize("preset", PRESETS)
def test_the_report_says_sizes_and_errors_as_they_are(tmp_path, preset):
    out = tmp_path / "c.zarr"
    report = made_cache.build(out, preset=preset)
    assert report.frames == 11 and report.bytes == sum(
        path.stat().st_size for path in out.rglob("c.*")
    )
    rows = sum(len(made_cache.values(i)["detections"]) for i in range(11))
    assert report.raw_fp16_bytes == 11 * 2 * (6 + 3) * 40 * 40 + rows * 11 * 4
    reader, errors = CacheReader(out), []
    for batch in WHOLE:
        for position, value in zip(batch, made_cache.compute(batch)["bev"], strict=True):
            found = reader.read(reader.tokens[position], ["bev"])["bev"].astype(np.float64)
            exact = reader.exact(reader.tokens[position], "bev")
            found, value = found[:, exact], value[:, exact]
            centred = value - value.mean(axis=1, keepdims=True) if exact.any() else value
            errors.append(np.linalg.norm(found - value) / max(np.linalg.norm(centred), 1e-9))
    bev = report.signals["bev"]
    assert bev.worst_error == pytest.approx(max(errors), rel=1e-3)
    assert bev.mean_error == pytest.approx(np.mean(errors), rel=1e-3)
    assert bev.worst_token == f"frame-{int(np.argmax(errors)):03d}"
    assert bev.over_budget == 0
    stored = json.loads((out / "report.json").read_text())
    assert stored["cache_id"] == report.cache_id and stored["bytes"] == report.bytes


def spiky(*where):
    """One spike stretches the channel's 255 steps until the rest falls between two of them."""

    def compute(positions):
        values = made_cache.compute(positions)
        for position, bev in zip(positions, values["bev"], strict=True):
            if position in where:
                bev *= 0.2
                bev[:, 5, 5] = 60
        return values

    return compute


def test_each_part_answers_for_its_own_frames(tmp_path):
    """Shards 0 and 2 of three are part 1's: its limit is a share of their seven frames."""
    words = {"preset": "balanced", "part": Part(number=1, of=2), "most_over_budget": 0.25}
    with pytest.raises(CheckFailed, match="2 of 7 frames"):
        made_cache.build(tmp_path / "a.zarr", compute=spiky(0, 2), **words)
    made_cache.build(tmp_path / "b.zarr", compute=spiky(0), **words)
    # What another part has stored exactly is its own affair.
    other = {**words, "part": Part(number=2, of=2)}
    made_cache.build(tmp_path / "b.zarr", compute=spiky(5), **other)


def test_a_loader_that_ends_too_early_is_named(tmp_path):
    with pytest.raises(UsageError, match="load yielded nothing"):
        made_cache.build(tmp_path / "c.zarr", load=lambda batches: batches[:1])


# No map of so few cells is over the budget of tiny.
@pytest.mark.parametrize("preset", ["balanced", "fast", "focal"])
def test_a_frame_over_the_budget_is_stored_exactly_and_counted(tmp_path, preset):
    # In preset focal the spike counts where it is kept.
    def compute(positions):
        return {**spiky(9)(positions), "focus": [np.ones((40, 40), bool)] * len(positions)}

    report = made_cache.build(tmp_path / "c.zarr", compute=compute, preset=preset)
    assert report.signals["bev"].over_budget == 1
    assert report.signals["heatmap"].over_budget == 0
    reader = CacheReader(tmp_path / "c.zarr")
    (value,) = compute([8, 9, 10])["bev"][1:2]
    wanted = value.astype(np.float16)
    np.testing.assert_array_equal(reader.read("frame-009")["bev"], wanted)
    area = reader.read_area("frame-009", "bev", channels=slice(1, 3), rows=slice(30, 35))
    np.testing.assert_array_equal(area, wanted[1:3, 30:35])
    stored = reader.read_stored("frame-009", "bev")
    assert stored.scale is None and stored.stored.dtype == np.float16
    np.testing.assert_array_equal(stored.stored, wanted)
    assert reader.exact("frame-009", "bev").all()
    if preset != "focal":
        (tile,) = reader.read_tiles("frame-009", "bev", [(0, 0)])
        np.testing.assert_array_equal(tile, wanted[:, :32, :32])
    assert reader.read_stored("frame-008", "bev").stored.dtype == np.int8
    assert verify(tmp_path / "c.zarr").ok


def test_too_many_frames_over_the_budget_stop_the_build(tmp_path):
    out = tmp_path / "c.zarr"
    with pytest.raises(CheckFailed, match="2 of 11 frames.*preset balanced in bev.*frame-009"):
        made_cache.build(out, compute=spiky(2, 9), preset="balanced")
    assert cache_info(out)["frames"] == 8
    # The count goes on where the build does.
    with pytest.raises(CheckFailed, match="2 of 11 frames"):
        made_cache.build(out, compute=spiky(2, 9), preset="balanced")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e6])
def test_values_that_cannot_be_stored_stop_the_build_and_name_the_frame(tmp_path, bad):
    def broken(positions):
        values = made_cache.compute(positions)
        if 6 in positions:
            values["bev"][positions.index(6)][0, 0, 0] = bad
        return values

    out = tmp_path / "c.zarr"
    with pytest.raises(CheckFailed, match="frame-006.*bev"):
        made_cache.build(out, compute=broken)
    assert cache_info(out)["frames"] == 4
    made_cache.build(out)
    assert verify(out).ok


def test_an_expert_that_leaves_a_signal_out_is_a_sentence(tmp_path):
    def forgetful(positions):
        return {name: made_cache.compute(positions)[name] for name in ("bev", "heatmap")}

    with pytest.raises(UsageError, match="detections"):
        made_cache.build(tmp_path / "c.zarr", compute=forgetful)


def test_any_expert_and_any_keys_will_do(tmp_path):
    """No grid, no maps, keys that are file names: nothing of nuScenes is needed."""
    signals = {"embedding": SignalSpec(name="embedding", shape=(7,), dtype="float32")}
    names = ["a/b.jpg", "ä", "c d"]
    made_cache.build(
        tmp_path / "c.zarr",
        signals=signals,
        keys=names,
        compute=lambda batch: {"embedding": [np.full(7, i, np.float32) for i in batch]},
    )
    assert (CacheReader(tmp_path / "c.zarr").read("c d")["embedding"] == 2).all()


@pytest.fixture
def unfinished(tmp_path):
    out = tmp_path / "c.zarr"
    with pytest.raises(KeyboardInterrupt):
        made_cache.build(out, compute=Recorder(until=2))
    return out


def write_lease(out, *, host, pid, part="1-of-1", age=0.0):
    path = out / f"lease-{part}-{host}-{pid}"
    path.touch()
    os.utime(path, (time.time() - age,) * 2)


@pytest.fixture
def other_process():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process.pid
    process.kill()
    process.wait()


def test_a_second_build_is_refused_while_the_first_lives(unfinished, other_process):
    write_lease(unfinished, host=socket.gethostname(), pid=other_process)
    with pytest.raises(UsageError, match=f"being built by process {other_process}"):
        made_cache.build(unfinished)
    with pytest.raises(UsageError, match=f"4 of 11 frames.*process {other_process}"):
        CacheReader(unfinished)
    assert not list(unfinished.glob(f"lease-*-{os.getpid()}")), "the refused left its own lease"
    (unfinished / f"lease-1-of-1-{socket.gethostname()}-{other_process}").unlink()
    write_lease(unfinished, host="else-where.net", pid=1)
    with pytest.raises(UsageError, match="process 1 on else-where.net: wait"):
        made_cache.build(unfinished)


def test_a_lease_of_the_dead_or_the_silent_stops_nobody(unfinished, other_process):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write_lease(unfinished, host=socket.gethostname(), pid=dead.pid)
    write_lease(unfinished, host=socket.gethostname(), pid=other_process, age=3600)
    write_lease(unfinished, host="elsewhere", pid=1, part="2-of-1")
    assert lease.holders(unfinished) == ()
    made_cache.build(unfinished)
    assert verify(unfinished).ok and not list(unfinished.glob("lease-1*"))
