"""An expert that works in the ego frame teaches an apprentice that works in the LIDAR frame."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_maps import seen
from test_models_generations import narrow
from torch.utils.data import DataLoader

from cache_tools.build import build_cache
from cache_tools.manifest import Identity
from cache_tools.source import CachedExpert
from fd3d import models
from fd3d.boxes import YAW, wrap_angle
from fd3d.data.batch import Batch, collate
from fd3d.data.frames import FrameDataset
from fd3d.distill.align import channel_scale, comparison_grid
from fd3d.distill.handover import Handover, PairedFrames, collate_pairs
from fd3d.distill.live import LiveSource
from fd3d.distill.losses.heatmap import Heatmap
from fd3d.distill.losses.l2 import L2
from fd3d.distill.signals import LiveExpert, SignalSpec
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.network import BEVDepth

EGO = BEVGrid.square(half_extent=25.6, cells=64, frame="ego")
SIGNALS = ("bev", "detections", "heatmap")


class WhereItLies:
    """Maps on EGO that hold, in every cell, its own LIDAR x and y."""

    grid = EGO
    ids = {}
    specs = {"bev": SignalSpec(name="bev", shape=(2, *EGO.shape), dtype="float32", grid=EGO)}

    def __init__(self, index):
        self.index = index

    def load(self, token, frame=None):
        frame = self.index.frame(self.index.position(token))
        ego2lidar = np.linalg.inv(frame.pose("lidar")) @ frame.pose("ego")
        cols, rows = np.meshgrid(np.arange(EGO.nx), np.arange(EGO.ny))
        x, y, one = np.einsum("ij,jyx->iyx", EGO.cell_to_metres(), [cols, rows, np.ones_like(cols)])
        there = np.einsum("ij,jyx->iyx", ego2lidar, np.stack([x, y, 0 * x, one]))
        return {"bev": there[:2].astype(np.float32)}

    def signals(self, loaded, device="cpu"):
        return {"bev": torch.stack([torch.from_numpy(frame["bev"]) for frame in loaded])}


@pytest.fixture(scope="module")
def frames(synthetic):
    """The apprentice's view."""
    index = synthetic.open()
    image = models.build("bevdepth-tiny-l").image
    positions = index.split(synthetic.split)
    return FrameDataset(index=index, positions=positions, image=image, truth=True)


@pytest.fixture(scope="module")
def expert(frames):
    """A small second-generation network, and its own view of the frames."""
    torch.manual_seed(0)
    config = narrow(2)
    # Random weights score nothing above the threshold that a trained network has.
    model = BEVDepth(replace(config, decode=replace(config.decode, min_score=0.0)))
    view = FrameDataset(
        index=frames.index, positions=frames.positions, image=model.image, truth=False
    )
    return LiveExpert(model=model, names=SIGNALS), view


def batches(handover, frames, workers=0):
    loader = DataLoader(
        PairedFrames(frames=frames, load=handover.load),
        batch_size=2,
        num_workers=workers,
        collate_fn=collate_pairs,
    )
    for batch, loaded in loader:
        yield batch, handover.signals(loaded, batch)


@pytest.mark.parametrize("cells", [32, 64, 128])
@pytest.mark.parametrize(("workers", "live"), [(0, False), (2, False), (0, True)])
def test_every_cell_holds_what_the_expert_saw_there(workers, live, cells, frames):
    grid = BEVGrid.square(half_extent=25.6, cells=cells)
    handover = Handover(
        source=WhereItLies(frames.index), frames=2, workers=workers, grid=grid, live=live
    )
    assert handover.grid == grid
    cols, rows = np.meshgrid(np.arange(cells), np.arange(cells))
    place = np.einsum(
        "ij,jyx->iyx", grid.cell_to_metres(), [cols, rows, np.ones_like(cols)]
    ).astype(np.float32)
    for batch, found in batches(handover, frames, workers):
        valid = found["valid"]
        assert valid.shape == (len(batch), 1, cells, cells) and valid.dtype == torch.bool
        # The LIDAR stands 0.94 m before the ego's origin: a strip has no source. A cell of 1.6 m
        # has one somewhere.
        assert 0.9 < valid.float().mean() < 1.0 or cells == 32
        # The outermost half cell continues its centre.
        inside = valid & torch.from_numpy((np.abs(place[:2]) < 23.5).all(axis=0))
        for bev, known in zip(found["bev"], inside[:, 0], strict=True):
            assert np.abs(bev.numpy() - place[:2])[:, known].max() < 2e-3
        assert not found["bev"][~valid.expand_as(found["bev"])].any()


