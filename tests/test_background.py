"""Writing beside the expert: the same bytes in the same order, errors told, nobody left waiting."""

from __future__ import annotations

import errno
import re
import signal
import threading
import time

import made_cache
import numpy as np
import pytest

from cache_tools import manifest
from cache_tools.background import BackgroundWriter
from cache_tools.bottleneck import bottleneck, shares
from cache_tools.presets import PRESETS
from cache_tools.verify import verify
from cache_tools.writer import ShardWriter, create_or_open
from fd3d.distill.signals import SignalSpec
from fd3d.errors import CheckFailed, UsageError, exit_code

pytestmark = pytest.mark.usefixtures("no_thread_left")


@pytest.fixture
def no_thread_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "cache-writer"]


class Noted:
    """Stands for a `ShardWriter`: notes what it is given, slow while `gate` is shut."""

    def __init__(self, *, fails_at: int | None = None, shut: bool = False) -> None:
        self.did: list[tuple[str, int]] = []
        self.fails_at = fails_at
        self.gate = threading.Event()
        if not shut:
            self.gate.set()

    def add(self, position, values):
        assert self.gate.wait(30)
        if position == self.fails_at:
            raise CheckFailed(f"frame {position} is bad")
        self.did.append(("add", position))

    def publish(self, shard):
        self.did.append(("publish", shard))


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def data(cache) -> dict[str, bytes]:
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.glob("*/*")}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_byte_is_that_of_a_writer_without_a_thread(tmp_path, preset):
    made_cache.build(tmp_path / "beside.zarr", preset=preset)
    keys = made_cache.keys(11)
    cache = manifest.make(
        identity=made_cache.IDENTITY,
        signals=made_cache.SIGNALS,
        keys=keys,
        preset=preset,
        shard_frames=4,
    )
    create_or_open(tmp_path / "plain.zarr", cache, keys)
    writer = ShardWriter(folder=tmp_path / "plain.zarr", cache=cache, keys=keys)
    for shard, batches in enumerate(([[0, 1, 2], [3]], [[4, 5, 6], [7]], [[8, 9, 10]])):
        for batch in batches:
            values = made_cache.compute(batch)
            for row, position in enumerate(batch):
                writer.add(position, {name: values[name][row] for name in values})
        writer.publish(shard)
    assert data(tmp_path / "beside.zarr") == data(tmp_path / "plain.zarr")


def test_chunks_of_several_blocks_are_the_same_bytes_in_every_build(tmp_path):
    """Blosc's own threads, which it takes on a main thread only, order blocks as they finish."""
    signals = {"bev": SignalSpec(name="bev", shape=(256, 64, 64), dtype="float16")}
    rng = np.random.default_rng(0)
    frames = np.maximum(rng.normal(size=(8, 256, 64, 64)), 0).astype(np.float32)
    for name in ("one", "two"):
        made_cache.build(
            tmp_path / name, frames=8, signals=signals, compute=lambda part: {"bev": frames[part]}
        )
    assert data(tmp_path / "one") == data(tmp_path / "two")


def test_frames_are_written_in_order_and_shards_between_them():
    writer = Noted()
    with BackgroundWriter(writer=writer, waiting=2) as background:
        for position in range(50):
            background.add(position, {}, ends=position // 5 if position % 5 == 4 else None)
    wanted = []
    for shard in range(10):
        wanted += [("add", 5 * shard + i) for i in range(5)] + [("publish", shard)]
    assert writer.did == wanted


def test_the_queue_holds_so_many_frames_and_no_more():
    writer, given = Noted(shut=True), []
    with BackgroundWriter(writer=writer, waiting=3) as background:

        def feed():
            for position in range(20):
                background.add(position, {})
                given.append(position)

        feeder = threading.Thread(target=feed)
        feeder.start()
        # Three in the queue and one in the writer's hands.
        until(lambda: len(given) == 4)
        time.sleep(0.1)
        assert len(given) == 4
        writer.gate.set()
        feeder.join()
    assert len(writer.did) == 20 and background.seconds["wait"] >= 0.1


def test_an_error_in_the_background_is_raised_by_the_next_frame():
    writer, given = Noted(fails_at=2), 0
    with (
        pytest.raises(CheckFailed, match="frame 2 is bad"),
        BackgroundWriter(writer=writer, waiting=2) as background,
    ):
        for position in range(1000):
            background.add(position, {}, ends=position)
            given += 1
    # Two may wait, one is bad, and another may be on its way.
    assert given <= 6
    assert writer.did == [("add", 0), ("publish", 0), ("add", 1), ("publish", 1)]


def test_an_error_in_the_last_frame_is_raised_at_the_end():
    with (
        pytest.raises(CheckFailed, match="frame 3"),
        BackgroundWriter(writer=Noted(fails_at=3)) as background,
    ):
        for position in range(4):
            background.add(position, {})


def test_an_error_before_a_full_queue_keeps_nobody_waiting():
    """Its frames are taken out all the same, or whoever adds would wait for ever."""
    writer = Noted(fails_at=0, shut=True)
    timer = threading.Timer(0.1, writer.gate.set)
    timer.start()
    with pytest.raises(CheckFailed), BackgroundWriter(writer=writer, waiting=1) as background:
        for position in range(3):
            background.add(position, {})
    timer.join()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, UsageError])
