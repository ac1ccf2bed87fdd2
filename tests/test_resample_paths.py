"""Every CPU path says what the reference says, and its transpose is one."""

import multiprocessing
import sys

import numpy as np
import pytest
import torch
from resample_cases import check_close, draw_case, draw_out

from fd3d.errors import UsageError
from fd3d.grid import BEVGrid
from fd3d.resample import fused, resample
from fd3d.resample.taps import resample_taps, spread_taps

needs_numba = pytest.mark.skipif(not fused.found(), reason="numba is not installed")
PATHS = [
    pytest.param(resample_taps, id="torch"),
    pytest.param(fused.resample_fused, id="numba", marks=needs_numba),
]


@pytest.mark.parametrize("fill", PATHS)
@pytest.mark.parametrize("block", range(10))
def test_five_hundred_drawn_cases_agree_with_the_reference(fill, block):
    for seed in range(50 * block, 50 * block + 50):
        case = draw_case(seed)
        out = draw_out(case, seed)
        valid = torch.zeros((len(case.map), 1, *case.plan.to_shape), dtype=torch.bool)
        fill(case.map, scale=case.scale, zero=case.zero, plan=case.plan, out=out, valid=valid)
        check_close(case, out, valid, case.reference())


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cast_is_torchs(dtype):
    for seed in range(500, 540):
        case = draw_case(seed)
        wide, narrow = draw_out(case, seed), draw_out(case, seed, dtype)
        valid = torch.zeros((len(case.map), 1, *case.plan.to_shape), dtype=torch.bool)
        arguments = {"scale": case.scale, "zero": case.zero, "plan": case.plan, "valid": valid}
        fused.resample_fused(case.map, out=wide, **arguments)
        fused.resample_fused(case.map, out=narrow, **arguments)
        torch.testing.assert_close(narrow, wide.to(dtype), rtol=0, atol=0)


@needs_numba
def test_turning_is_the_transpose_for_every_size_of_number():
    from fd3d.resample.turn import turn

    rng = np.random.default_rng(0)
    for dtype in (np.int8, np.uint8, np.uint16, np.float32):
        for shape in ((1, 1), (5, 7), (8, 16), (16, 8), (12, 20), (6, 10), (1200, 24), (24, 1200)):
            source = rng.integers(0, 100, size=shape).astype(dtype)
            out = np.empty(shape[::-1], dtype)
            turn(source, out)
            np.testing.assert_array_equal(out, source.T)


@needs_numba
@pytest.mark.parametrize("out_last", [False, True])
@pytest.mark.parametrize("in_last", [False, True])
@pytest.mark.parametrize("stored", [torch.int8, torch.float16, torch.float32])
def test_many_channels_in_blocks_agree_with_the_reference(stored, in_last, out_last):
    generator = torch.Generator().manual_seed(0)
    source = BEVGrid.square(half_extent=20, cells=16)
    target = BEVGrid.square(half_extent=20, cells=24)
    map = (torch.randn((2, 76, 16, 16), generator=generator) * 30).to(stored)
    out = torch.empty(2, 76, 24, 24)
    layouts = {False: torch.contiguous_format, True: torch.channels_last}
    map = map.contiguous(memory_format=layouts[in_last])
    out = out.contiguous(memory_format=layouts[out_last])
    arguments = {
        "from_grid": source,
        "to_grid": target,
        "matrix": [[1, 0.2, 1], [0, 1, 2], [0, 0, 1]],
    }
    arguments |= {"scale": torch.rand(2, 76), "zero": torch.randn(2, 76)}
    found, valid = resample(map, out=out, path="numba", **arguments)
    exact, mask = resample(map, path="reference", dtype=torch.float64, **arguments)
    assert torch.equal(valid, mask)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


