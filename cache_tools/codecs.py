"""Presets: how a frame's signals become the numbers that are stored, and back.

`lossless` keeps maps as float16. `balanced` keeps float16 maps as int8 with a step and a zero value
for each frame and channel, value = code * scale + zero, where step = max(sd / k, range / 255): fine
enough for the spread of the channel (k = 8 for features), never so fine that its extremes would be
clipped. `fast` does so with twice as many steps for features and packs them with LZ4, which unpacks
several times faster and takes almost twice the room. Where a channel contains 0, 0 has a code of
its own, so what a ReLU switched off stays exactly 0. Tables and float32 maps are exact in every
preset.

Errors are relative L2 after removing each channel's mean: on a biased map an error relative to
the plain norm would hide almost everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fd3d.distill.signals import SignalSpec
from fd3d.errors import CheckFailed, UsageError

PRESETS = ("lossless", "balanced", "fast")
KINDS = ("exact", "int8", "table")
FLOAT16_MAX = 65504.0

# Pieces of about this many values stay in the processor's cache while they are worked on.
_BLOCK_VALUES = 1 << 16
# Keeps the largest code at 255 when range / 255 is the step and both ends round outwards.
_RANGE_SLACK = 1 + 1e-6


@dataclass(frozen=True, kw_only=True)
class SignalCodec:
    """How one signal is stored.

    Args:
        kind: "exact" (the spec's dtype), "int8" (with scale and zero) or "table" (padded rows
            and a count).
        cname, clevel, shuffle, blocksize: of the Blosc codec; blocksize 0 = Blosc's choice.
        steps_per_sd: int8 only, the step is at most a channel's standard deviation over this
            unless its range asks for more.
        budget: largest allowed relative error of a frame; 0 = none stated.
    """

    kind: str
    cname: str = "zstd"
    clevel: int = 1
    shuffle: str = "shuffle"
    blocksize: int = 0
    steps_per_sd: float = 0.0
    budget: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"codec kind {self.kind!r} is not known: use {', '.join(KINDS)}")


@dataclass(frozen=True, kw_only=True)
class FrameError:
    """Relative L2 error of one signal of one frame, channel means removed: of the whole map, and
    of its worst channel."""

    frame: float
    worst_channel: float


def check_preset(preset: str) -> str:
    """`preset` itself; one that does not exist raises `UsageError`."""
    if preset not in PRESETS:
        raise UsageError(f"preset {preset!r} is not known: use one of {', '.join(PRESETS)}")
    return preset


def codec_for(spec: SignalSpec, preset: str) -> SignalCodec:
    """The codec that `preset` chooses for a signal.

    The heatmap gets steps four times finer than features (k = 32): its scores are read one by
    one near their peaks, and it is small.
    """
    check_preset(preset)
    if spec.ragged:
        return SignalCodec(kind="table")
    if preset != "lossless" and spec.dtype == "float16" and len(spec.shape) == 3:
        heatmap = spec.name == "heatmap"
        if preset == "fast":
            steps = 32.0 if heatmap else 16.0
            return SignalCodec(
                kind="int8", cname="lz4", shuffle="noshuffle", steps_per_sd=steps, budget=0.02
            )
        steps = 32.0 if heatmap else 8.0
        return SignalCodec(kind="int8", shuffle="bitshuffle", steps_per_sd=steps, budget=0.04)
    return SignalCodec(kind="exact", blocksize=256 * 1024)


def encode(
    value: np.ndarray, *, spec: SignalSpec, codec: SignalCodec, frame: str
) -> tuple[dict[str, np.ndarray], FrameError | None]:
    """What to store for one frame of a signal, by array suffix ("" = the signal's own array).

    `value` has the spec's shape (tables: at most that many rows). Maps also yield their measured
    error against `value`. NaN, infinity, and values beyond float16 where the spec asks for it
    raise `CheckFailed` naming the `frame`; another shape raises `UsageError`.
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
    return {"": code, "scale": scale, "zero": zero}, error_of(value, decoded)


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
    return dequantise(stored[""], stored["scale"], stored["zero"], dtype=spec.dtype, out=out)


def quantise(
    value: np.ndarray, *, steps_per_sd: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(C, Y, X) int8 codes, (C,) float32 steps and (C,) float32 values of code 0 of a map.

    No value is clipped: each is decoded to within half a step. A constant channel is exact.
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
        step = np.maximum(sd / steps_per_sd, (high - low) / 255 * _RANGE_SLACK).astype(np.float32)
        constant = step < np.finfo(np.float32).tiny
        step = np.where(constant, np.float32(1), step)
        # The value of the lowest code: a whole number of steps where 0 is to be one of them.
        lowest = np.where((low <= 0) & (high >= 0), np.rint(low / step) * step, low)
        lowest = np.where(constant, low, lowest).astype(np.float32)
        code[part] = np.rint((block - lowest[:, None]) / step[:, None]) - 128
        code[part][constant] = 0
        scale[part] = step
        aligned = (np.rint(lowest / step) + 128) * step
        zero[part] = np.where((low <= 0) & (high >= 0), aligned, lowest + 128 * step)
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
    """Of `decoded` against the map `value`, (C, Y, X) both."""
    flat, back = value.reshape(len(value), -1), decoded.reshape(len(value), -1)
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
