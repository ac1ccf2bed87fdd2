"""Drawn inputs of `resample` and the measure by which paths are compared with the reference."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fd3d.grid import BEVGrid
from fd3d.resample.geometry import Plan, make_plan
from fd3d.resample.reference import resample_reference

STORED = (torch.int8, torch.uint8, torch.float16, torch.bfloat16, torch.float32)
# Of the largest number that a channel can stand for.
TOLERANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One drawn call; `arguments` are those of the paths, the map first."""

    map: Tensor
    scale: Tensor
    zero: Tensor
    plan: Plan
    from_grid: BEVGrid
    to_grid: BEVGrid
    matrix: np.ndarray | None
    kind: str

    def reference(self) -> tuple[Tensor, Tensor]:
        return resample_reference(self.map, scale=self.scale, zero=self.zero, plan=self.plan)

    def bound(self) -> Tensor:
        """(B, C, 1, 1): the error that is allowed in each channel."""
        largest = self.map.double().abs().amax(dim=(2, 3)) if self.map.numel() else self.scale
        reach = self.zero.abs() + self.scale.abs() * largest
        gain = torch.from_numpy(self.plan.gain)[:, None] if self.plan.density else 1.0
        return TOLERANCE * (reach * gain)[:, :, None, None] + 1e-30


def draw_grid(rng: np.random.Generator, frame: str, most: int = 24) -> BEVGrid:
    """A grid around the origin, square or not; now and then of a single cell."""
    ny, nx = (int(n) for n in rng.integers(1, most + 1, size=2))
    if rng.uniform() < 0.1:
        ny = nx = 1
    x, y = rng.uniform(-60, 0, size=2)
    return BEVGrid(
        x_min=x,
        x_max=x + rng.uniform(20, 110),
        y_min=y,
        y_max=y + rng.uniform(20, 110),
        nx=nx,
        ny=ny,
        frame=frame,
    )


def draw_matrix(rng: np.random.Generator, one_frame: bool) -> np.ndarray | None:
    """None, an augmentation, a tilted rigid transform, any affine map, or one far away."""
    which = rng.integers(0, 6)
    if which == 0 and one_frame:
        return None
    angle, size = rng.uniform(-3.2, 3.2), rng.uniform(0.6, 1.6)
    turn = size * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if which == 1:
        return np.diag([*rng.choice([-1.0, 1.0], size=2), 1.0])
    if which == 2:
        matrix = np.eye(4)
        matrix[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)) * [1, 1, 0.1] + np.eye(3) * 3)[0]
        matrix[:3, 3] = rng.uniform(-3, 3, size=3)
        return matrix
    matrix = np.eye(3)
    matrix[:2, :2] = turn @ np.diag(rng.choice([-1.0, 1.0], size=2))
    if which == 3:
        matrix[:2, :2] += rng.uniform(-0.3, 0.3, size=(2, 2))
    matrix[:2, 2] = rng.uniform(-8, 8, size=2) if which != 4 else rng.choice([9e3, -1e9, 30.0])
    return matrix


def draw_case(seed: int) -> Case:
    """The case of a seed: grids, matrices, types, strides, batch sizes, kinds."""
    rng = np.random.default_rng(seed)
    frames = int(rng.choice([0, 1, 1, 1, 1, 2, 2, 3, 3]))
    from_grid = draw_grid(rng, str(rng.choice(["lidar", "ego"])))
    to_grid = draw_grid(rng, str(rng.choice(["lidar", "ego"])))
    if rng.uniform() < 0.15:
        to_grid = BEVGrid.from_dict({**from_grid.to_dict(), "nx": 1 + from_grid.nx // 2})
    one_frame = from_grid.frame == to_grid.frame
    matrix = draw_matrix(rng, one_frame)
    if matrix is not None and rng.uniform() < 0.5:
        further = [matrix, *(draw_matrix(rng, False) for _ in range(8))]
        matrix = np.array([m for m in further if m.shape == matrix.shape][:1] * frames)
        matrix = matrix if frames else None if one_frame else np.eye(3)
    if matrix is not None and matrix.ndim == 3:
        # Each frame its own: turned a little further than the one before.
        for frame in range(1, frames):
            turn = np.eye(matrix.shape[-1])
            turn[:2, :2] = [[np.cos(frame), -np.sin(frame)], [np.sin(frame), np.cos(frame)]]
            matrix[frame] = turn @ matrix[frame]
    channels = int(rng.choice([1, 2, 3, 4, 5, 8, 12, 20]))
    kind = str(rng.choice(["intensity", "density"]))
    return Case(
        map=draw_map(rng, (frames, channels, *from_grid.shape)),
        scale=torch.from_numpy(rng.uniform(0.01, 2, size=(frames, channels))).float(),
        zero=torch.from_numpy(rng.normal(size=(frames, channels))).float(),
        plan=make_plan(
            from_grid=from_grid, to_grid=to_grid, matrix=matrix, frames=frames, kind=kind
        ),
        from_grid=from_grid,
        to_grid=to_grid,
        matrix=matrix,
        kind=kind,
    )


def draw_map(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Numbers of any stored type: planar, channels-last, or a slice of something wider."""
    dtype = STORED[rng.integers(0, len(STORED))]
    strides = rng.choice(["planar", "last", "slice"])
    wider = (*shape[:3], shape[3] + 3) if strides == "slice" else shape
    if dtype in (torch.int8, torch.uint8):
        low, high = (-128, 128) if dtype == torch.int8 else (0, 256)
        made = torch.from_numpy(rng.integers(low, high, size=wider)).to(dtype)
    else:
        made = torch.from_numpy(rng.normal(size=wider) * 3).to(dtype)
    if strides == "last":
        return made.contiguous(memory_format=torch.channels_last)
    return made[..., 2 : 2 + shape[3]] if strides == "slice" else made


def draw_out(case: Case, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An empty result for a case, of any strides, full of something that must be overwritten."""
    shape = (*case.map.shape[:2], *case.plan.to_shape)
    out = torch.full(shape, float("nan"), dtype=dtype)
    which = seed % 4
    if which == 0 or (which == 3 and case.map.stride(1) == 1):
        return out.contiguous(memory_format=torch.channels_last)
    if which != 2:
        return out
    return torch.full((*shape[:3], 2 * shape[3]), float("nan"), dtype=dtype)[..., ::2]


def check_close(case: Case, out: Tensor, valid: Tensor, exact: tuple[Tensor, Tensor]) -> None:
    """The result is the reference to `TOLERANCE`, the mask is the same."""
    assert torch.equal(valid, exact[1])
    wrong = (out.double() - exact[0]).abs()
    assert (wrong <= case.bound()).all(), float((wrong / case.bound()).max())