def test_live_and_cached_experts_of_the_other_frame_give_the_same_losses(frames, expert, tmp_path):
    live_expert, view = expert

    def compute(positions):
        found = live_expert.signals(collate([view[row] for row in positions]))
        return {name: [item.numpy() for item in found[name]] for name in SIGNALS}

    build_cache(
        out=tmp_path / "ego.zarr",
        identity=Identity(
            expert="narrow",
            tensors="seed 0",
            preprocessing={},
            mode="clean",
            dataset_version="synthetic",
            split="val",
        ),
        signals=live_expert.specs,
        keys=view.tokens,
        compute=compute,
        quiet=True,
    )
    model = models.build("bevdepth-tiny-l")
    sources = {
        "cached": CachedExpert(tmp_path / "ego.zarr"),
        "live": LiveSource(expert=live_expert, frames=view, ids={}),
    }
    grid = comparison_grid(model.grid, sources["cached"].grid)
    assert grid == replace(sources["cached"].grid, frame="lidar")
    torch.manual_seed(1)
    sizes = {"channels": 8, "grid": model.grid, "expert_channels": model.bev_channels}
    distillers = [L2(expert_grid=grid, **sizes), Heatmap(expert_grid=grid, **sizes)]
    bev = torch.randn(2, 8, *model.grid.shape)
    said = {}
    for name, source in sources.items():
        handover = Handover(source=source, frames=2, workers=0, grid=grid, live=name == "live")
        said[name] = [
            [
                value.item()
                for one in distillers
                for value in one(seen(bev[: len(b)]), found, b).values()
            ]
            for b, found in batches(handover, frames)
        ]
    np.testing.assert_allclose(said["cached"], said["live"], rtol=1e-3)
    assert min(min(row) for row in said["live"]) > 0


def test_detections_are_kept_in_the_lidar_frame(frames, expert):
    live, view = expert
    batch = collate([view[0], view[1]])
    with torch.no_grad():
        decoded = live.model.decode(live.model(batch).tasks, batch.dt)
    for row, (table, found) in enumerate(
        zip(live.signals(batch)["detections"], decoded, strict=True)
    ):
        assert found.frame == "ego" and len(found) == len(table) > 0
        frame = view.index.frame(int(view.positions[row]))
        ego, lidar = frame.pose("ego"), frame.pose("lidar")
        table, boxes = table.double().numpy(), found.boxes.double().numpy()
        world = boxes[:, :3] @ ego[:3, :3].T + ego[:3, 3]
        again = table[:, :3] @ lidar[:3, :3].T + lidar[:3, 3]
        np.testing.assert_allclose(again, world, atol=1e-3)
        turn = np.arctan2(*(np.linalg.inv(lidar) @ ego)[[1, 0], 0])
        assert np.abs(wrap_angle(table[:, YAW] - boxes[:, YAW] - turn)).max() < 1e-2
        np.testing.assert_allclose(table[:, 3:6], boxes[:, 3:6], rtol=1e-6)
        np.testing.assert_array_equal(table[:, 9], found.scores.numpy())


def test_cells_that_the_expert_did_not_see_count_nowhere(frames):
    batch = collate([frames[0], frames[1]])
    small = models.build("bevdepth-tiny-l").grid
    large = replace(small, nx=64, ny=64)
    torch.manual_seed(0)
    bev, target = torch.randn(2, 8, 32, 32), torch.randn(2, 6, 64, 64)
    valid = torch.ones(2, 1, 64, 64, dtype=torch.bool)
    valid[:, :, :, 40:] = False
    spoiled = torch.where(valid, target, torch.tensor(1e3))
    sizes = {"channels": 8, "grid": small, "expert_channels": 6, "expert_grid": large}
    for loss in (
        L2(**sizes),
        L2(compare="apprentice", **sizes),
        Heatmap(**sizes),
        Heatmap(standardise=True, **sizes),
    ):
        (clean,) = loss(seen(bev), {"bev": target, "valid": valid}, batch).values()
        (other,) = loss(seen(bev), {"bev": spoiled, "valid": valid}, batch).values()
        (whole,) = loss(seen(bev), {"bev": target}, batch).values()
        assert clean == other and clean > 0 and clean != whole
        everywhere = {"bev": target, "valid": torch.ones_like(valid)}
        (same,) = loss(seen(bev), everywhere, batch).values()
        torch.testing.assert_close(same, whole)
    torch.testing.assert_close(channel_scale(target, valid), channel_scale(target[..., :40]))


def test_maps_of_the_other_frame_need_to_know_how_the_frames_lie(frames):
    handover = Handover(
        source=WhereItLies(frames.index), frames=2, workers=0, grid=replace(EGO, frame="lidar")
    )
    blank: Batch = replace(frames[0], ego2lidar=None)
    with pytest.raises(UsageError, match="give their batches ego2lidar"):
        handover.load(blank.tokens, [blank])


def test_squares_of_another_size_are_compared_on_the_apprentices_grid():
    wide = BEVGrid.square(half_extent=60.0, cells=64, frame="ego")
    small = BEVGrid.square(half_extent=51.2, cells=64)
    assert comparison_grid(small, wide) == small
    with pytest.raises(UsageError, match="cannot be compared"):
        comparison_grid(wide, BEVGrid.square(half_extent=25.6, cells=64))
