"""The CPU loops, compiled by numba: find the taps of a frame once, then sum rows of channels.

Imported only where numba is installed. 16-bit floats travel as integers, because numba has no
such numbers on CPUs: float16 as uint16, bfloat16 as int16.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

_ONE = 1 << 32
_HALF = 1 << 31
_FRACTION = 2.0**-32
# float32 sums longer than this are made in two steps, or the fifth digit would go.
_LONGEST_SUM = 64
# Source rows are asked for this many target cells ahead: a turned map is read in no order that
# the processor would foresee.
_AHEAD = 4
# Smaller sources stay in cache, where asking ahead costs more than it saves.
_IN_CACHE = 1 << 22

_compiled = njit(cache=True, nogil=True, fastmath={"contract", "nsz"}, error_model="numpy")
_inlined = njit(inline="always")


@_compiled
def find_taps(steps, gain, density, from_y, from_x, to_y, to_x):
    """Taps of one frame as rows of a sparse matrix: starts (cells + 1,) int64, source cell int32,
    weight float32, and share (cells,) float32, the sum of a cell's weights; valid (cells,) bool.

    Every row has a multiple of four taps (the summing loop takes four at a time); taps that fill
    up weigh 0. Parts of a cell that read the same source cell are one tap.
    """
    ax, bx, cx, ay, by, cy, sx, sy = steps
    # A cell's parts span this many source cells at most, one more on each side for bilinear.
    wide = min(from_x, ((abs(ax) * (sx - 1) + abs(bx) * (sy - 1)) >> 32) + 3)
    high = min(from_y, ((abs(ay) * (sx - 1) + abs(by) * (sy - 1)) >> 32) + 3)
    window = np.zeros((high, wide), np.float64)
    cells = to_y * to_x
    starts = np.empty(cells + 1, np.int64)
    share = np.empty(cells, np.float32)
    valid = np.empty(cells, np.bool_)
    room = cells * 12 + high * wide + 4
    index = np.empty(room, np.int32)
    weight = np.empty(room, np.float32)
    last_u, last_v = (from_x << 32) - _HALF, (from_y << 32) - _HALF
    used = 0
    for row in range(to_y):
        for col in range(to_x):
            cell = row * to_x + col
            starts[cell] = used
            u_start = ax * (col * sx) + bx * (row * sy) + cx
            v_start = ay * (col * sx) + by * (row * sy) + cy
            if sx * sy == 1 and _among_four(u_start, v_start, from_x, from_y):
                # Most of a map that does not shrink; the same as below, sooner.
                if used + 4 > len(index):
                    index, weight = _longer(index), _longer(weight)
                left, top = u_start >> 32, v_start >> 32
                right_share = (u_start - (left << 32)) * _FRACTION
                bottom_share = (v_start - (top << 32)) * _FRACTION
                first, factor = top * from_x + left, gain if density else 1.0
                index[used], index[used + 1] = first, first + 1
                index[used + 2], index[used + 3] = first + from_x, first + from_x + 1
                w0 = (1.0 - right_share) * (1.0 - bottom_share) * factor
                w1 = right_share * (1.0 - bottom_share) * factor
                w2 = (1.0 - right_share) * bottom_share * factor
                w3 = right_share * bottom_share * factor
                weight[used], weight[used + 1] = w0, w1
                weight[used + 2], weight[used + 3] = w2, w3
                used += 4
                valid[cell], share[cell] = True, w0 + w1 + w2 + w3
                continue
            u_end, v_end = ax * (sx - 1), ay * (sx - 1)
            u_down, v_down = bx * (sy - 1), by * (sy - 1)
            left = (u_start + min(u_end, 0) + min(u_down, 0)) >> 32
            right = ((u_start + max(u_end, 0) + max(u_down, 0)) >> 32) + 1
            top = (v_start + min(v_end, 0) + min(v_down, 0)) >> 32
            bottom = ((v_start + max(v_end, 0) + max(v_down, 0)) >> 32) + 1
            found = 0
            inside = left >= 0 and right < from_x and top >= 0 and bottom < from_y
            if inside:
                found = sx * sy
                for j in range(sy):
                    u, v = u_start + bx * j, v_start + by * j
                    for _ in range(sx):
                        _add_inner_part(window, u, v, left, top)
                        u += ax
                        v += ay
            elif right >= 0 and left < from_x and bottom >= 0 and top < from_y:
                left, right = max(left, 0), min(right, from_x - 1)
                top, bottom = max(top, 0), min(bottom, from_y - 1)
                for j in range(sy):
                    u, v = u_start + bx * j, v_start + by * j
                    for _ in range(sx):
                        if -_HALF <= u <= last_u and -_HALF <= v <= last_v:
                            found += 1
                            _add_part(window, u, v, left, top, from_x, from_y)
                        u += ax
                        v += ay
            valid[cell] = found > 0
            share[cell] = 0.0
            if found == 0:
                continue
            factor = gain / (sx * sy) if density else 1.0 / found
            if used + high * wide + 4 > len(index):
                index, weight = _longer(index), _longer(weight)
            total = 0.0
            for j in range(bottom - top + 1):
                for i in range(right - left + 1):
                    if window[j, i] != 0.0:
                        index[used] = (top + j) * from_x + left + i
                        weight[used] = window[j, i] * factor
                        total += window[j, i] * factor
                        window[j, i] = 0.0
                        used += 1
            share[cell] = total
            while (used - starts[cell]) % 4:
                index[used] = index[used - 1]
                weight[used] = 0.0
                used += 1
    starts[cells] = used
    return starts, index, weight, share, valid


@_inlined
def _among_four(u, v, from_x, from_y):
    """Whether a point reads four cells: not beyond the outermost centres, nor on a line of them."""
    between = u & (_ONE - 1) != 0 and v & (_ONE - 1) != 0
    return between and 0 <= u >> 32 < from_x - 1 and 0 <= v >> 32 < from_y - 1


@_inlined
def _add_inner_part(window, u, v, left, top):
    col, row = u >> 32, v >> 32
    right_share = (u - (col << 32)) * _FRACTION
    bottom_share = (v - (row << 32)) * _FRACTION
    x, y = col - left, row - top
    window[y, x] += (1.0 - right_share) * (1.0 - bottom_share)
    window[y, x + 1] += right_share * (1.0 - bottom_share)
    window[y + 1, x] += (1.0 - right_share) * bottom_share
    window[y + 1, x + 1] += right_share * bottom_share


@_inlined
def _add_part(window, u, v, left, top, from_x, from_y):
    col, row = u >> 32, v >> 32
    right_share = (u - (col << 32)) * _FRACTION
    bottom_share = (v - (row << 32)) * _FRACTION
    x0, x1 = max(col, 0) - left, min(col + 1, from_x - 1) - left
    y0, y1 = max(row, 0) - top, min(row + 1, from_y - 1) - top
    window[y0, x0] += (1.0 - right_share) * (1.0 - bottom_share)
    window[y0, x1] += right_share * (1.0 - bottom_share)
    window[y1, x0] += (1.0 - right_share) * bottom_share
    window[y1, x1] += right_share * bottom_share


@_compiled
def _longer(values):
    longer = np.empty(2 * len(values), values.dtype)
    longer[: len(values)] = values
    return longer


@_compiled
def sum_rows(source, starts, index, weight, share, scale, zero, out):
    """The target cells of a frame: (from-cells, C) `source` to (to-cells, C) `out`.

    `scale` and `zero` are (C,) float32; the other arrays are `find_taps`'.
    """
    channels = source.shape[1]
    last = len(out) - 1
    far = source.size * source.itemsize > _IN_CACHE
    total = np.empty(channels, np.float32)
    piece = np.empty(channels, np.float32)
    for cell in range(len(out)):
        begin, end = starts[cell], starts[cell + 1]
        row = out[cell]
        if far:
            ahead = min(cell + _AHEAD, last)
            for tap in range(starts[ahead], starts[ahead + 1]):
                _fetch_row(source, index[tap])
        if begin == end:
            for c in range(channels):
                _put(row, c, np.float32(0.0))
            continue
        whole = share[cell]
        if end - begin == 4:
            # Most cells where nothing shrinks: no need to pass by `total`.
            w0, w1, w2, w3 = weight[begin], weight[begin + 1], weight[begin + 2], weight[begin + 3]
            r0, r1 = source[index[begin]], source[index[begin + 1]]
            r2, r3 = source[index[begin + 2]], source[index[begin + 3]]
            for c in range(channels):
                value = (w0 * _get(r0[c]) + w1 * _get(r1[c])) + (
                    w2 * _get(r2[c]) + w3 * _get(r3[c])
                )
                _put(row, c, value * scale[c] + whole * zero[c])
            continue
        if end - begin <= _LONGEST_SUM:
            _sum_taps(source, index, weight, begin, end, total)
        else:
            total[:] = 0.0
            for start in range(begin, end, _LONGEST_SUM):
                _sum_taps(source, index, weight, start, min(start + _LONGEST_SUM, end), piece)
                for c in range(channels):
                    total[c] += piece[c]
        for c in range(channels):
            _put(row, c, total[c] * scale[c] + whole * zero[c])


@_inlined
def _sum_taps(source, index, weight, begin, end, total):
    for tap in range(begin, end, 4):
        w0, w1, w2, w3 = weight[tap], weight[tap + 1], weight[tap + 2], weight[tap + 3]
        r0, r1 = source[index[tap]], source[index[tap + 1]]
        r2, r3 = source[index[tap + 2]], source[index[tap + 3]]
        if tap == begin:
            for c in range(len(total)):
                total[c] = (w0 * _get(r0[c]) + w1 * _get(r1[c])) + (
                    w2 * _get(r2[c]) + w3 * _get(r3[c])
                )
        else:
            for c in range(len(total)):
                total[c] += (w0 * _get(r0[c]) + w1 * _get(r1[c])) + (
                    w2 * _get(r2[c]) + w3 * _get(r3[c])
                )


@_compiled
def spread_rows(grad, starts, index, weight, out):
    """The transpose of the sums: (to-cells, C) `grad` added into (from-cells, C) `out`."""
    channels = grad.shape[1]
    for cell in range(len(grad)):
        row = grad[cell]
        for tap in range(starts[cell], starts[cell + 1]):
            w, target = weight[tap], out[index[tap]]
            for c in range(channels):
                target[c] += w * row[c]


@_inlined
def _fetch_row(source, row):
    for c in range(0, source.shape[1], 64 // source.itemsize):
        _prefetch(source[row, c:])


@intrinsic
def _prefetch(typingctx, values):
    """Ask for the cache line where an array begins, without waiting for it."""

    def build(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        where = builder.bitcast(array.data, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(
            ir.VoidType(), [where.type, ir.IntType(32), ir.IntType(32), ir.IntType(32)]
        )
        function = builder.module.declare_intrinsic("llvm.prefetch", [where.type], kind)
        read, keep, data = (ir.Constant(ir.IntType(32), flag) for flag in (0, 3, 1))
        builder.call(function, [where, read, keep, data])
        return context.get_dummy_value()

    return types.none(values), build


@intrinsic
def _float16_to_float32(typingctx, bits):
    def build(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), build


@intrinsic
def _float32_to_float16(typingctx, value):
    def build(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), build


@intrinsic
def _bits_of(typingctx, value):
    def build(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), build


@intrinsic
def _float_of(typingctx, bits):
    def build(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), build


def _get(stored):
    """A stored number as float32; which conversion is decided by its type when compiling."""
    raise NotImplementedError


@overload(_get, inline="always")
def _compile_get(stored):
    if stored == types.uint16:
        return lambda stored: _float16_to_float32(stored)
    if stored == types.int16:
        return lambda stored: _float_of(np.uint32(np.uint16(stored)) << np.uint32(16))
    return lambda stored: np.float32(stored)


def _put(row, at, value):
    """Write a float32 into a row of results of any kind."""
    raise NotImplementedError


@overload(_put)
def _compile_put(row, at, value):
    if row.dtype == types.uint16:

        def put(row, at, value):
            row[at] = _float32_to_float16(value)

    elif row.dtype == types.int16:

        def put(row, at, value):
            bits = _bits_of(value)
            # Round half to even; not-a-number keeps a bit that says so.
            even = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> (
                np.uint32(16)
            )
            row[at] = np.int16(even) if value == value else np.int16(0x7FC0)
    else:

        def put(row, at, value):
            row[at] = value

    return put
