"""The CPU path: dequantisation, move, resampling and cast in one pass over each frame.

Needs numba (`pip install 'fd3d[fast]'`). It runs in the calling thread and releases the GIL:
loader workers are the parallelism, and a thread pool here would not survive their fork.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from torch import Tensor

from fd3d.errors import UsageError
from fd3d.resample.geometry import Plan

# A planar map is turned channels-last this many bytes of channels at a time: one line of the
# processor's cache for each cell, a few megabytes for a 256x256 map.
_BLOCK_BYTES = 64
# numba has no 16-bit floats on CPUs; `loops` takes their bits.
_AS_BITS = {torch.float16: torch.uint16, torch.bfloat16: torch.int16}


def found() -> bool:
    """True where numba is installed."""
    return importlib.util.find_spec("numba") is not None


def require() -> None:
    """`UsageError` where numba is missing."""
    if not found():
        raise UsageError("the fast CPU path needs numba: pip install 'fd3d[fast]'")


def resample_fused(
    stored: Tensor, *, scale: Tensor, zero: Tensor, plan: Plan, out: Tensor, valid: Tensor
) -> None:
    """Fill `out` (B, C, Y, X) float16, bfloat16 or float32 and `valid` (B, 1, Y, X) bool.

    Args:
        stored: (B, C, *plan.from_shape) int8, uint8, float16, bfloat16 or float32.
        scale, zero: (B, C) float32, value = zero + scale * stored.
        plan: from `make_plan`.
    """
    taps = None
    for frame in range(len(plan)):
        if taps is None or not plan.same(frame, frame - 1):
            taps = _taps(plan, frame)
        has_source = torch.from_numpy(taps[4]).view(plan.to_shape)
        valid[frame, 0].copy_(has_source)
        _fill(stored[frame], scale[frame], zero[frame], taps, out[frame])


def spread_fused(grad: Tensor, *, scale: Tensor, plan: Plan) -> Tensor:
    """The transpose: gradients (B, C, *plan.to_shape) to float32 (B, C, *plan.from_shape)."""
    from fd3d.resample import loops

    frames, channels = grad.shape[:2]
    high, wide = plan.from_shape
    result = torch.zeros((frames, high * wide, channels))
    taps = None
    for frame in range(frames):
        if taps is None or not plan.same(frame, frame - 1):
            taps = _taps(plan, frame)
        rows = grad[frame].permute(1, 2, 0).reshape(-1, channels).float() * scale[frame]
        starts, index, weight, _, _ = taps
        loops.spread_rows(rows.numpy(), starts, index, weight, result[frame].numpy())
    return result.view(frames, high, wide, channels).permute(0, 3, 1, 2)


def _taps(plan: Plan, frame: int) -> tuple:
    from fd3d.resample import loops

    steps = tuple(int(step) for step in plan.steps[frame])
    gain = float(plan.gain[frame])
    return loops.find_taps(steps, gain, plan.density, *plan.from_shape, *plan.to_shape)


def _fill(stored: Tensor, scale: Tensor, zero: Tensor, taps: tuple, out: Tensor) -> None:
    """One frame, (C, Y, X) to (C, Y, X), each channels-last or planar."""
    from fd3d.resample import loops, turn

    if not (out.is_contiguous() or out.permute(1, 2, 0).is_contiguous()):
        side = torch.empty(out.shape, dtype=out.dtype)
        _fill(stored, scale, zero, taps, side)
        out.copy_(side)
        return
    starts, index, weight, share, _ = taps
    scales, zeros = scale.numpy(), zero.numpy()
    in_rows, out_rows = _rows(stored), _rows(out)
    if in_rows is not None and out_rows is not None:
        loops.sum_rows(in_rows, starts, index, weight, share, scales, zeros, out_rows)
        return
    planar_in = _planar(stored.contiguous()) if in_rows is None else None
    planar_out = _planar(out) if out_rows is None else None
    width = len(out) if in_rows is not None else _BLOCK_BYTES // stored.element_size()
    turned, summed = _Scratch(), _Scratch()
    for start in range(0, len(out), width):
        part = slice(start, min(start + width, len(out)))
        wide = part.stop - part.start
        rows = in_rows
        if rows is None:
            rows = turned.take(planar_in.shape[1], wide, planar_in.dtype)
            turn.turn(planar_in[part], rows)
        found = summed.take(len(share), wide, _bits(out).dtype)
        loops.sum_rows(rows, starts, index, weight, share, scales[part], zeros[part], found)
        if out_rows is None:
            turn.turn(found, planar_out[part])
        else:
            out_rows[:, part] = found


class _Scratch:
    """Memory that is used again for every block of channels; fresh pages cost as much as work."""

    def __init__(self) -> None:
        self.memory = np.empty(0, np.uint8)

    def take(self, rows: int, columns: int, dtype: np.dtype) -> np.ndarray:
        size = rows * columns * dtype.itemsize
        if size > self.memory.size:
            self.memory = np.empty(size, np.uint8)
        return self.memory[:size].view(dtype).reshape(rows, columns)


def _bits(tensor: Tensor) -> np.ndarray:
    return tensor.view(_AS_BITS.get(tensor.dtype, tensor.dtype)).numpy()


def _planar(tensor: Tensor) -> np.ndarray:
    """(C, Y * X) of a planar (C, Y, X) map without a copy."""
    return _bits(tensor).reshape(len(tensor), -1)


def _rows(tensor: Tensor) -> np.ndarray | None:
    """(Y * X, C) of a channels-last (C, Y, X) map without a copy; None where it is planar."""
    rows = tensor.permute(1, 2, 0)
    return _bits(rows).reshape(-1, len(tensor)) if rows.is_contiguous() else None
