import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fd3d.errors import UsageError
from fd3d.grid import BEVGrid

bounds = st.tuples(st.floats(-100, 99), st.floats(0.5, 100))
grids = st.builds(
    lambda x, y, nx, ny: BEVGrid(
        x_min=x[0], x_max=x[0] + x[1], y_min=y[0], y_max=y[0] + y[1], nx=nx, ny=ny
    ),
    bounds,
    bounds,
    st.integers(1, 256),
    st.integers(1, 256),
)


@given(grids)
def test_first_and_last_cells_touch_the_bounds(grid):
    to_metres = grid.cell_to_metres()
    first = to_metres @ [-0.5, -0.5, 1]
    last = to_metres @ [grid.nx - 0.5, grid.ny - 0.5, 1]
    np.testing.assert_allclose(first[:2], [grid.x_min, grid.y_min], atol=1e-9)
    np.testing.assert_allclose(last[:2], [grid.x_max, grid.y_max], atol=1e-9)


@given(grids, st.integers(0, 1000))
def test_cells_to_metres_and_back_is_the_identity(grid, seed):
    cells = np.random.default_rng(seed).uniform(-5, 300, size=(3, 4))
    cells[2] = 1
    back = grid.metres_to_cell() @ grid.cell_to_metres() @ cells
    np.testing.assert_allclose(back, cells, atol=1e-6)


@given(st.integers(1, 8), st.floats(1, 80), st.integers(1, 64))
def test_a_finer_grid_of_one_extent_splits_every_cell_evenly(factor, half, cells):
    coarse = BEVGrid.square(half_extent=half, cells=cells)
    fine = BEVGrid.square(half_extent=half, cells=cells * factor)
    assert coarse.same_extent(fine)
    # The centres of the fine cells inside coarse cell (0, 0) average to its centre.
    centres = fine.cell_to_metres() @ [(factor - 1) / 2, (factor - 1) / 2, 1]
    np.testing.assert_allclose(centres, coarse.cell_to_metres() @ [0, 0, 1], atol=1e-9)


@given(grids)
def test_a_description_gives_the_same_grid_back(grid):
    assert BEVGrid.from_dict(grid.to_dict()) == grid


def test_x_runs_along_columns_and_y_along_rows():
    grid = BEVGrid(x_min=0, x_max=10, y_min=100, y_max=140, nx=5, ny=4)
    assert grid.shape == (4, 5)
    np.testing.assert_allclose(grid.cell_to_metres() @ [4, 0, 1], [9, 105, 1])


def test_grids_in_other_frames_do_not_share_their_extent():
    lidar = BEVGrid.square(half_extent=51.2, cells=128)
    assert not lidar.same_extent(BEVGrid.square(half_extent=51.2, cells=128, frame="ego"))
    assert not lidar.same_extent(BEVGrid.square(half_extent=50.0, cells=128))


@pytest.mark.parametrize(
    "values",
    [
        {"x_min": 1, "x_max": 1, "y_min": 0, "y_max": 1, "nx": 1, "ny": 1},
        {"x_min": 0, "x_max": 1, "y_min": 0, "y_max": 1, "nx": 0, "ny": 1},
        {"x_min": 0, "x_max": 1, "y_min": 0, "y_max": 1, "nx": 1, "ny": 1, "frame": "camera"},
        {"x_min": 0, "nx": 1},
        {"x_min": 0, "x_max": 1, "y_min": 0, "y_max": 1, "nx": 1, "ny": 1, "nz": 1},
    ],
)
def test_what_is_no_grid_is_refused_in_one_sentence(values):
    with pytest.raises(UsageError) as refused:
        BEVGrid.from_dict(values)
    assert "\n" not in str(refused.value)
