"""How a frame's signals become the numbers that are stored, and back.

int8 maps are value = code * scale + zero with a scale and a zero for each frame and channel: scale
is the channel's standard deviation over what the codec says, or range / 255 where that is more, so
that the extremes are never clipped. Where a channel contains 0, 0 has a code of its own: what a
ReLU switched off stays exactly 0.

Errors are relative L2 after removing each channel's mean: on a biased map an error relative to
the plain norm would hide almost everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from cache_tools import focal
from cache_tools.presets import SignalCodec
from fd3d.distill.signals import SignalSpec
from fd3d.errors import CheckFailed, UsageError

FLOAT16_MAX = 65504.0

# Pieces of about this many values stay in the processor's cache while they are worked on.
_BLOCK_VALUES = 1 << 16
# Keeps the largest code at 255 when range / 255 is the step and both ends round outwards.
_RANGE_SLACK = 1 + 1e-6


@dataclass(frozen=True, kw_only=True)
class FrameError:
    """Relative L2 error of one signal of one frame, channel means removed: of the whole map, and
    of its worst channel."""

    frame: float
    worst_channel: float


def encode(
    value: np.ndarray,
    *,
    spec: SignalSpec,
    codec: SignalCodec,
    frame: str,
    focus: np.ndarray | None = None,
) -> tuple[dict[str, np.ndarray], FrameError | None]:
    """What to store for one frame of a signal, by array suffix ("" = the signal's own array).

    `value` has the spec's shape (tables: at most that many rows). Maps also yield their measured
    error against `value`. A codec that keeps only tiles needs the `focus`, (Y, X) bool, and its
    error is that inside them. A map whose error is above the codec's budget is stored as "exact",
    in the dtype of its spec, and all its scales are zero. NaN, infinity, and values beyond float16
    where the spec asks for it raise `CheckFailed` naming the `frame`; another shape raises
    `UsageError`.
    """
    value = np.asarray(value)
    _check_shape(value, spec, frame)
    value = np.ascontiguousarray(value, dtype=np.float32)
    limit = FLOAT16_MAX if spec.dtype == "float16" else float(np.finfo(np.float32).max)
    if value.size:
        low, high = float(value.min()), float(value.max())
        _check_values(low, high, limit, spec, frame)
    if codec.kind == "table":
        rows = np.zeros(spec.shape, spec.dtype)
        rows[: len(value)] = value
        return {"": rows, "count": np.array([len(value)], np.int32)}, None
    if codec.kind == "exact":
        stored = _cast(value, spec.dtype)
        return {"": stored}, error_of(value, stored) if value.ndim == 3 else None
    # Rounded first to what a lossless cache holds, so that one exported from it is the same.
    rounded = _cast(value, spec.dtype).astype(np.float32, copy=False)
    code, scale, zero = quantise(rounded, steps_per_sd=codec.steps_per_sd)
    decoded = dequantise(code, scale, zero, dtype=spec.dtype)
    if not np.isfinite([decoded.min(), decoded.max()]).all():
        _check_values(low, np.inf, limit, spec, frame)
    stored = {"": code, "scale": scale, "zero": zero}
    if not codec.coarse:
        return _within(stored, error_of(value, decoded), rounded, value, spec, codec)
    tiles = focal.tiles_in(_checked_focus(focus, spec, frame), codec.tile)
    kept = focal.cells(tiles, codec.tile, spec.shape[1:])
    stored |= {"coarse": focal.coarse(code, codec.coarse), "tiles": tiles}
    error = error_of(value[:, kept], decoded[:, kept])
    return _within(stored, error, rounded, value, spec, codec)


def _within(
    stored: dict[str, np.ndarray],
    error: FrameError,
    rounded: np.ndarray,
    value: np.ndarray,
    spec: SignalSpec,
    codec: SignalCodec,
) -> tuple[dict[str, np.ndarray], FrameError]:
    if not codec.budget or error.frame <= codec.budget:
        return stored, error
    exact = _cast(rounded, spec.dtype)
    none = np.zeros_like(stored["scale"])
    return {"exact": exact, "scale": none, "zero": none}, error_of(value, exact)


def decode(
    stored: Mapping[str, np.ndarray],
    *,
    spec: SignalSpec,
    codec: SignalCodec,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """One frame of a signal from what `encode` stored, in the spec's shape and dtype; tables have
    as many rows as the frame has. int8 maps are decoded into `out` where it is given."""
    if codec.kind == "table":
        rows = int(stored["count"][0])
        if not 0 <= rows <= spec.shape[0]:
            raise CheckFailed(f"{spec.name} says it has {rows} rows, of at most {spec.shape[0]}")
        return stored[""][:rows]
    if codec.kind == "exact":
        return stored[""]
    if "exact" in stored:
        return stored["exact"]
    return dequantise(stored[""], stored["scale"], stored["zero"], dtype=spec.dtype, out=out)


def quantise(
    value: np.ndarray, *, steps_per_sd: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(C, Y, X) int8 codes, (C,) float32 steps and (C,) float32 values of code 0 of a map.

    Steps are the channel's standard deviation over `steps_per_sd`, and never so small that a value
    would be clipped: each is decoded to within half a step. A constant channel is exact.
    """
    flat = value.reshape(len(value), -1)
    code = np.empty(flat.shape, np.int8)
    scale = np.empty(len(flat), np.float32)
    zero = np.empty(len(flat), np.float32)
    for part in _blocks(flat):
        block = flat[part]
        low, high = block.min(axis=1), block.max(axis=1)
        centred = block - block.mean(axis=1, keepdims=True)
        sd = np.sqrt(np.einsum("cn,cn->c", centred, centred) / block.shape[1])
        steps = np.maximum(sd / steps_per_sd, (high - low) / 255 * _RANGE_SLACK).astype(np.float32)
        constant = steps < np.finfo(np.float32).tiny
        steps = np.where(constant, np.float32(1), steps)
        # The value of the lowest code: a whole number of steps where 0 is to be one of them.
        lowest = np.where((low <= 0) & (high >= 0), np.rint(low / steps) * steps, low)
        lowest = np.where(constant, low, lowest).astype(np.float32)
        code[part] = np.rint((block - lowest[:, None]) / steps[:, None]) - 128
        code[part][constant] = 0
        scale[part] = steps
        aligned = (np.rint(lowest / steps) + 128) * steps
        zero[part] = np.where((low <= 0) & (high >= 0), aligned, lowest + 128 * steps)
        zero[part][constant] = low[constant]
    return code.reshape(value.shape), scale, zero


def dequantise(
    code: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray,
    *,
    dtype: str,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The map in `dtype` that `quantise` stands for: code * scale + zero, worked in float32.

    Written into `out` where it is given, contiguous and of that shape and dtype.
    """
    flat = code.reshape(len(code), -1)
    decoded = np.empty(flat.shape, dtype) if out is None else out.reshape(flat.shape)
    for part in _blocks(flat):
        values = flat[part].astype(np.float32)
        values *= scale[part, None]
        values += zero[part, None]
        torch.from_numpy(decoded[part]).copy_(torch.from_numpy(values))
    return decoded.reshape(code.shape)


def _cast(value: np.ndarray, dtype: str) -> np.ndarray:
    # torch rounds to float16 as numpy does and several times faster.
    return torch.from_numpy(value).to(getattr(torch, dtype)).numpy()


def _blocks(flat: np.ndarray) -> Iterator[slice]:
    rows = max(1, _BLOCK_VALUES // max(flat.shape[1], 1))
    for start in range(0, len(flat), rows):
        yield slice(start, min(start + rows, len(flat)))


def error_of(value: np.ndarray, decoded: np.ndarray) -> FrameError:
    """Of `decoded` against the map `value`, (C, Y, X) both, or (C, cells) of a part of it."""
    flat, back = value.reshape(len(value), -1), decoded.reshape(len(value), -1)
    if not flat.shape[1]:
        return FrameError(frame=0.0, worst_channel=0.0)
    wrong, spread, size = (np.empty(len(flat)) for _ in range(3))
    for part in _blocks(flat):
        block = flat[part]
        difference = back[part].astype(np.float32) - block
        centred = block - block.mean(axis=1, keepdims=True)
        wrong[part] = np.einsum("cn,cn->c", difference, difference)
        spread[part] = np.einsum("cn,cn->c", centred, centred)
        size[part] = np.einsum("cn,cn->c", block, block)
    return FrameError(
        frame=float(_relative(wrong.sum(), spread.sum(), size.sum())),
        worst_channel=float(_relative(wrong, spread, size).max(initial=0.0)),
    )


def _relative(wrong, spread, size):
    # A constant channel has no spread to compare with: its plain norm stands in.
    against = np.where(spread > 1e-12 * size, spread, size)
    return np.sqrt(np.divide(wrong, against, out=np.zeros_like(against), where=against > 0))


def _check_shape(value: np.ndarray, spec: SignalSpec, frame: str) -> None:
    good = value.shape == spec.shape
    if spec.ragged:
        good = (
            value.ndim == len(spec.shape)
            and value.shape[1:] == spec.shape[1:]
            and len(value) <= spec.shape[0]
        )
    if not good:
        most = "at most " if spec.ragged else ""
        raise UsageError(
            f"the expert gave {spec.name} of frame {frame} as {value.shape}, its spec says "
            f"{most}{spec.shape}: correct the spec or the expert"
        )


def _checked_focus(focus: np.ndarray | None, spec: SignalSpec, frame: str) -> np.ndarray:
    if focus is None or focus.shape != spec.shape[1:] or focus.dtype != bool:
        what = "nothing" if focus is None else f"{focus.dtype} {focus.shape}"
        raise UsageError(
            f"frame {frame}: {spec.name} is kept where the focus is, which is {what}: give a bool "
            f"mask of {spec.shape[1:]} as 'focus' with the signals, or choose another preset"
        )
    return focus


def _check_values(low: float, high: float, limit: float, spec: SignalSpec, frame: str) -> None:
    # min and max pass NaN on, so two numbers tell all.
    if np.isnan(low) or np.isnan(high):
        raise CheckFailed(
            f"frame {frame}: the expert's {spec.name} contains NaN; nothing is stored"
        )
    if max(-low, high) > limit:
        raise CheckFailed(
            f"frame {frame}: the expert's {spec.name} reaches {max(-low, high):.6g}, beyond what "
            f"{spec.dtype} holds ({limit:.6g}); nothing is stored"
        )


def check_buffer(out: np.ndarray, spec: SignalSpec) -> np.ndarray:
    """`out` itself; one that a frame of the signal cannot be read into raises `UsageError`."""
    good = out.shape == spec.shape and out.dtype == spec.dtype and out.flags.c_contiguous
    if spec.ragged or not good:
        raise UsageError(
            f"{spec.name} cannot be read into {out.dtype} {out.shape}: give a contiguous array of "
            f"{spec.dtype} {spec.shape}, and none for a table"
        )
    return out
