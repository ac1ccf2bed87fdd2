"""What loader workers hand over is what the trainer would have read itself."""

import multiprocessing
from dataclasses import replace

import pytest
import torch
from handover_cases import (
    FRAMES,
    GRID,
    HALF,
    DrawnSource,
    loader_for,
    taken,
)

from fd3d.distill import ring as ring_module
from fd3d.distill.handover import Handover, dead_workers_told
from fd3d.distill.ring import MapLayout, Ring, Ticket
from fd3d.errors import CheckFailed, UsageError
from fd3d.resample import resample

# Three workers on two cores are meant here.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def handed_over(*, workers: int, start: str | None = None, batch: int = 4, grid=None):
    handover = Handover(source=DrawnSource(), frames=batch, workers=workers, grid=grid)
    return taken(handover, loader_for(handover, batch=batch, workers=workers, start=start))


def assert_same(found, expected):
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    for (_, one), (_, other) in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in ("bev", "heatmap"):
            assert one[name].dtype == torch.float32 and torch.equal(one[name], other[name])
        for row, same in zip(one["detections"], other["detections"], strict=True):
            assert torch.equal(row, same)


@pytest.mark.parametrize("grid", [None, HALF], ids=["as stored", "resampled"])
@pytest.mark.parametrize("workers, start", [(1, "fork"), (3, "fork"), (2, "spawn")])
def test_workers_hand_over_what_the_trainer_reads_itself(workers, start, grid):
    alone = handed_over(workers=0, grid=grid)
    # 10 frames in batches of 4: the last one fills half a slot.
    assert [len(tokens) for tokens, _ in alone] == [4, 4, 2]
    assert_same(handed_over(workers=workers, start=start, grid=grid), alone)


def test_maps_are_those_of_the_source_resampled_to_the_grid_of_comparison():
    source = DrawnSource()
    ((tokens, found), *_) = handed_over(workers=2, grid=HALF)
    stored = torch.stack([torch.from_numpy(source.load(token)["bev"]) for token in tokens])
    expected, _ = resample(stored.float(), from_grid=GRID, to_grid=HALF, path="torch")
    assert found["bev"].shape == (4, 5, 12, 12)
    # Rounded to float16, as the maps are stored: 11 bits.
    torch.testing.assert_close(found["bev"], expected, rtol=2**-11, atol=1e-6)


def test_every_slot_is_given_back_and_used_again_in_later_epochs():
    handover = Handover(source=DrawnSource(), frames=1, workers=2, slots=2)
    loader = loader_for(handover, batch=1, workers=2)
    first = taken(handover, loader)
    assert len(first) == FRAMES and handover.load._ring.in_use() == 0
    assert_same(taken(handover, loader), first)


def test_a_loop_that_was_left_does_not_block_the_next():
    handover = Handover(source=DrawnSource(), frames=1, workers=2, slots=2)
    loader = loader_for(handover, batch=1, workers=2)
    _, stale = next(iter(loader))
    assert len(taken(handover, loader)) == FRAMES
    with pytest.raises(CheckFailed, match="another loop"):
        handover.signals(stale)


def test_a_ticket_is_redeemed_once():
    handover = Handover(source=DrawnSource(), frames=2, workers=1)
    _, loaded = next(iter(loader_for(handover, batch=2, workers=1)))
    handover.signals(loaded)
    with pytest.raises(CheckFailed, match="twice"):
        handover.signals(loaded)


def test_an_error_in_a_worker_reaches_the_trainer():
    handover = Handover(source=DrawnSource(broken=3), frames=2, workers=1)
    with pytest.raises(UsageError, match="frame 3 cannot be read"):
        taken(handover, loader_for(handover, batch=2, workers=1))


def test_a_worker_that_dies_is_told_in_one_sentence():
    handover = Handover(source=DrawnSource(fatal=5), frames=2, workers=1)
    with pytest.raises(CheckFailed, match="loader worker died") as told, dead_workers_told():
        taken(handover, loader_for(handover, batch=2, workers=1))
    assert "\n" not in str(told.value)


def test_a_connection_that_a_dying_worker_closed_is_told_the_same_way():
    here, there = multiprocessing.Pipe()
    there.close()
    with pytest.raises(CheckFailed, match="worker closed its connection"), dead_workers_told():
        here.recv()


@pytest.mark.parametrize("error", [EOFError("a file"), FileNotFoundError("x"), RuntimeError("y")])
def test_other_errors_pass_through(error):
    with pytest.raises(type(error)) as told, dead_workers_told():
        raise error
    assert told.value is error


def test_memory_that_a_backward_pass_needs_is_not_overwritten_in_silence():
    handover = Handover(source=DrawnSource(), frames=2, workers=1)
    batches = iter(loader_for(handover, batch=2, workers=1))
    weight = torch.ones(1, requires_grad=True)
    loss = (weight * handover.signals(next(batches)[1])["bev"]).sum()
    handover.signals(next(batches)[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_cells_beyond_the_map_do_not_count():
    """A grid of the same cells that goes on for four columns behind the map's last."""
    source = DrawnSource()
    cell = source.grid.cell_x
    wide = replace(source.grid, x_max=source.grid.x_max + 4 * cell, nx=source.grid.nx + 4)
    handover = Handover(source=source, frames=1, workers=0, grid=wide)
    loaded = handover.load(["0"], [None])
    found = handover.signals(loaded)
    inside = torch.ones(wide.shape, dtype=torch.bool)
    inside[:, -4:] = False
    assert torch.equal(found["valid"][0, 0], inside)
    bev = torch.from_numpy(source.load("0")["bev"]).float()
    torch.testing.assert_close(found["bev"][0, :, :, :-4], bev, rtol=1e-3, atol=1e-3)
    assert float(found["bev"][..., -4:].abs().max()) == 0


def test_shared_memory_beyond_the_machine_is_refused(monkeypatch):
    monkeypatch.setattr(
        ring_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})()
    )
    if ring_module._MEMORY.is_dir():
        with pytest.raises(UsageError, match="use fewer workers"):
            Handover(source=DrawnSource(), frames=1, workers=1)


def test_the_ring_refuses_what_it_was_not_made_for():
    layout = {"bev": MapLayout(shape=(2, 3, 3), dtype=torch.float16)}
    with pytest.raises(UsageError, match="at least 2 slots"):
        Ring(layout=layout, frames=1, workers=1, slots=1)
    ring = Ring(layout=layout, frames=1, workers=1)
    with pytest.raises(UsageError, match="num_workers"), ring.filling(1):
        pass
    with pytest.raises(CheckFailed), ring.reading(Ticket(worker=0, slot=0, serial=1, frames=1)):
        pass
    assert ring.nbytes == 3 * 2 * 9 * 2
