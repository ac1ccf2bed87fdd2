"""Exact ray casting of boxes through a pinhole, for all boxes and pixels of an image at once.

For one face of a box, 1 / depth and the two coordinates on the face times 1 / depth are linear in
the pixel coordinates (u, v). So the pixels whose rays meet the face lie between straight lines, a
row of them is one span, and depth needs no intersection test: the result is that of casting every
ray at every box, without doing so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fd3d.data.synthetic.parts import Parts, Posed

FAR = 160.0  # metres of depth
_OTHERS = ((1, 2), (0, 2), (0, 1))


@dataclass(frozen=True, kw_only=True)
class Faces:
    """The faces that look at the camera. Linear functions are rows (a, b, c): a u + b v + c.

    depth: (F, 3) for 1 / depth; across, up: (F, 3) for the position on the face, -1 to 1, times
    1 / depth; edges: (F, 5, 3) functions that are positive on the face; part, side: (F,) row in
    `Parts` and face number as in the atlas; normal: (F, 3) outward, global frame.
    """

    depth: np.ndarray
    across: np.ndarray
    up: np.ndarray
    edges: np.ndarray
    part: np.ndarray
    side: np.ndarray
    normal: np.ndarray


def visible_faces(parts: Parts, posed: Posed) -> Faces:
    """The at most three faces of each posed part whose outside the camera is on.

    `posed.turn` must take homogeneous pixels (u, v, 1) to rays of depth 1.
    """
    collected = []
    half = parts.half[posed.row]
    for axis, (b, c) in enumerate(_OTHERS):
        sign = np.sign(posed.eye[:, axis])
        gap = sign * half[:, axis] - posed.eye[:, axis]
        seen = np.flatnonzero(sign * gap < -1e-3)
        if len(seen) == 0:
            continue
        depth = posed.turn[seen, axis] / gap[seen, None]
        across = (posed.eye[seen, b, None] * depth + posed.turn[seen, b]) / half[seen, b, None]
        up = (posed.eye[seen, c, None] * depth + posed.turn[seen, c]) / half[seen, c, None]
        in_reach = depth - np.array([0.0, 0.0, 1.0 / FAR])
        edges = np.stack([depth - across, depth + across, depth - up, depth + up, in_reach], axis=1)
        normal = np.zeros((len(seen), 3))
        if axis == 2:
            normal[:, 2] = sign[seen]
        else:
            along = (posed.cos[seen], posed.sin[seen])
            normal[:, 0] = sign[seen] * (along[0] if axis == 0 else -along[1])
            normal[:, 1] = sign[seen] * (along[1] if axis == 0 else along[0])
        side = 2 * axis + (sign[seen] < 0)
        collected.append((depth, across, up, edges, posed.row[seen], side.astype(np.int64), normal))
    if not collected:
        none = np.zeros((0, 3))
        flat = np.zeros(0, dtype=np.int64)
        return Faces(
            depth=none,
            across=none,
            up=none,
            edges=np.zeros((0, 5, 3)),
            part=flat,
            side=flat,
            normal=none,
        )
    joined = [np.concatenate(column) for column in zip(*collected, strict=True)]
    names = ("depth", "across", "up", "edges", "part", "side", "normal")
    return Faces(**dict(zip(names, joined, strict=True)))


def spans(
    edges: np.ndarray, *, width: int, height: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(face, row, first column, number of columns) of each run of pixels inside `edges` (F, E, 3).

    A pixel is inside when its centre is.
    """
    scale = np.abs(edges[..., :2]).max(axis=-1, keepdims=True)
    a, b, c = np.moveaxis((edges / np.maximum(scale, 1e-12)).astype(np.float32), -1, 0)
    # An edge parallel to the rows bounds no column; a tiny slope puts its bound far off instead.
    a = np.where(np.abs(a) < 1e-6, np.float32(1e-6), a)
    rows = np.arange(height, dtype=np.float32) + np.float32(0.5)
    bound = (b / -a)[..., None] * rows + (c / -a)[..., None]
    rising = (a > 0)[..., None]
    low = np.where(rising, bound, np.float32(-1e9)).max(axis=1)
    high = np.where(rising, np.float32(1e9), bound).min(axis=1)
    first = np.ceil(np.clip(low, 0.0, width) - np.float32(0.5)).astype(np.int32)
    last = np.floor(np.clip(high, 0.0, width) - np.float32(0.5)).astype(np.int32)
    face, row = np.nonzero(last >= first)
    first = first[face, row]
    return face, row, first, last[face, row] - first + 1


