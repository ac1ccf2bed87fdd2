"""The ring holds a fixed memory, makes workers wait, and leaves nothing behind."""

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from handover_cases import FRAMES, DrawnSource, holders, loader_for, taken

from fd3d.distill.handover import Handover, dead_workers_told
from fd3d.errors import CheckFailed

on_linux = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="looks into /proc, /dev/shm")


def test_a_worker_waits_until_a_slot_is_given_back():
    source = DrawnSource()
    handover = Handover(source=source, frames=1, workers=1, slots=2)
    batches = iter(loader_for(handover, batch=1, workers=1))
    first, second = next(batches)[1], next(batches)[1]
    time.sleep(0.3)  # time enough to load everything, were there room
    assert handover._ring.in_use() == 2
    for token, loaded in (("0", first), ("1", second)):
        wanted = source.signals([source.load(token)])["bev"]
        assert torch.equal(handover.signals(loaded)["bev"], wanted)
    rest = [handover.signals(loaded)["bev"].clone() for _, loaded in batches]
    assert len(rest) == FRAMES - 2 and handover._ring.in_use() == 0


def test_every_batch_lies_in_the_memory_allocated_at_first():
    handover = Handover(source=DrawnSource(), frames=2, workers=1)
    ring, places = handover._ring, set()
    for _, loaded in loader_for(handover, batch=2, workers=1):
        with ring.reading(loaded.ticket) as maps:
            places.add(maps["bev"].untyped_storage().data_ptr())
    assert len(places) == 1
    assert ring.nbytes == 3 * 2 * 2 * (5 + 3) * 24 * 24


def test_a_slot_is_given_back_where_the_trainer_fails_with_it():
    handover = Handover(source=DrawnSource(), frames=1, workers=1, slots=2)
    for _, loaded in loader_for(handover, batch=1, workers=1):
        with pytest.raises(KeyError), handover._ring.reading(loaded.ticket) as maps:
            maps["lift"]


@on_linux
def test_a_waiting_worker_and_the_memory_go_with_a_dead_trainer():
    program = "import handover_cases as cases; cases.orphan_a_waiting_worker()"
    trainer = subprocess.Popen(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, stdout=subprocess.PIPE
    )
    before, worker = map(int, trainer.communicate(timeout=60)[0].split())
    assert before == 2  # the trainer and its worker
    end = time.monotonic() + 20
    while time.monotonic() < end and _runs(worker):
        time.sleep(0.1)
    assert not _runs(worker)
    assert not holders(trainer.pid) and not _named(trainer.pid)


@on_linux
def test_the_memory_goes_with_a_trainer_that_a_dead_worker_stopped():
    gc.collect()
    before = Path("/proc/self/maps").read_text().count("/torch_")

    def train():
        handover = Handover(source=DrawnSource(fatal=5), frames=2, workers=1)
        assert Path("/proc/self/maps").read_text().count("/torch_") > before
        taken(handover, loader_for(handover, batch=2, workers=1))

    with pytest.raises(CheckFailed, match="loader worker died"), dead_workers_told():
        train()
    gc.collect()
    assert Path("/proc/self/maps").read_text().count("/torch_") == before
    assert holders(os.getpid()) <= {os.getpid()} and not _named(os.getpid())


def _named(trainer: int) -> list[Path]:
    return list(Path("/dev/shm").glob(f"torch_{trainer}_*"))


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
        # A process that has ended and that nobody waited for is still listed.
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
