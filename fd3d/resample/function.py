"""`resample`: the one operation between a stored map and the grid of comparison."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fd3d import cuda
from fd3d.errors import UsageError
from fd3d.resample import device, fused
from fd3d.resample.geometry import Grid, Plan, make_plan
from fd3d.resample.reference import resample_reference
from fd3d.resample.taps import resample_taps, spread_taps

PATHS = ("reference", "torch", "numba", "cupy")
_STORED = (
    torch.int8,
    torch.uint8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
_RESULTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def resample(
    map: Tensor,
    *,
    from_grid: Grid,
    to_grid: Grid,
    scale: object = None,
    zero: object = None,
    matrix: object = None,
    kind: str = "intensity",
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    path: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A batch of stored maps, dequantised, moved by a matrix and brought to another grid.

    Value at a point = zero + scale * stored, bilinear between cell centres; the outermost half
    cell continues the outermost centre. A target cell is split into equal parts, as many along
    each axis as source cells fit on its edge (rounded, at least one). An intensity is the mean
    over the parts that have a source: the area mean when shrinking, plain bilinear when growing.
    A density (something splatted, counted per cell) is the sum over the area that the target cell
    covers, in the ground's own area: what moves with the ground is neither gained nor lost, so a
    matrix that stretches the ground by |det| thins it by 1 / |det|.

    Args:
        map: (B, C, Y, X) on `from_grid`, int8, uint8 or floating. Channels-last is the faster
            layout on CPUs. Where it requires a gradient, the gradient is the exact transpose.
        from_grid, to_grid: `fd3d.grid.BEVGrid`, or `PixelGrid` for image maps.
        scale, zero: (C,) or (B, C) numbers of the codec; None = 1 and 0.
        matrix: takes points of the from-grid's frame to the to-grid's frame, metres, column
            vectors: to = matrix @ from; e.g. `BEVAugmentation.matrix()`, or lidar-to-ego. (3, 3)
            or (4, 4), or one for each frame; see `make_plan`. On the CPU. None = one frame.
        kind: "intensity" or "density".
        out: (B, C, *to_grid.shape) to be filled, any strides and floating dtype.
        dtype: of the result where `out` is None. It then has the memory layout of `map`.
        path: one of `PATHS` instead of the fastest that is there.

    Returns the map, 0 where it has no source, and valid (B, 1, *to_grid.shape) bool, True where
    any part of the cell has a source.

    Input that does not fit together, and a path that is not installed, raise `UsageError`.
    """
    _check_map(map, from_grid)
    plan = make_plan(
        from_grid=from_grid, to_grid=to_grid, matrix=_on_cpu(matrix), frames=len(map), kind=kind
    )
    scale = _per_channel(scale, 1.0, map, "scale")
    zero = _per_channel(zero, 0.0, map, "zero")
    wants_gradient = torch.is_grad_enabled() and map.requires_grad
    if wants_gradient and out is not None:
        raise UsageError("out= cannot be filled where a gradient is wanted: leave it out")
    if out is None:
        out = _empty_like(map, plan, dtype)
    _check_out(out, map, plan)
    path = choose_path(path, map, out)
    if wants_gradient:
        return _Moved.apply(map, scale, zero, plan, dtype, path)
    return out, _run(map, scale, zero, plan, out, path)


def choose_path(path: str | None, map: Tensor, out: Tensor) -> str:
    """The fastest path that can do it, or `path` after checking that it can."""
    double = torch.float64 in (map.dtype, out.dtype)
    if path is None:
        if map.is_cuda:
            return "torch" if double or cuda.missing() else "cupy"
        return "numba" if map.device.type == "cpu" and fused.found() and not double else "torch"
    if path not in PATHS:
        raise UsageError(f"path {path!r} is not known: use one of {', '.join(PATHS)}")
    if path == "numba":
        fused.require()
    if path == "cupy":
        cuda.require()
    needs = {"numba": "cpu", "reference": "cpu", "cupy": "cuda"}.get(path, map.device.type)
    if map.device.type != needs or (double and path in ("numba", "cupy")):
        raise UsageError(
            f"path {path!r} cannot take a {map.dtype} map on {map.device}: leave path= out"
        )
    return path


class _Moved(torch.autograd.Function):
    """Resampling of a map that takes part in training; scale and zero are constants."""

    @staticmethod
    def forward(ctx, map, scale, zero, plan, dtype, path):
        out = _empty_like(map, plan, dtype)
        valid = _run(map.detach(), scale, zero, plan, out, path)
        ctx.save_for_backward(scale)
        ctx.plan, ctx.path, ctx.dtype = plan, path, map.dtype
        ctx.mark_non_differentiable(valid)
        return out, valid

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        (scale,) = ctx.saved_tensors
        spread = {"numba": fused.spread_fused, "cupy": device.spread_cupy}.get(
            ctx.path, spread_taps
        )
        return spread(grad, scale=scale, plan=ctx.plan).to(ctx.dtype), None, None, None, None, None


def _run(map: Tensor, scale: Tensor, zero: Tensor, plan: Plan, out: Tensor, path: str) -> Tensor:
    valid = torch.empty((len(map), 1, *plan.to_shape), dtype=torch.bool, device=map.device)
    if path == "reference":
        exact, mask = resample_reference(map, scale=scale, zero=zero, plan=plan)
        out.copy_(exact)
        valid.copy_(mask)
    elif out.numel():
        fill = {
            "torch": resample_taps,
            "numba": fused.resample_fused,
            "cupy": device.resample_cupy,
        }[path]
        fill(map, scale=scale, zero=zero, plan=plan, out=out, valid=valid)
    return valid


def _check_map(map: Tensor, from_grid: Grid) -> None:
    if map.dim() != 4 or not map.shape[1] or tuple(map.shape[2:]) != tuple(from_grid.shape):
        raise UsageError(
            f"map of shape {tuple(map.shape)} is not (B, C, Y, X) on grid {from_grid}: pass the "
            "grid that the map was made on"
        )
    if map.dtype not in _STORED:
        raise UsageError(f"map of {map.dtype} cannot be resampled: give int8, uint8 or floats")


def _check_out(out: Tensor, map: Tensor, plan: Plan) -> None:
    shape = (*map.shape[:2], *plan.to_shape)
    if tuple(out.shape) != shape or out.dtype not in _RESULTS or out.device != map.device:
        raise UsageError(
            f"the result is {shape} of a floating dtype on {map.device}, not {tuple(out.shape)} "
            f"of {out.dtype} on {out.device}: correct out= or dtype="
        )


def _empty_like(map: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    last = map.shape[1] > 1 and map.stride(1) == 1
    return torch.empty(
        (*map.shape[:2], *plan.to_shape),
        dtype=dtype,
        device=map.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def _per_channel(given: object, default: float, map: Tensor, name: str) -> Tensor:
    dtype = torch.float64 if map.dtype == torch.float64 else torch.float32
    shape = tuple(map.shape[:2])
    if given is None:
        return torch.full(shape, default, dtype=dtype, device=map.device)
    value = torch.as_tensor(given, dtype=dtype)
    if value.dim() and tuple(value.shape) not in (shape, shape[1:]):
        raise UsageError(
            f"{name} of shape {tuple(value.shape)} for a map {tuple(map.shape)}: give one number "
            "for each channel, or for each frame and channel"
        )
    return value.detach().to(map.device, non_blocking=True).expand(shape).contiguous()


def _on_cpu(matrix: object) -> object:
    return matrix.detach().cpu().numpy() if isinstance(matrix, Tensor) else matrix
