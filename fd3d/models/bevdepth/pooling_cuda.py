"""The CuPy path of splatting: `pooling.cu` on torch's tensors. Not yet run on a GPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fd3d import cuda

if TYPE_CHECKING:
    from fd3d.models.bevdepth.pooling import PointTable

THREADS = 256
OPTIONS = ("-std=c++17",)


@cache
def source() -> str:
    """The CUDA C++ text."""
    return Path(__file__).with_name("pooling.cu").read_text()


def blocks(tasks: int) -> tuple[int, int]:
    """Blocks for so many threads."""
    return -(-tasks // THREADS), 1


def sum_args(depth: Tensor, rows: Tensor, table: PointTable, sums: Tensor) -> list:
    """The arguments of kernel `pool_sum`, in order; `sums` (cells, C) takes the result."""
    return [depth, rows, table.points, table.pixels, table.starts, sums, *sums.shape]


def context_grad_args(depth: Tensor, table: PointTable, grad: Tensor, result: Tensor) -> list:
    """The arguments of kernel `pool_context_grad`; `result` (P, h, w, C) takes the result."""
    return [depth, table.cells, grad, result, *_sizes(depth, grad)]


def depth_grad_args(rows: Tensor, table: PointTable, grad: Tensor, result: Tensor) -> list:
    """The arguments of kernel `pool_depth_grad`; `result` (P, D, h, w) takes the result."""
    return [rows, table.cells, grad, result, *_sizes(result, grad)]


def pool_cupy(depth: Tensor, rows: Tensor, table: PointTable) -> Tensor:
    """(cells, C) sums on a CUDA device, with gradients.

    Args:
        depth: (P, D, h, w) float32 probabilities.
        rows: (P, h, w, C) float32 context.
        table: with its `cells`.
    """
    return _Pooled.apply(depth.contiguous(), rows.contiguous(), table)


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, depth, rows, table):
        sums = rows.new_empty(len(table.starts) - 1, rows.shape[-1])
        _launch("pool_sum", sums.numel(), sum_args(depth, rows, table, sums))
        ctx.save_for_backward(depth, rows)
        ctx.table = table
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (depth, rows), grad = ctx.saved_tensors, grad.contiguous()
        of_depth, of_rows = torch.empty_like(depth), torch.empty_like(rows)
        args = depth_grad_args(rows, ctx.table, grad, of_depth)
        _launch("pool_depth_grad", of_depth.numel(), args)
        args = context_grad_args(depth, ctx.table, grad, of_rows)
        _launch("pool_context_grad", of_rows.numel(), args)
        return of_depth, of_rows, None


def _sizes(depth: Tensor, grad: Tensor) -> tuple[int, int, int, int]:
    cameras, bins, height, width = depth.shape
    return cameras, bins, height * width, grad.shape[1]


def _launch(name: str, tasks: int, args: list) -> None:
    if tasks:
        cuda.launch(
            cuda.compile_kernel(source(), name, OPTIONS),
            blocks=blocks(tasks),
            threads=THREADS,
            device=args[0].device,
            args=args,
        )
