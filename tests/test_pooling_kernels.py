"""The CUDA text of splatting without a GPU: it compiles, and run on the CPU it says what the
reference says. With a GPU and CuPy the same cases run there."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_text import OnCPU, find_nvrtc

from fd3d import cuda
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth import pooling_cuda
from fd3d.models.bevdepth.pooling import cells_of, point_table, pool, pool_reference

KERNELS = ("pool_sum", "pool_context_grad", "pool_depth_grad")
TEXT = Path(pooling_cuda.__file__).with_name("pooling.cu")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> OnCPU:
    return OnCPU(tmp_path_factory.mktemp("pooling"), TEXT, KERNELS)


def draw(seed):
    """Cells, depth, context and the gradient of the sums; some maps have nothing inside."""
    generator = torch.Generator().manual_seed(seed)

    def draw_size(highest):
        return int(torch.randint(1, highest + 1, (), generator=generator))

    batch, cameras, bins = draw_size(3), draw_size(3), draw_size(7)
    height, width, channels = draw_size(5), draw_size(6), draw_size(40)
    grid = BEVGrid.square(half_extent=8.0, cells=draw_size(9))
    spread = (2.0, 8.0, 40.0)[seed % 3]
    places = torch.randn(batch, cameras, bins, height, width, 3, generator=generator) * spread
    if seed % 10 == 9:
        places = places.abs() + 9
    cells = cells_of(places, grid, (-10.0, 10.0))
    depth = torch.rand(batch * cameras, bins, height, width, generator=generator)
    context = torch.randn(batch * cameras, channels, height, width, generator=generator)
    grad = torch.randn(batch, channels, grid.ny, grid.nx, generator=generator)
    return grid, cells, depth, context, grad


def expected(grid, cells, depth, context, grad):
    depth, context = depth.requires_grad_(), context.requires_grad_()
    sums = pool_reference(depth, context, cells, grid)
    return sums.detach(), *torch.autograd.grad((sums * grad).sum(), (depth, context))


def test_the_kernels_on_the_cpu_agree_with_the_reference(on_cpu):
    for seed in range(200):
        grid, cells, depth, context, grad = draw(seed)
        wanted = expected(grid, cells, depth, context, grad)
        depth, rows = depth.detach(), context.detach().permute(0, 2, 3, 1).contiguous()
        table = replace(point_table(cells, grid), cells=cells.flatten().int())
        # What a kernel leaves out must show.
        sums = torch.full((len(table.starts) - 1, rows.shape[-1]), float("nan"))
        of_depth, of_rows = (torch.full_like(one, float("nan")) for one in (depth, rows))
        flat = grad.permute(0, 2, 3, 1).reshape(sums.shape).contiguous()
        for name, result, args in (
            ("pool_sum", sums, pooling_cuda.sum_args(depth, rows, table, sums)),
            (
                "pool_depth_grad",
                of_depth,
                pooling_cuda.depth_grad_args(rows, table, flat, of_depth),
            ),
            (
                "pool_context_grad",
                of_rows,
                pooling_cuda.context_grad_args(depth, table, flat, of_rows),
            ),
        ):
            on_cpu.run(name, pooling_cuda.OPTIONS, pooling_cuda.blocks(result.numel()), args)
        sums = sums.view(*table.shape, -1).permute(0, 3, 1, 2)
        for found, right in zip((sums, of_depth, of_rows.permute(0, 3, 1, 2)), wanted, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90", "sm_100"])
def test_the_kernels_compile_for(architecture):
    options = [*pooling_cuda.OPTIONS, f"--gpu-architecture={architecture}"]
    made = find_nvrtc().compile(pooling_cuda.source(), options)
    assert made[:4] == b"\x7fELF" and all(name.encode() in made for name in KERNELS)


@pytest.mark.gpu
@pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))
def test_the_gpu_agrees_with_the_reference():
    for seed in range(200):
        grid, cells, depth, context, grad = draw(seed)
        wanted = expected(grid, cells, depth, context, grad)
        depth, context = (one.detach().cuda().requires_grad_() for one in (depth, context))
        sums = pool(depth, context, point_table(cells.cuda(), grid))
        found = (sums, *torch.autograd.grad((sums * grad.cuda()).sum(), (depth, context)))
        for one, right in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.detach().cpu(), right, rtol=1e-5, atol=1e-5)
