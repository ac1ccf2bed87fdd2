"""Resampling in torch alone, on any device: weighted sums of source cells, and their transpose.

The sums are `embedding_bag`s over channels-last rows, which torch has a vectorised kernel for.
This is what runs where neither numba nor CuPy is installed, and what gradients are checked with.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from fd3d.resample.geometry import ONE, Plan

# Longer sums are made in two steps, or float32 would lose the fifth digit.
_LONGEST_SUM = 64


def frame_taps(
    plan: Plan, frame: int, *, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Which source cells make the target cells of one frame.

    Returns index (Y * X, sy, 4 * sx) int64 into the source's cells row by row, weight alike in
    `dtype`, valid (Y * X,) bool.
    """
    high, wide = plan.from_shape
    ax, bx, cx, ay, by, cy, sx, sy = (int(step) for step in plan.steps[frame])
    rows = torch.arange(plan.to_shape[0] * sy, device=device)
    cols = torch.arange(plan.to_shape[1] * sx, device=device)
    # (Y, X, sy, sx): the parts of a cell lie together.
    rows = rows.view(plan.to_shape[0], 1, sy, 1)
    cols = cols.view(1, plan.to_shape[1], 1, sx)
    column = ax * cols + bx * rows + cx
    row = ay * cols + by * rows + cy
    half = ONE // 2
    inside = (column >= -half) & (column <= wide * ONE - half)
    inside &= (row >= -half) & (row <= high * ONE - half)
    left, top = column // ONE, row // ONE
    right_share = (column - left * ONE).to(dtype) / ONE
    bottom_share = (row - top * ONE).to(dtype) / ONE

    found = inside.sum(dim=(2, 3), keepdim=True)
    if plan.density:
        share = inside.to(dtype) * (float(plan.gain[frame]) / (sx * sy))
    else:
        share = inside.to(dtype) / found.clamp(min=1)
    index, weight = [], []
    for down in (0, 1):
        at_row = (top + down).clamp(0, high - 1) * wide
        row_share = share * (bottom_share if down else 1 - bottom_share)
        for across in (0, 1):
            index.append(at_row + (left + across).clamp(0, wide - 1))
            weight.append(row_share * (right_share if across else 1 - right_share))
    cells = plan.to_shape[0] * plan.to_shape[1]
    return (
        torch.stack(index, dim=-1).view(cells, sy, 4 * sx),
        torch.stack(weight, dim=-1).view(cells, sy, 4 * sx),
        (found > 0).view(cells),
    )


def resample_taps(
    stored: Tensor, *, scale: Tensor, zero: Tensor, plan: Plan, out: Tensor, valid: Tensor
) -> None:
    """Fill `out` (B, C, Y, X), any float dtype and strides, and `valid` (B, 1, Y, X) bool.

    Args:
        stored: (B, C, *plan.from_shape), any dtype; float64 is summed in float64.
        scale, zero: (B, C), value = zero + scale * stored.
        plan: from `make_plan`.
    """
    dtype = torch.float64 if stored.dtype == torch.float64 else torch.float32
    channels = stored.shape[1]
    for frame, (index, weight, has_source) in _all_taps(plan, stored.device, dtype):
        # Turned before it is widened, and in fact: a view of a planar map would be read slowly.
        table = stored[frame].permute(1, 2, 0).reshape(-1, channels).contiguous().to(dtype)
        total = _weighted_sums(index, weight, table)
        total *= scale[frame].to(dtype)
        # The weights of a cell sum to 1 or, at the edge of a density, to less.
        whole = weight.sum(dim=(1, 2)).unsqueeze(1)
        total = torch.addcmul(total, whole, zero[frame].to(dtype).unsqueeze(0))
        out[frame].copy_(total.t().reshape(out.shape[1:]))
        valid[frame, 0].copy_(has_source.view(plan.to_shape))


def spread_taps(grad: Tensor, *, scale: Tensor, plan: Plan) -> Tensor:
    """The transpose: (B, C, *plan.to_shape) gradients to (B, C, *plan.from_shape).

    float64 stays float64, all else becomes float32.
    """
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    frames, channels = grad.shape[:2]
    high, wide = plan.from_shape
    result = torch.zeros((frames, high * wide, channels), dtype=dtype, device=grad.device)
    for frame, (index, weight, _) in _all_taps(plan, grad.device, dtype):
        rows = grad[frame].permute(1, 2, 0).reshape(-1, channels).to(dtype)
        rows = rows * scale[frame].to(dtype)
        for tap_index, tap_weight in zip(
            index.flatten(1).unbind(1), weight.flatten(1).unbind(1), strict=True
        ):
            result[frame].index_add_(0, tap_index, rows * tap_weight.unsqueeze(1))
    return result.view(frames, high, wide, channels).permute(0, 3, 1, 2)


def _weighted_sums(index: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    cells, sy, taps = index.shape
    bags = cells if sy * taps <= _LONGEST_SUM else cells * sy
    found = functional.embedding_bag(
        index.reshape(bags, -1), table, mode="sum", per_sample_weights=weight.reshape(bags, -1)
    )
    return found if bags == cells else found.view(cells, sy, -1).sum(dim=1)


def _all_taps(plan: Plan, device: torch.device, dtype: torch.dtype) -> Iterator:
    taps = None
    for frame in range(len(plan)):
        # Frames of an un-augmented batch share their positions.
        if taps is None or not plan.same(frame, frame - 1):
            taps = frame_taps(plan, frame, device=device, dtype=dtype)
        yield frame, taps
