"""CuPy, where it is there: compiling kernels, lending torch's tensors to them, launching.

The only place that imports CuPy. Nothing here has been run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fd3d.errors import UsageError

_INSTALL = "pip install 'fd3d[cuda12]' or 'fd3d[cuda13]', as torch.version.cuda says"


@cache
def missing() -> str | None:
    """Why kernels cannot run here, in one sentence that names the fix; None where they can."""
    if not torch.cuda.is_available():
        return "CUDA kernels need a CUDA device and a build of torch that sees it"
    if importlib.util.find_spec("cupy") is None:
        return f"CUDA kernels need CuPy: {_INSTALL}"
    try:
        # CuPy 13 raises where there is no driver, CuPy 14 says no.
        devices = _cupy().cuda.runtime.getDeviceCount()
    except Exception as error:
        return f"CuPy does not work with this driver ({type(error).__name__}: {error}): {_INSTALL}"
    return None if devices else "CUDA kernels need a CUDA device, and CuPy sees none"


def require() -> None:
    """`UsageError` where kernels cannot run."""
    why = missing()
    if why is not None:
        raise UsageError(why)


def nvrtc_library() -> Path | None:
    """NVRTC as installed by a pip wheel (nvidia-cuda-nvrtc), or None."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            return path
    return None


@cache
def compile_kernel(source: str, name: str, options: tuple[str, ...] = ()):
    """The kernel `name` of a CUDA C++ text as `cupy.RawKernel`; compiled for each device once."""
    return _cupy().RawKernel(source, name, options=options)


def launch(
    kernel,
    *,
    blocks: tuple[int, int],
    threads: int,
    device: torch.device,
    args: Sequence[Tensor | int | float],
) -> None:
    """Start a kernel on torch's current stream of `device` and return without waiting.

    Tensors are lent without a copy; whole numbers are passed as int64 and others as float32.
    """
    cupy = _cupy()
    stream = torch.cuda.current_stream(device)
    # Entering torch's own stream first makes the DLPack exchange free of events and waits.
    with cupy.cuda.Device(stream.device_index), cupy.cuda.ExternalStream(stream.cuda_stream):
        lent = [_lend(arg) for arg in args]
        kernel(blocks, (threads,), tuple(lent))


def _lend(arg: Tensor | int | float):
    cupy = _cupy()
    if isinstance(arg, Tensor):
        # CuPy has no bfloat16 and bool travels unevenly between versions: bits do for pointers.
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        return cupy.from_dlpack(arg.detach().view(bits[arg.element_size()]))
    return cupy.int64(arg) if isinstance(arg, int) else cupy.float32(arg)


@cache
def _cupy():
    # CuPy 13 looks for NVRTC in a system toolkit only; a wheel's library that is already loaded
    # satisfies it.
    library = nvrtc_library()
    if library is not None:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    import cupy

    return cupy
