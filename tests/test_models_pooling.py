import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.pooling import cells_of, point_table, pool, pool_reference

GRID = BEVGrid.square(half_extent=8.0, cells=16)
HEIGHTS = (-10.0, 10.0)


@pytest.fixture
def case():
    torch.manual_seed(0)
    batch, cameras, bins, height, width, channels = 2, 3, 5, 4, 6, 7
    points = torch.randn(batch, cameras, bins, height, width, 3) * 8
    depth = torch.randn(batch * cameras, bins, height, width, dtype=torch.float32).softmax(1)
    context = torch.randn(batch * cameras, channels, height, width)
    return points, depth.requires_grad_(), context.requires_grad_()


def test_fast_sums_and_gradients_equal_the_reference(case):
    points, depth, context = case
    cells = cells_of(points, GRID, HEIGHTS)
    assert 0.1 < (cells >= 0).float().mean() < 0.9
    fast = pool(depth, context, point_table(cells, GRID))
    plain = pool_reference(depth, context, cells, GRID)
    assert fast.shape == (2, 7, 16, 16)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(plain)
    for found, expected in zip(
        torch.autograd.grad((fast * weights).sum(), (depth, context)),
        torch.autograd.grad((plain * weights).sum(), (depth, context)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_batches_do_not_mix(case):
    points, depth, context = case
    both = pool(depth, context, point_table(cells_of(points, GRID, HEIGHTS), GRID))
    alone = pool(depth[3:], context[3:], point_table(cells_of(points[1:], GRID, HEIGHTS), GRID))
    torch.testing.assert_close(both[1:], alone)


def test_nothing_inside_gives_zeros(case):
    points, depth, context = case
    bev = pool(depth, context, point_table(cells_of(points.abs() + 9, GRID, HEIGHTS), GRID))
    assert bev.shape == (2, 7, 16, 16) and not bev.any()


def test_row_is_y_column_is_x_and_truncation_widens_the_lower_border():
    points = torch.tensor(
        [
            [-7.9, 7.9, 0.0],  # upper left: last row, first column
            [-8.9, -8.9, 0.0],  # less than one cell below both lower bounds
            [-9.1, 0.0, 0.0],
            [8.0, 0.0, 0.0],
            [0.5, 0.5, 10.0],
            [0.5, 0.5, -29.0],
            [0.5, 0.5, -30.5],
        ]
    ).view(1, -1, 3)
    assert cells_of(points, GRID, HEIGHTS).tolist() == [[15 * 16, 0, -1, -1, -1, 8 * 16 + 8, -1]]


class Largest(TorchDispatchMode):
    """Remembers the most elements that any tensor made inside it has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple) else (out,):
            if isinstance(item, torch.Tensor):
                self.elements = max(self.elements, item.numel())
        return out


def test_no_feature_per_point_is_ever_made():
    torch.manual_seed(0)
    points = torch.rand(1, 6, 40, 8, 22, 3) * 16 - 8
    depth = torch.rand(6, 40, 8, 22, requires_grad=True)
    context = torch.randn(6, 32, 8, 22, requires_grad=True)
    cells = cells_of(points, GRID, HEIGHTS)
    count = cells.numel()
    with Largest() as naive:
        pool_reference(depth, context, cells, GRID).sum().backward()
    with Largest() as table:
        pool(depth, context, point_table(cells, GRID)).sum().backward()
    assert naive.elements >= 32 * count and table.elements <= 2 * count
