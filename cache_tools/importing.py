"""A cache made from signals that an expert wrote elsewhere, in an environment of its own.

`cache_tools.foreign_writer` wrote them, or anything that keeps to `cache_tools.foreign_folder`.
The folder is only read. A file is opened when its frame's turn comes, checked, and handed to
`build_cache` in float32, so the cache is to the byte what running that expert here would give.
"""

from __future__ import annotations

import math
import os
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from safetensors import SafetensorError, safe_open

from cache_tools import foreign_folder, manifest
from cache_tools.build import BuildReport, build_cache
from cache_tools.foreign_folder import ABOUT, ForeignFolder
from cache_tools.writer import check_out
from fd3d.distill.signals import SignalSpec
from fd3d.errors import CheckFailed, UsageError

_AGAIN = "write that frame again"

# What a file's numbers may be: at least as fine as the signal says it is.
_FINE_ENOUGH = {
    "float16": ("float16", "float32", "float64"),
    "float32": ("float32", "float64"),
}
_TENSOR_TYPES = {"F16": "float16", "F32": "float32", "F64": "float64"}

# What numpy's reader of headers raises on bytes that are none.
_BROKEN = (
    ValueError,
    SyntaxError,
    TypeError,
    OverflowError,
    MemoryError,
    RecursionError,
    tokenize.TokenError,
)


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Where one frame lies: `tensors`, a .safetensors of all signals, or `arrays`, a .npy each."""

    key: str
    tensors: Path | None
    arrays: Mapping[str, Path]


def import_signals(
    folder: str | Path,
    out: str | Path,
    *,
    preset: str = "lossless",
    shard_frames: int = 16,
    signals: Sequence[str] | None = None,
    quiet: bool = False,
) -> BuildReport:
    """Build the cache at `out` from the signals in `folder`, or finish it.

    All files have to be there before anything is built, and the first frame to be good.

    Args:
        signals: which to take; None = all.
        preset, shard_frames, quiet: see `build_cache`.

    A folder or signals.json that cannot be used and missing files raise `UsageError`. Files that
    do not hold what signals.json says, or NaN, raise `CheckFailed`; what was built before stays.
    """
    found = foreign_folder.load(folder)
    out = Path(out)
    if found.path.resolve() in (out.resolve(), *out.resolve().parents):
        raise UsageError(f"{out} lies in {found.path}, which is only read: give another OUT")
    specs = _chosen(found, signals)
    wanted = manifest.make(
        identity=found.identity,
        signals=specs,
        keys=found.frames,
        preset=preset,
        shard_frames=shard_frames,
    )
    check_out(out, wanted)
    frames = _frames(found, specs)
    # A signals.json that no file agrees with is seen here, before it has given a cache its ids.
    _read(found, frames[0], specs)

    def compute(positions: Sequence[int]) -> dict[str, list[np.ndarray]]:
        read = [_read(found, frames[position], specs) for position in positions]
        return {name: [values[name] for values in read] for name in specs}

    return build_cache(
        out=out,
        identity=found.identity,
        signals=specs,
        keys=found.frames,
        compute=compute,
        preset=preset,
        shard_frames=shard_frames,
        batch=1,
        quiet=quiet,
    )


def _chosen(found: ForeignFolder, names: Sequence[str] | None) -> dict[str, SignalSpec]:
    unknown = sorted(set(names or ()) - set(found.signals))
    if unknown or (names is not None and not names):
        raise UsageError(
            f"{found.path / ABOUT} names the signals {', '.join(found.signals)}, not "
            f"{', '.join(unknown) or 'none'}: choose from them"
        )
    return {name: spec for name, spec in found.signals.items() if not names or name in names}


def _frames(found: ForeignFolder, specs: Mapping[str, SignalSpec]) -> list[_Frame]:
    """Every frame's files; one that is not there, or there in both ways, raises `UsageError`."""
    # One listing, not a question for each of a hundred thousand names.
    with os.scandir(found.path) as entries:
        there = {entry.name for entry in entries if entry.is_file()}
    frames, missing = [], []
    for key in found.frames:
        single = f"{key}.safetensors"
        each = {name: f"{key}.{name}.npy" for name in specs}
        lacking = [name for name in each.values() if name not in there]
        if single in there and len(lacking) < len(each):
            raise UsageError(
                f"{found.path} has frame {key} as {single} and as .npy files: keep one of the two"
            )
        if single not in there:
            missing += lacking
        frames.append(
            _Frame(
                key=key,
                tensors=found.path / single if single in there else None,
                arrays={name: found.path / file for name, file in each.items()},
            )
        )
    if missing:
        raise UsageError(
            f"{len(missing)} files are missing in {found.path}, such as {missing[0]}: run the "
            f"writer until all frames of {ABOUT} are there"
        )
    return frames


