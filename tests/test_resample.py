"""What resampling means: held against torch's own operations, by hand, and by conservation."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from fd3d.augment import BEVAugmentation
from fd3d.distill.align import to_grid as align_to_grid
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid
from fd3d.resample import PixelGrid, resample

FINE = BEVGrid.square(half_extent=51.2, cells=32)
COARSE = BEVGrid.square(half_extent=51.2, cells=16)
EGO = BEVGrid.square(half_extent=51.2, cells=16, frame="ego")


def a_map(grid=FINE, *, frames=2, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((frames, channels, *grid.shape), generator=generator)


def exact(map, **arguments):
    return resample(map, path="reference", dtype=torch.float64, **arguments)


def test_a_map_on_its_own_grid_is_dequantised_and_nothing_else():
    stored = torch.randint(-128, 128, (2, 3, 32, 32), dtype=torch.int8)
    scale, zero = torch.rand(2, 3), torch.randn(2, 3)
    found, valid = resample(stored, scale=scale, zero=zero, from_grid=FINE, to_grid=FINE)
    expected = zero[:, :, None, None] + scale[:, :, None, None] * stored
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    assert valid.all() and valid.shape == (2, 1, 32, 32)


@pytest.mark.parametrize("cells", [32, 16, 8, 4, 1, 64, 96, 33])
def test_one_extent_is_the_area_mean_or_torchs_bilinear(cells):
    map = a_map().double()
    target = BEVGrid.square(half_extent=51.2, cells=cells)
    found, valid = exact(map, from_grid=FINE, to_grid=target)
    torch.testing.assert_close(found, align_to_grid(map, target.shape), rtol=1e-9, atol=1e-7)
    assert valid.all()


def test_shrinking_under_a_rotation_is_grid_sample_and_then_the_mean():
    map = a_map().double()
    matrix = BEVAugmentation(rotate=0.3, scale=1.05, flip_x=True).matrix()
    found, valid = exact(map, from_grid=FINE, to_grid=COARSE, matrix=matrix)
    # On a centred square torch's coordinates are metres / half extent.
    theta = torch.from_numpy(np.linalg.inv(matrix)[:2, [0, 1, 3]]).expand(2, 2, 3)
    where = functional.affine_grid(theta, map.shape, align_corners=False)
    moved = functional.grid_sample(map, where, align_corners=False)
    expected = functional.avg_pool2d(moved, 2)
    outside = (where.abs() > 1 - 1 / 32).any(dim=-1)[:, None].double()
    whole = functional.max_pool2d(outside, 2) == 0
    assert whole.double().mean() > 0.5
    torch.testing.assert_close(
        torch.where(whole, found, 0.0), torch.where(whole, expected, 0.0), rtol=1e-6, atol=1e-6
    )
    assert valid[whole].all()


def test_the_matrix_takes_points_of_the_source_to_the_target():
    # Forward in the lidar frame is +y, in the ego frame +x: a quarter turn, and 1 m further on.
    lidar_to_ego = np.eye(4)
    lidar_to_ego[:2] = [[0, 1, 0, 0.8], [-1, 0, 0, 0]]
    map = torch.zeros(1, 1, 32, 32)
    source = FINE.metres_to_cell() @ [4.8, 24.0, 1]
    map[0, 0, round(source[1]), round(source[0])] = 1.0
    found, _ = exact(map, from_grid=FINE, to_grid=EGO, matrix=lidar_to_ego)
    row, col = divmod(int(found[0, 0].argmax()), 16)
    x, y, _ = EGO.cell_to_metres() @ [col, row, 1]
    assert abs(x - 24.8) <= EGO.cell_x and abs(y + 4.8) <= EGO.cell_y


def test_what_is_counted_is_neither_gained_nor_lost():
    # Smooth, as a sum over positions can only be exact for what it resolves.
    x, y = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="xy")
    map = torch.exp(-(((x - 0.1) / 0.2) ** 2) - ((y + 0.1) / 0.3) ** 2)[None, None]
    for target in (FINE, COARSE, BEVGrid.square(half_extent=60, cells=50)):
        for scale in (0.7, 1.0, 1.3):
            matrix = BEVAugmentation(rotate=0.4, scale=scale, flip_y=True).matrix()
            found, _ = exact(map, from_grid=FINE, to_grid=target, matrix=matrix, kind="density")
            assert float(found.sum()) == pytest.approx(float(map.sum()), rel=0.002)
    # Without a move the sum of four cells is exact.
    found, _ = exact(map, from_grid=FINE, to_grid=COARSE, kind="density")
    torch.testing.assert_close(found, functional.avg_pool2d(map, 2).double() * 4)


def test_a_constant_stays_constant_wherever_there_is_a_source():
    map = torch.full((1, 2, 32, 32), 3.0)
    shifted = np.eye(3)
    shifted[:2, 2] = [20.0, -13.0]
    found, valid = exact(map, from_grid=FINE, to_grid=COARSE, matrix=shifted)
    assert 0 < valid.double().mean() < 1
    torch.testing.assert_close(found, 3.0 * valid.double().expand_as(found))
    # The target's cells are 6.4 m wide and read at two parts, 1.6 m beside their centres.
    centres = COARSE.cell_to_metres()[0] @ np.stack([np.arange(16), np.arange(16), np.ones(16)])
    columns, rows = centres + 1.6 >= -51.2 + 20, centres - 1.6 <= 51.2 - 13
    np.testing.assert_array_equal(valid[0, 0].numpy(), rows[:, None] & columns[None, :])


def test_a_zero_offset_does_not_leak_to_where_nothing_is():
    stored = torch.zeros(1, 1, 32, 32, dtype=torch.int8)
    away = np.eye(3)
    away[0, 2] = 500.0
    found, valid = resample(stored, zero=[5.0], from_grid=FINE, to_grid=COARSE, matrix=away)
    assert not valid.any() and not found.any()


def test_flips_of_image_maps_are_exact():
    grid = PixelGrid(width=88, height=32, nx=11, ny=4)
    map = torch.randn(1, 3, 4, 11)
    flip = [[-1, 0, 88], [0, 1, 0], [0, 0, 1]]
    found, valid = resample(map, from_grid=grid, to_grid=grid, matrix=flip)
    torch.testing.assert_close(found, map.flip(-1))
    assert valid.all()
    # A crop of the lower half, doubled: apprentice image = expert image at twice the size.
    crop = [[2, 0, 0], [0, 2, -32], [0, 0, 1]]
    target = PixelGrid(width=176, height=32, nx=22, ny=4)
    found, _ = resample(map, from_grid=grid, to_grid=target, matrix=crop)
    whole = functional.interpolate(map, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, whole[:, :, 4:], rtol=1e-5, atol=1e-6)


def test_every_frame_has_its_own_matrix():
    map = a_map(frames=3)
    matrices = np.stack([BEVAugmentation(rotate=r).matrix() for r in (0.0, 0.2, -1.0)])
    together, mask = resample(map, from_grid=FINE, to_grid=COARSE, matrix=matrices)
    for frame in range(3):
        alone, alone_mask = resample(
            map[frame : frame + 1], from_grid=FINE, to_grid=COARSE, matrix=matrices[frame]
        )
        torch.testing.assert_close(together[frame : frame + 1], alone)
        assert torch.equal(mask[frame : frame + 1], alone_mask)


def test_the_result_keeps_the_layout_of_the_map_unless_told():
    map = a_map()
    last = map.contiguous(memory_format=torch.channels_last)
    planar, _ = resample(map, from_grid=FINE, to_grid=COARSE)
    rows, _ = resample(last, from_grid=FINE, to_grid=COARSE, dtype=torch.float16)
    assert planar.is_contiguous() and planar.dtype == torch.float32
    assert rows.is_contiguous(memory_format=torch.channels_last) and rows.dtype == torch.float16
    out = torch.empty(2, 3, 16, 16, dtype=torch.bfloat16)
    found, _ = resample(last, from_grid=FINE, to_grid=COARSE, out=out)
    assert found is out
    torch.testing.assert_close(out.float(), planar, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"to_grid": EGO}, "matrix"),
        ({"from_grid": COARSE}, "the map was made on"),
        ({"kind": "sum"}, "intensity"),
        ({"path": "fast"}, "reference"),
        ({"matrix": np.zeros((3, 3))}, "last row"),
        ({"matrix": np.diag([1.0, 0.0, 1.0])}, "singular"),
        ({"matrix": np.diag([np.nan, 1.0, 1.0])}, "finite"),
        ({"matrix": np.eye(2)}, "shape"),
        ({"matrix": np.stack([np.eye(3)] * 3)}, "for 2 frames"),
        ({"matrix": np.diag([1e-5, 1.0, 1.0])}, "in metres"),
        ({"scale": torch.ones(4)}, "channel"),
        ({"zero": torch.ones(2, 3, 1)}, "channel"),
        ({"out": torch.empty(2, 3, 8, 8)}, "out="),
        ({"out": torch.empty(2, 3, 16, 16, dtype=torch.int8)}, "out="),
        ({"map": torch.zeros(2, 3, 32, 32, dtype=torch.int32)}, "int8"),
        ({"map": torch.zeros(3, 32, 32)}, "B, C, Y, X"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(changes, hint):
    arguments = {"map": a_map(), "from_grid": FINE, "to_grid": COARSE, **changes}
    with pytest.raises(UsageError, match=hint) as refused:
        resample(arguments.pop("map"), **arguments)
    assert "\n" not in str(refused.value)


def test_a_filled_out_and_a_gradient_exclude_each_other():
    map = a_map().requires_grad_()
    with pytest.raises(UsageError, match="out="):
        resample(map, from_grid=FINE, to_grid=COARSE, out=torch.empty(2, 3, 16, 16))
