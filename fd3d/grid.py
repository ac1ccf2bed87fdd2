"""Bird's-eye-view grids: which cell of a map lies where, in metres, and in which frame.

A BEV map is an array (..., Y, X): row = index along y, column = index along x, row 0 at `y_min`.
Cell (row, col) covers [x_min + col * cell_x, x_min + (col + 1) * cell_x), its centre half a cell
further. Two grids are related by an affine map; so is a BEV augmentation.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from fd3d.errors import UsageError

# lidar: nuScenes LIDAR_TOP of the keyframe, x right, y forward, z up.
# ego: the keyframe's ego pose, x forward, y left, z up.
FRAMES = ("lidar", "ego")


@dataclass(frozen=True, kw_only=True)
class BEVGrid:
    """A rectangle of `ny` x `nx` cells in the ground plane of `frame`; bounds in metres."""

    x_min: float
    x_max: float
    y_min: float
    y_max: float
    nx: int
    ny: int
    frame: str = "lidar"

    def __post_init__(self) -> None:
        if self.frame not in FRAMES:
            raise UsageError(f"BEV frame {self.frame!r} is unknown: use one of {', '.join(FRAMES)}")
        if self.nx < 1 or self.ny < 1 or self.x_max <= self.x_min or self.y_max <= self.y_min:
            raise UsageError(f"BEV grid {self} is empty: give at least one cell and max above min")

    @classmethod
    def square(cls, *, half_extent: float, cells: int, frame: str = "lidar") -> BEVGrid:
        """A square grid centred on the origin of `frame`, 2 * half_extent metres wide."""
        return cls(
            x_min=-half_extent,
            x_max=half_extent,
            y_min=-half_extent,
            y_max=half_extent,
            nx=cells,
            ny=cells,
            frame=frame,
        )

    @classmethod
    def from_dict(cls, values: dict) -> BEVGrid:
        """The inverse of `to_dict`; unknown or missing fields raise `UsageError`."""
        try:
            return cls(**values)
        except TypeError as error:
            raise UsageError(f"not a BEV grid description ({error}): {values}") from None

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def cell_x(self) -> float:
        return (self.x_max - self.x_min) / self.nx

    @property
    def cell_y(self) -> float:
        return (self.y_max - self.y_min) / self.ny

    @property
    def shape(self) -> tuple[int, int]:
        """(Y, X) of a map on this grid."""
        return self.ny, self.nx

    def same_extent(self, other: BEVGrid) -> bool:
        """True when both cover the same rectangle of the same frame, at any number of cells."""
        bounds = ("x_min", "x_max", "y_min", "y_max")
        return self.frame == other.frame and all(
            abs(getattr(self, name) - getattr(other, name)) < 1e-9 for name in bounds
        )

    def cell_to_metres(self) -> np.ndarray:
        """(3, 3) float64: (col, row, 1) of a cell, centres at whole numbers, to (x, y, 1)."""
        return np.array(
            [
                [self.cell_x, 0.0, self.x_min + self.cell_x / 2],
                [0.0, self.cell_y, self.y_min + self.cell_y / 2],
                [0.0, 0.0, 1.0],
            ]
        )

    def metres_to_cell(self) -> np.ndarray:
        """(3, 3) float64, the inverse of `cell_to_metres`."""
        return np.linalg.inv(self.cell_to_metres())

    def __str__(self) -> str:
        return (
            f"{self.ny}x{self.nx} {self.frame} "
            f"[{self.x_min:g}, {self.x_max:g}] x [{self.y_min:g}, {self.y_max:g}] m"
        )
