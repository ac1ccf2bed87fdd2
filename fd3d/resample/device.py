"""The CuPy path: `kernels.cu` on torch's tensors, on torch's stream. Not yet run on a GPU."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fd3d import cuda
from fd3d.resample.geometry import Plan

# The numbers that kernels.cu has for the types.
NUMBERS = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.float32: 4,
}
GROUP = 4
THREADS = 256


@cache
def source() -> str:
    """The CUDA C++ text."""
    return Path(__file__).with_name("kernels.cu").read_text()


def options(*, stored: torch.dtype, result: torch.dtype, packed: bool) -> tuple[str, ...]:
    """What to tell the compiler for maps of these types; see the head of kernels.cu."""
    return (
        "-std=c++17",
        f"-DSTORED={NUMBERS[stored]}",
        f"-DRESULT={NUMBERS[result]}",
        f"-DPACKED={int(packed)}",
    )


def packed(*maps: Tensor) -> bool:
    """True where a thread may move a group of channels of each (B, C, Y, X) map at once."""
    return all(
        tensor.shape[1] % GROUP == 0
        and tensor.stride(1) == 1
        and all(tensor.stride(axis) % GROUP == 0 for axis in (0, 2, 3))
        and tensor.data_ptr() % (GROUP * tensor.element_size()) == 0
        for tensor in maps
    )


def blocks(plan: Plan, channels: int) -> tuple[int, int]:
    """Blocks along the work of a frame, and frames."""
    tasks = -(-channels // GROUP) * plan.to_shape[0] * plan.to_shape[1]
    return -(-tasks // THREADS), len(plan)


def resample_args(
    stored: Tensor, *, scale: Tensor, zero: Tensor, plan: Plan, out: Tensor, valid: Tensor
) -> list:
    """The arguments of kernel `resample`, in order; see `resample_cupy`."""
    steps, gain = _on(plan, stored.device)
    return [
        *(stored, scale, zero, steps, gain, out, valid, stored.shape[1]),
        *(*plan.from_shape, *plan.to_shape, int(plan.density), *stored.stride(), *out.stride()),
    ]


def spread_args(grad: Tensor, *, scale: Tensor, plan: Plan, map: Tensor) -> list:
    """The arguments of kernel `spread`, in order; `map` takes the result, zeroed float32."""
    steps, gain = _on(plan, grad.device)
    return [
        *(grad, scale, steps, gain, map, grad.shape[1]),
        *(*plan.from_shape, *plan.to_shape, int(plan.density), *grad.stride(), *map.stride()),
    ]


def resample_cupy(
    stored: Tensor, *, scale: Tensor, zero: Tensor, plan: Plan, out: Tensor, valid: Tensor
) -> None:
    """Fill `out` (B, C, Y, X) float16, bfloat16 or float32 and `valid` (B, 1, Y, X) bool.

    Args:
        stored: (B, C, *plan.from_shape) int8, uint8, float16, bfloat16 or float32, any strides.
        scale, zero: (B, C) float32, value = zero + scale * stored.
        plan: from `make_plan`.
    """
    kernel = cuda.compile_kernel(
        source(),
        "resample",
        options(stored=stored.dtype, result=out.dtype, packed=packed(stored, out)),
    )
    cuda.launch(
        kernel,
        blocks=blocks(plan, stored.shape[1]),
        threads=THREADS,
        device=stored.device,
        args=resample_args(stored, scale=scale, zero=zero, plan=plan, out=out, valid=valid),
    )


def spread_cupy(grad: Tensor, *, scale: Tensor, plan: Plan) -> Tensor:
    """The transpose: gradients (B, C, *plan.to_shape) to float32 (B, C, *plan.from_shape)."""
    last = grad.shape[1] > 1 and grad.stride(1) == 1
    result = torch.zeros(
        (*grad.shape[:2], *plan.from_shape), dtype=torch.float32, device=grad.device
    ).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    if not grad.numel():
        return result
    kernel = cuda.compile_kernel(
        source(),
        "spread",
        options(stored=torch.float32, result=grad.dtype, packed=packed(grad, result)),
    )
    cuda.launch(
        kernel,
        blocks=blocks(plan, grad.shape[1]),
        threads=THREADS,
        device=grad.device,
        args=spread_args(grad, scale=scale, plan=plan, map=result),
    )
    return result


def _on(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    # Two copies of a few hundred bytes; pinned, so that the host does not wait for them.
    steps = torch.from_numpy(plan.steps)
    gain = torch.from_numpy(plan.gain).float()
    if device.type == "cuda":
        steps, gain = steps.pin_memory(), gain.pin_memory()
    return steps.to(device, non_blocking=True), gain.to(device, non_blocking=True)
