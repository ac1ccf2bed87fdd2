"""CUDA texts without a GPU: compiled as C++ and run on the CPU, and compiled by NVRTC."""

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fd3d import cuda

SHIM = Path(__file__).with_name("cuda_shim.cpp")
COMPILER = shutil.which("g++") or shutil.which("clang++")


class OnCPU:
    """Kernels of one text compiled as C++, one library for each set of options."""

    def __init__(self, folder: Path, text: Path, kernels: Sequence[str]) -> None:
        if COMPILER is None:
            pytest.skip("no C++ compiler (g++ or clang++) is installed")
        self.folder = folder
        self.given = [
            f'-DKERNELS="{text}"',
            f"-DEXPORTS={' '.join(f'EXPORT({name})' for name in kernels)}",
        ]
        self.libraries: dict[tuple, ctypes.CDLL] = {}

    def run(
        self,
        name: str,
        options: tuple[str, ...],
        blocks: tuple[int, int],
        args: list,
        threads: int = 256,
    ) -> None:
        if options not in self.libraries:
            self.libraries[options] = self._build(options)
        held = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
        numbers = (ctypes.c_longlong * len(held))(*held)
        getattr(self.libraries[options], f"run_{name}")(numbers, *blocks, threads)

    def _build(self, options: tuple[str, ...]) -> ctypes.CDLL:
        made = self.folder / f"{len(self.libraries)}.so"
        command = [COMPILER, *options, "-O1", "-shared", "-fPIC", *self.given]
        built = subprocess.run([*command, str(SHIM), "-o", str(made)], capture_output=True)
        if built.returncode and b"_Float16" in built.stderr:
            pytest.skip(f"{COMPILER} has no 16-bit floats")
        assert built.returncode == 0, built.stderr.decode()
        return ctypes.CDLL(str(made))


class NVRTC:
    """Just enough of NVIDIA's runtime compiler to compile a text."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)

    def compile(self, text: str, options: list[str]) -> bytes:
        """The PTX; an error fails the test with the compiler's words."""
        program = ctypes.c_void_p()
        self._call("CreateProgram", ctypes.byref(program), text.encode(), b"k.cu", 0, None, None)
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = self.library.nvrtcCompileProgram(program, len(options), flags)
        log = self._read(program, "ProgramLog")
        assert not failed, log.decode()
        # Unused helpers and unreached code would be told here.
        assert b"warning" not in log, log.decode()
        made = self._read(program, "CUBIN")
        self._call("DestroyProgram", ctypes.byref(program))
        return made

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, text)
        return text.raw

    def _call(self, name: str, *args) -> None:
        code = getattr(self.library, f"nvrtc{name}")(*args)
        assert code == 0, f"nvrtc{name} says {code}"


def find_nvrtc() -> NVRTC:
    """It, or the test is skipped."""
    path = cuda.nvrtc_library()
    if path is None:
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12")
    return NVRTC(path)
