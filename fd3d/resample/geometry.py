"""Where each cell of a target map reads its source: the geometry that all implementations share.

A cell of the to-grid is split into sx * sy equal parts, and each part's centre is a position in
the from-grid. Positions are whole multiples of 2**-32 of a source cell, so that float64, CPU and
GPU arithmetic find the very same source cells, and the same cells without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fd3d.errors import UsageError

KINDS = ("intensity", "density")

# One source cell in the unit of `Plan.steps`.
ONE = 1 << 32
# Parts of a cell along one axis; more than this is a matrix in the wrong unit, not a wish.
MAX_PARTS = 1024
# Keeps sums of products below 2**63; everything that far away is outside in any case.
_FARTHEST = float(1 << 60)


class Grid(Protocol):
    """What `resample` asks of a grid; `fd3d.grid.BEVGrid` and `PixelGrid` have it."""

    frame: str

    @property
    def shape(self) -> tuple[int, int]:
        """(Y, X) of a map on this grid."""

    def cell_to_metres(self) -> np.ndarray:
        """(3, 3): (col, row, 1) of a cell, centres at whole numbers, to a point of the frame."""


@dataclass(frozen=True, kw_only=True)
class PixelGrid:
    """A `pv` map over an image of `width` x `height` pixels, in `ny` x `nx` equal cells.

    Its "frame" is the image plane and its unit the pixel: pixel (i, j) covers [i, i + 1) x
    [j, j + 1), x to the right and y downwards. A matrix between two of them is the affine part
    of an image transform (resize, crop, flip, rotation).
    """

    width: int
    height: int
    nx: int
    ny: int
    frame: str = "image"

    def __post_init__(self) -> None:
        if min(self.width, self.height, self.nx, self.ny) < 1:
            raise UsageError(f"pixel grid {self} is empty: give at least one pixel and one cell")

    @property
    def shape(self) -> tuple[int, int]:
        """(Y, X) of a map on this grid."""
        return self.ny, self.nx

    def cell_to_metres(self) -> np.ndarray:
        """(3, 3) float64: (col, row, 1), centres at whole numbers, to pixels (x, y, 1)."""
        wide, high = self.width / self.nx, self.height / self.ny
        return np.array([[wide, 0.0, wide / 2], [0.0, high, high / 2], [0.0, 0.0, 1.0]])

    def __str__(self) -> str:
        return f"{self.ny}x{self.nx} image [0, {self.width}] x [0, {self.height}] px"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The positions of B frames.

    Args:
        steps: (B, 8) int64, `ax bx cx ay by cy sx sy`. Part i of sx and j of sy of cell (row,
            col) lies at column (ax * X + bx * Y + cx) / ONE and row (ay * X + by * Y + cy) / ONE
            of the source, X = col * sx + i, Y = row * sy + j; cell centres at whole numbers.
        gain: (B,) float64, the source cells that one target cell covers. Only densities use it.
        density: sum over the covered area instead of mean.
        from_shape, to_shape: (Y, X) of source and target.
    """

    steps: np.ndarray
    gain: np.ndarray
    density: bool
    from_shape: tuple[int, int]
    to_shape: tuple[int, int]

    def __len__(self) -> int:
        return len(self.steps)

    def same(self, frame: int, other: int) -> bool:
        """True when two frames of the batch read the same positions."""
        return bool((self.steps[frame] == self.steps[other]).all())


def make_plan(
    *, from_grid: Grid, to_grid: Grid, matrix: object, frames: int, kind: str = "intensity"
) -> Plan:
    """The plan of `frames` frames.

    Args:
        from_grid, to_grid: of source and target.
        matrix: points of the from-grid's frame to points of the to-grid's, metres (pixels for
            `PixelGrid`), as columns: to = matrix @ from. (3, 3) on (x, y, 1), or (4, 4) on
            (x, y, z, 1), of which ground points, z = 0, are followed and their new height is
            dropped; or (B, 3, 3) or (B, 4, 4), one for each frame. None = the frames are one.
        frames: B.
        kind: one of `KINDS`.

    A matrix that is singular, not finite, not affine or of another size, and frames that differ
    without a matrix, raise `UsageError`.
    """
    if kind not in KINDS:
        raise UsageError(f"map kind {kind!r} is not known: use one of {', '.join(KINDS)}")
    ground = _ground_matrices(matrix, frames, from_grid, to_grid)
    back = np.linalg.inv(from_grid.cell_to_metres()) @ np.linalg.inv(ground)
    back = back @ to_grid.cell_to_metres()
    # How many source cells long the two edges of a target cell are: the parts' spacing.
    edges = np.hypot(back[:, 0, :2], back[:, 1, :2])
    # 192 -> 128 is 1.5 exactly or a hair beside it, depending on the extent; decide it once.
    parts = np.maximum(np.floor(np.round(edges, 9) + 0.5), 1.0)
    if parts.max(initial=1.0) > MAX_PARTS:
        raise UsageError(
            f"one cell of {to_grid} would cover {parts.max():.0f} cells of {from_grid} along an "
            f"axis, more than {MAX_PARTS}: is the matrix in metres?"
        )
    steps = np.empty((frames, 8), np.int64)
    linear = back[:, :2, :2] / parts[:, None, :]
    # Part 0 of cell 0 lies (parts - 1) / 2 parts before the cell's centre.
    offset = back[:, :2, 2] - (linear * (parts[:, None, :] - 1) / 2).sum(axis=2)
    for axis, start in ((0, 0), (1, 3)):
        steps[:, start] = np.rint(linear[:, axis, 0] * ONE)
        steps[:, start + 1] = np.rint(linear[:, axis, 1] * ONE)
        steps[:, start + 2] = np.rint(np.clip(offset[:, axis] * ONE, -_FARTHEST, _FARTHEST))
    steps[:, 6:] = parts
    return Plan(
        steps=steps,
        gain=np.abs(np.linalg.det(back[:, :2, :2])),
        density=kind == "density",
        from_shape=tuple(from_grid.shape),
        to_shape=tuple(to_grid.shape),
    )


def _ground_matrices(matrix: object, frames: int, from_grid: Grid, to_grid: Grid) -> np.ndarray:
    if matrix is None:
        if from_grid.frame != to_grid.frame:
            raise UsageError(
                f"a map in the {from_grid.frame} frame cannot come to {to_grid} without the "
                "matrix between the two frames: pass matrix="
            )
        matrix = np.eye(3)
    found = np.asarray(matrix, dtype=np.float64)
    size = found.shape[-1] if found.ndim in (2, 3) else 0
    if size not in (3, 4) or found.shape[-2] != size or found.shape[:-2] not in ((), (frames,)):
        raise UsageError(
            f"matrix of shape {found.shape} for {frames} frames: give (3, 3) or (4, 4), or one "
            "of them for each frame"
        )
    found = np.broadcast_to(found, (frames, size, size))
    keep = [0, 1, size - 1]
    ground = found[:, keep][:, :, keep]
    if not np.isfinite(ground).all() or (ground[:, 2] != [0.0, 0.0, 1.0]).any():
        raise UsageError("matrix is not an affine map with finite numbers: its last row is 0 .. 1")
    if (np.abs(np.linalg.det(ground[:, :2, :2])) < 1e-12).any():
        raise UsageError("matrix is singular: it would squeeze the whole map into a line")
    return ground
