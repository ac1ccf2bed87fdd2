"""Alignment and the distillation losses, against few-line references."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_maps import CAR, FAR, LARGE, SMALL, batch_with, maps, seen

from fd3d.distill.align import Upsample, check_grids, comparison_grid, to_grid
from fd3d.distill.areas import object_gaussians
from fd3d.distill.losses.heatmap import Heatmap
from fd3d.distill.losses.l2 import L2
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid


def test_growing_and_shrinking_keep_a_linear_ramp_where_it_lies():
    """A map that holds its own cell-centre x must still do so on the other grid."""
    for source, target in ((SMALL, LARGE), (LARGE, SMALL)):
        x = np.arange(source.nx) * source.cell_x + source.x_min + source.cell_x / 2
        ramp = torch.tensor(x).expand(1, 1, *source.shape)
        moved = to_grid(ramp, target.shape)[0, 0, 3].numpy()
        expected = np.arange(target.nx) * target.cell_x + target.x_min + target.cell_x / 2
        # The outermost cells of the finer grid have no neighbour to interpolate with.
        np.testing.assert_allclose(moved[1:-1], expected[1:-1], atol=1e-9)


def test_grids_that_do_not_nest_are_refused_in_one_sentence():
    odd = BEVGrid.square(half_extent=51.2, cells=24)
    ego = BEVGrid.square(half_extent=51.2, cells=32, frame="ego")
    wide = BEVGrid.square(half_extent=60.0, cells=32)
    for expert in (odd, ego, wide):
        with pytest.raises(UsageError, match="cannot be compared"):
            check_grids(SMALL, expert)
        grid = comparison_grid(SMALL, expert)
        # The ego frame's nests in the other frame; the others are brought to the apprentice's.
        assert grid == (replace(ego, frame="lidar") if expert is ego else SMALL)
    assert check_grids(SMALL, LARGE) == 2
    assert check_grids(SMALL, SMALL) == 1
    with pytest.raises(UsageError, match="covers 25% of its ground"):
        comparison_grid(SMALL, BEVGrid.square(half_extent=25.6, cells=64))


@pytest.mark.parametrize("compare", ["expert", "apprentice"])
def test_l2_is_the_mean_over_everything_in_channel_deviations(compare):
    torch.manual_seed(0)
    loss = L2(channels=4, grid=SMALL, expert_channels=6, expert_grid=LARGE, compare=compare)
    apprentice, expert = maps(2)
    value = loss(seen(apprentice), expert, batch_with([[], []]))["l2"]
    student = loss.align.conv(apprentice)
    target = expert["bev"]
    if compare == "expert":
        student = torch.nn.functional.interpolate(student, scale_factor=2, mode="bilinear")
    else:
        target = torch.nn.functional.avg_pool2d(target, 2)
    deviation = target.permute(1, 0, 2, 3).reshape(6, -1).std(dim=1).reshape(1, 6, 1, 1)
    reference = ((student - target) / deviation).square().mean()
    assert value.item() == pytest.approx(reference.item(), rel=1e-5)


def test_l2_does_not_depend_on_the_scale_of_the_expert():
    """A solution for the expert is one for the expert times ten: same loss, scaled adaptor."""
    torch.manual_seed(0)
    loss = L2(channels=4, grid=SMALL, expert_channels=6, expert_grid=LARGE)
    apprentice, expert = maps(1)
    before = float(loss(seen(apprentice), expert, batch_with([[]]))["l2"])
    with torch.no_grad():
        loss.align.conv.weight *= 10
        loss.align.conv.bias *= 10
    after = float(loss(seen(apprentice), {"bev": expert["bev"] * 10}, batch_with([[]]))["l2"])
    assert after == pytest.approx(before, rel=1e-4)


def test_heatmap_is_the_released_formula():
    torch.manual_seed(0)
    loss = Heatmap(channels=4, grid=SMALL, expert_channels=6, expert_grid=LARGE).eval()
    apprentice, expert = maps(2)
    batch = batch_with([[CAR], [CAR, FAR]])
    value = loss(seen(apprentice), expert, batch)["heatmap"]
    mask = object_gaussians(batch, loss.grid)
    aligned = loss.align(apprentice)
    reference = ((aligned - expert["bev"]) ** 2 * mask**2).sum() / mask.sum()
    assert value.item() == pytest.approx(reference.item(), rel=1e-5)
    # The peak lies in the car's own cell, row = y.
    row, col = divmod(int(mask[0, 0].argmax()), LARGE.nx)
    assert (row, col) == (int((12.0 + 51.2) / 3.2), int((8.0 + 51.2) / 3.2))


def test_heatmap_without_boxes_is_zero_and_still_in_the_graph():
    loss = Heatmap(channels=4, grid=SMALL, expert_channels=6, expert_grid=LARGE)
    apprentice, expert = maps(2)
    value = loss(seen(apprentice), expert, batch_with([[], [FAR]]))["heatmap"]
    value.backward()
    assert float(value) == 0.0
    assert apprentice.grad is not None and torch.isfinite(apprentice.grad).all()


def test_gradient_reaches_the_apprentice_and_the_adaptor_but_not_the_expert():
    for distiller in (L2, Heatmap):
        loss = distiller(channels=4, grid=SMALL, expert_channels=6, expert_grid=LARGE)
        apprentice, expert = maps(2)
        expert["bev"].requires_grad_()
        (value,) = loss(seen(apprentice), expert, batch_with([[CAR], [CAR]])).values()
        value.backward()
        assert float(apprentice.grad.abs().sum()) > 0
        assert all(float(p.grad.abs().sum()) > 0 for p in loss.parameters() if p.dim() > 1)
        assert expert["bev"].grad is None


def test_upsampling_refuses_ratios_that_are_no_power_of_two():
    with pytest.raises(UsageError, match="ratio"):
        Upsample(channels=4, expert_channels=4, ratio=3)
    assert Upsample(channels=4, expert_channels=6, ratio=4)(torch.zeros(1, 4, 8, 8)).shape == (
        1,
        6,
        32,
        32,
    )