def _read(
    found: ForeignFolder, frame: _Frame, specs: Mapping[str, SignalSpec]
) -> dict[str, np.ndarray]:
    """The frame's signals in float32, each as its spec says."""
    if frame.tensors is None:
        return {name: _read_npy(frame.arrays[name], spec) for name, spec in specs.items()}
    return _read_safetensors(frame.tensors, specs, known=found.signals)


def _read_npy(path: Path, spec: SignalSpec) -> np.ndarray:
    with open(path, "rb") as file:
        try:
            version = npy.read_magic(file)
            # Not np.load: its memory is as large as a broken header says.
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            shape, fortran, dtype = read(file)
        except (*_BROKEN, KeyError):
            raise CheckFailed(f"{path} is damaged or no .npy file: {_AGAIN}") from None
        _check_kind(path, spec, tuple(shape), dtype.name)
        count = math.prod(shape)
        if os.fstat(file.fileno()).st_size - file.tell() != count * dtype.itemsize:
            raise CheckFailed(f"{path} is cut short, or has more in it than an array: {_AGAIN}")
        flat = np.fromfile(file, dtype, count)
    return _checked(path, spec, flat.reshape(shape, order="F" if fortran else "C"))


def _read_safetensors(
    path: Path, specs: Mapping[str, SignalSpec], *, known: Mapping[str, SignalSpec]
) -> dict[str, np.ndarray]:
    values = {}
    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            lacking, unknown = sorted(set(specs) - names), sorted(names - set(known))
            if lacking:
                raise CheckFailed(f"{path} has no tensor {lacking[0]}: {_AGAIN}")
            if unknown:
                raise CheckFailed(
                    f"{path} has a tensor {unknown[0]}, which {ABOUT} does not name: add it there "
                    f"or {_AGAIN} without it"
                )
            for name, spec in specs.items():
                part = file.get_slice(name)
                kind = str(part.get_dtype())
                _check_kind(path, spec, tuple(part.get_shape()), _TENSOR_TYPES.get(kind, kind))
                values[name] = _checked(path, spec, file.get_tensor(name))
    except SafetensorError:
        raise CheckFailed(f"{path} is damaged or no .safetensors file: {_AGAIN}") from None
    return values


def _check_kind(path: Path, spec: SignalSpec, shape: tuple[int, ...], dtype: str) -> None:
    """Before a value is read: what the header says against what signals.json says."""
    good = shape == spec.shape
    if spec.ragged:
        good = bool(shape) and shape[0] <= spec.shape[0] and shape[1:] == spec.shape[1:]
    if not good:
        most = "at most " if spec.ragged else ""
        raise CheckFailed(
            f"{path} holds {spec.name} of shape {list(shape)}, {ABOUT} says "
            f"{most}{list(spec.shape)}: {_AGAIN}, or correct {ABOUT}"
        )
    if dtype not in _FINE_ENOUGH[spec.dtype]:
        raise CheckFailed(
            f"{path} holds {spec.name} as {dtype}, {ABOUT} says {spec.dtype}: write "
            f"{' or '.join(_FINE_ENOUGH[spec.dtype][:2])}, or correct {ABOUT}"
        )


def _checked(path: Path, spec: SignalSpec, value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        value = np.ascontiguousarray(value, dtype=np.float32)
    most = float(np.finfo(spec.dtype).max)
    reach = _reach(value)
    if not reach <= most:
        what = "NaN" if math.isnan(reach) else f"{reach:.6g}, beyond what {spec.dtype} holds"
        raise CheckFailed(f"{path} holds {what} in {spec.name}: mend the expert, {_AGAIN}")
    return value


def _reach(value: np.ndarray) -> float:
    """The largest size of a number, NaN where there is one; min and max pass it on."""
    return max(-float(value.min()), float(value.max())) if value.size else 0.0
