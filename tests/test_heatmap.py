import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fd3d.grid import BEVGrid
from fd3d.heatmap import box_heatmap, box_radii

GRID = BEVGrid.square(half_extent=51.2, cells=64)
WIDE = BEVGrid(x_min=-20, x_max=60, y_min=-10, y_max=30, nx=40, ny=25)


def plain_radius(height, width, overlap=0.1):
    b1, c1 = height + width, width * height * (1 - overlap) / (1 + overlap)
    b2, c2 = 2 * (height + width), (1 - overlap) * width * height
    b3, c3 = -2 * overlap * (height + width), (overlap - 1) * width * height
    return min(
        (b1 + math.sqrt(b1**2 - 4 * c1)) / 2,
        (b2 + math.sqrt(b2**2 - 16 * c2)) / 2,
        (b3 + math.sqrt(b3**2 - 16 * overlap * c3)) / 2,
    )


def plain_heatmap(boxes, labels, grid, classes):
    """Cell by cell, straight from the definition."""
    heat = np.zeros((classes, grid.ny, grid.nx))
    for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
        col, row = (box[0] - grid.x_min) / grid.cell_x, (box[1] - grid.y_min) / grid.cell_y
        col, row = int(col), int(row)
        if not (0 <= col < grid.nx and 0 <= row < grid.ny):
            continue
        radius = max(2, int(plain_radius(box[4] / grid.cell_y, box[3] / grid.cell_x)))
        sigma = (2 * radius + 1) / 6
        for y in range(max(0, row - radius), min(grid.ny, row + radius + 1)):
            for x in range(max(0, col - radius), min(grid.nx, col + radius + 1)):
                value = math.exp(-((x - col) ** 2 + (y - row) ** 2) / (2 * sigma**2))
                heat[label, y, x] = max(heat[label, y, x], value)
    return heat


def some_boxes(count, seed, low, high):
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(low, high, (count, 9))
    boxes[:, 3:6] = rng.uniform(0.3, 14, (count, 3))
    return torch.from_numpy(boxes.astype(np.float32)), torch.from_numpy(rng.integers(0, 4, count))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 12), wide=st.booleans())
def test_equals_the_plain_loop(seed, count, wide):
    grid = WIDE if wide else GRID
    # Keep clear of negative cell numbers above -1, which truncation would bring inside.
    low, high = (-9.9, 70) if wide else (-51, 60)
    boxes, labels = some_boxes(count, seed, low, high)
    heat = box_heatmap(boxes, labels, grid=grid, classes=4)
    np.testing.assert_allclose(heat, plain_heatmap(boxes, labels, grid, 4), atol=1e-6)


def test_no_boxes_give_zeros():
    heat = box_heatmap(torch.zeros(0, 9), torch.zeros(0, dtype=torch.long), grid=GRID, classes=3)
    assert heat.shape == (3, 64, 64) and not heat.any()


def test_peaks_are_one_where_the_centres_are_and_labels_choose_the_map():
    boxes = torch.zeros(3, 9)
    boxes[:, 3:6] = 2.0
    boxes[1, :2] = torch.tensor([10.0, -20.0])
    boxes[2, :2] = torch.tensor([30.0, 30.0])
    heat = box_heatmap(boxes, torch.tensor([0, 1, 7]), grid=GRID, classes=2)
    assert (heat == 1).sum() == 2
    assert heat[0, 32, 32] == 1 and heat[1, int(31.2 / 1.6), int(61.2 / 1.6)] == 1


def test_radius_is_at_least_two_cells_and_grows_with_the_box():
    boxes = torch.ones(2, 9)
    boxes[1, 3:5] = 30.0
    small, large = box_radii(boxes, GRID).tolist()
    assert small == 2 and large == int(plain_radius(30 / 1.6, 30 / 1.6))
    assert large == pytest.approx(8, abs=1)