@needs_numba
def test_values_beyond_the_type_and_missing_numbers_survive_the_cast():
    grid = BEVGrid.square(half_extent=2, cells=2)
    map = torch.tensor([1e38, float("nan"), -1e38, 1e-8]).view(1, 1, 2, 2)
    for dtype in (torch.float16, torch.bfloat16):
        found, _ = resample(map, from_grid=grid, to_grid=grid, dtype=dtype, path="numba")
        torch.testing.assert_close(found, map.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("path", ["torch", pytest.param("numba", marks=needs_numba)])
def test_a_single_large_sum_keeps_five_digits(path):
    fine = BEVGrid.square(half_extent=51.2, cells=256)
    one = BEVGrid.square(half_extent=51.2, cells=1)
    map = 100 + torch.rand(1, 3, 256, 256)
    found, _ = resample(map, from_grid=fine, to_grid=one, path=path)
    expected = map.double().mean(dim=(2, 3), keepdim=True)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("kind", ["intensity", "density"])
def test_gradients_are_those_of_the_sum(kind):
    source = BEVGrid(x_min=-4, x_max=4, y_min=-3, y_max=3, nx=5, ny=4)
    target = BEVGrid(x_min=-3, x_max=4, y_min=-3, y_max=2, nx=3, ny=2)
    matrix = [[0.9, 0.3, 0.2], [-0.2, 1.1, 0.1], [0, 0, 1]]
    map = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)

    def moved(map):
        return resample(
            map,
            from_grid=source,
            to_grid=target,
            matrix=matrix,
            kind=kind,
            scale=[0.5, 2.0],
            zero=[1.0, -1.0],
            dtype=torch.float64,
        )[0]

    assert torch.autograd.gradcheck(moved, (map,))


@pytest.mark.parametrize(
    "spread",
    [spread_taps, pytest.param(fused.spread_fused, marks=needs_numba)],
)
def test_the_transpose_moves_gradients_back_where_values_came_from(spread):
    """<A x, y> = <x, A' y> for the linear part A of every drawn case."""
    for seed in range(600, 680):
        case = draw_case(seed)
        if not case.map.numel():
            continue
        map = case.map.double()
        forward = resample_taps
        out = torch.empty((*map.shape[:2], *case.plan.to_shape), dtype=torch.float64)
        valid = torch.empty((len(map), 1, *case.plan.to_shape), dtype=torch.bool)
        forward(map, scale=case.scale, zero=0 * case.zero, plan=case.plan, out=out, valid=valid)
        other = torch.randn(out.shape)
        back = spread(other, scale=case.scale, plan=case.plan)
        assert back.shape == map.shape
        left, right = (out * other).sum(), (map * back).sum()
        size = (out.abs() * other.abs()).sum() + 1e-12
        assert abs(float((left - right) / size)) < 1e-5


def test_a_map_in_training_gets_its_gradient_in_its_own_type():
    grid, target = BEVGrid.square(half_extent=8, cells=8), BEVGrid.square(half_extent=8, cells=4)
    for dtype in (torch.float16, torch.float32):
        map = torch.randn(2, 3, 8, 8).to(dtype).requires_grad_()
        found, valid = resample(map, from_grid=grid, to_grid=target)
        found.sum().backward()
        assert map.grad.dtype == dtype and not valid.requires_grad
        torch.testing.assert_close(map.grad, torch.full_like(map, 0.25))


def _moved_sum(seed):
    case = draw_case(seed)
    out = torch.empty((*case.map.shape[:2], *case.plan.to_shape))
    valid = torch.empty((len(case.map), 1, *case.plan.to_shape), dtype=torch.bool)
    fused.resample_fused(
        case.map, scale=case.scale, zero=case.zero, plan=case.plan, out=out, valid=valid
    )
    return float(out.double().sum())


@needs_numba
@pytest.mark.skipif(sys.platform != "linux", reason="fork is the loader's default on Linux")
def test_forked_workers_get_the_same_after_the_parent_has_run():
    seeds = list(range(700, 708))
    here = [_moved_sum(seed) for seed in seeds]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        there = pool.map_async(_moved_sum, seeds).get(timeout=60)
    assert here == there


def test_an_absent_path_is_told_in_one_sentence(monkeypatch):
    grid = BEVGrid.square(half_extent=8, cells=8)
    monkeypatch.setattr(fused, "found", lambda: False)
    with pytest.raises(UsageError, match="numba: pip install"):
        resample(torch.zeros(1, 1, 8, 8), from_grid=grid, to_grid=grid, path="numba")
    # Without being asked for, it is simply not taken.
    found, _ = resample(torch.ones(1, 1, 8, 8), from_grid=grid, to_grid=grid)
    assert found.eq(1).all()