def expand(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(run, place) of every element of the runs first[i], first[i] + 1, ... (count[i] of them)."""
    run = np.repeat(np.arange(len(count)), count)
    ends = np.cumsum(count)
    place = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - count), count)
    return run, place


@dataclass(frozen=True, kw_only=True)
class Fragments:
    """Pixels of faces that nothing nearer hides: flat pixel number, face, u and v, 1 / depth."""

    pixel: np.ndarray
    face: np.ndarray
    u: np.ndarray
    v: np.ndarray
    inverse_depth: np.ndarray


def rasterise(
    faces: Faces, nearest: np.ndarray, owner: np.ndarray | None = None, owners: int = 0
) -> tuple[Fragments, np.ndarray | None]:
    """The visible fragments; `nearest` (H, W) float32, 1 / depth so far, is brought up to date.

    With `owner` (F,), the actor of each face, also (owners, 2) int64: pixels of each actor that are
    visible, and pixels that would be if nothing else were there.
    """
    height, width = nearest.shape
    face, row, first, count = spans(faces.edges, width=width, height=height)
    run, column = expand(first, count)
    v_run = row + 0.5
    a, b, c = faces.depth[face].T
    u = column.astype(np.float32) + np.float32(0.5)
    base, slope = (b * v_run + c).astype(np.float32), a.astype(np.float32)
    inverse_depth = base[run] + slope[run] * u
    pixel = (row * width)[run] + column
    flat = nearest.reshape(-1)
    np.maximum.at(flat, pixel, inverse_depth)
    seen = np.flatnonzero(inverse_depth >= flat[pixel])
    counts = None
    if owner is not None:
        actor_of_run = owner[face]
        counts = np.zeros((owners, 2), dtype=np.int64)
        counts[:, 0] = np.bincount(actor_of_run[run[seen]], minlength=owners)
        counts[:, 1] = _silhouettes(actor_of_run, row, first, count, run, column, owners)
    run = run[seen]
    fragments = Fragments(
        pixel=pixel[seen],
        face=face[run],
        u=u[seen],
        v=v_run[run].astype(np.float32),
        inverse_depth=inverse_depth[seen],
    )
    return fragments, counts


def _silhouettes(actor, row, first, count, run, column, owners) -> np.ndarray:
    """(owners,) pixels covered by each actor, those covered by several of its faces once."""
    total = np.zeros(owners, dtype=np.int64)
    if len(actor) == 0:
        return total
    top, bottom = np.full(owners, 1 << 30), np.zeros(owners, dtype=np.int64)
    left, right = np.full(owners, 1 << 30), np.zeros(owners, dtype=np.int64)
    np.minimum.at(top, actor, row)
    np.maximum.at(bottom, actor, row + 1)
    np.minimum.at(left, actor, first)
    np.maximum.at(right, actor, first + count)
    wide = np.maximum(right - left, 0)
    area = np.maximum(bottom - top, 0) * wide
    start = np.cumsum(area) - area
    covered = np.zeros(int(area.sum()), dtype=bool)
    key = start[actor] + (row - top[actor]) * wide[actor] - left[actor]
    covered[key[run] + column] = True
    present = np.flatnonzero(area)
    total[present] = np.add.reduceat(covered, start[present], dtype=np.int64)
    return total