def test_an_error_of_the_expert_while_the_queue_is_full(kind):
    """Whole shards are published, the begun one is dropped."""
    writer = Noted(shut=True)
    with pytest.raises(kind), BackgroundWriter(writer=writer, waiting=4) as background:
        for position, ends in ((0, None), (1, 0), (2, None), (3, None), (4, None)):
            background.add(position, {}, ends=ends)
        threading.Timer(0.05, writer.gate.set).start()
        raise kind("stop")
    assert writer.did == [("add", 0), ("add", 1), ("publish", 0)]


def test_an_earlier_frame_that_is_bad_is_told_before_what_failed_later():
    writer = Noted(fails_at=0)
    with (
        pytest.raises(CheckFailed, match="frame 0"),
        BackgroundWriter(writer=writer, waiting=1) as background,
    ):
        background.add(0, {}, ends=0)
        raise UsageError("the expert gave nothing")


@pytest.mark.parametrize("waiting", [1, 8], ids=["adding", "ending"])
def test_ctrl_c_while_waiting_for_the_writer(waiting):
    """In the middle of `add` on a full queue, and at the end of the block."""
    # A shell that runs the tests in the background lets them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    writer = Noted(shut=True)

    def interrupt():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.05)
        writer.gate.set()

    timer = threading.Timer(0.2, interrupt)
    timer.start()
    with (
        pytest.raises(KeyboardInterrupt),
        BackgroundWriter(writer=writer, waiting=waiting) as background,
    ):
        for position in range(6):
            background.add(position, {})
    timer.join()
    signal.signal(signal.SIGINT, before)
    # The one that it had begun; the shard would not have been whole.
    assert writer.did == [("add", 0)]


def test_a_disk_that_fills_up_keeps_what_was_committed(tmp_path, monkeypatch, capsys):
    out, publish = tmp_path / "c.zarr", ShardWriter.publish

    def full(writer, shard):
        if shard == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return publish(writer, shard)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "publish", full)
        assert exit_code(lambda: made_cache.build(out)) == 1
    assert "no space left" in capsys.readouterr().err
    assert made_cache.build(out).built == 7
    assert verify(out).ok and not verify(out).leftovers


def test_a_report_says_where_the_time_went(tmp_path):
    def slow(positions):
        time.sleep(0.02)
        return made_cache.compute(positions)

    report = made_cache.build(tmp_path / "c.zarr", compute=slow)
    assert list(report.seconds) == ["load", "expert", "wait", "encode", "write"]
    assert report.seconds["expert"] >= 0.1 and report.seconds["encode"] > 0
    assert report.bottleneck
    assert made_cache.build(tmp_path / "c.zarr").bottleneck == ""


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ((1, 87, 12, 30, 20), "the expert is the bottleneck: 87 % of the time; more --workers wo"),
        ((60, 40, 0, 5, 5), "loading is the bottleneck: .* 60 % .*--workers"),
        ((1, 9, 90, 70, 29), "encoding is the bottleneck: .* 90 % .*--part"),
        ((1, 9, 90, 29, 70), "the disk is the bottleneck: .* 90 % .*--preset"),
    ],
)
def test_the_bottleneck_is_named_with_what_would_help(seconds, said):
    named = dict(zip(("load", "expert", "wait", "encode", "write"), seconds, strict=True))
    assert re.match(said, bottleneck(named))
    assert shares(named).startswith(f"load {seconds[0]} %, expert {seconds[1]} %")
    assert bottleneck({}) == ""
