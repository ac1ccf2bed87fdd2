"""Moving an expert's maps to the grid on which they are compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fd3d.data.batch import Batch
from fd3d.distill.signals import SignalSpec
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid
from fd3d.resample import resample


@dataclass(frozen=True, kw_only=True)
class Move:
    """From the expert's grid to the grid of comparison, which may lie in the other frame; `follow`
    also moves maps as the frames' BEV augmentation moves the ground."""

    source: BEVGrid
    target: BEVGrid
    follow: bool = False

    def __call__(self, maps: Tensor, frames: Batch, **options: Any) -> tuple[Tensor, Tensor]:
        """`fd3d.resample.resample` of (B, C, Y, X) maps of B frames: the maps, and where they
        have a source."""
        return resample(
            maps,
            from_grid=self.source,
            to_grid=self.target,
            matrix=self._matrices(frames),
            **options,
        )

    def moved(self, spec: SignalSpec) -> SignalSpec:
        """The spec of a map after the move."""
        return replace(spec, grid=self.target, shape=(spec.shape[0], *self.target.shape))

    def valid(self, frames: Batch | None) -> Tensor:
        """(B, 1, Y, X) bool on the CPU: which cells the moved maps know; (1, 1, Y, X) without the
        frames, where none of them moves the ground."""
        blank = torch.zeros((1 if frames is None else len(frames), 1, *self.source.shape))
        return self(blank, frames)[1]

    @property
    def leaves_gaps(self) -> bool:
        """Whether cells of the target may have no source."""
        turned = self.follow or self.source.frame != self.target.frame
        return turned or not _covers(self.source, self.target)

    def _matrices(self, frames: Batch) -> np.ndarray | None:
        between = self._between(frames)
        if not self.follow or frames.bev_augment is None:
            return between
        augment = np.tile(np.eye(4), (len(frames), 1, 1))
        augment[:, :3, :3] = frames.bev_augment.double().numpy()
        return augment if between is None else augment @ between

    def _between(self, frames: Batch) -> np.ndarray | None:
        """(B, 4, 4) from the source's frame to the target's; None where they are one."""
        if self.source.frame == self.target.frame:
            return None
        if frames.ego2lidar is None:
            raise UsageError(
                f"a map in the {self.source.frame} frame is compared on {self.target}, and the "
                "frames do not say how the two lie: give their batches ego2lidar"
            )
        ego2lidar = frames.ego2lidar.double().numpy()
        return ego2lidar if self.source.frame == "ego" else np.linalg.inv(ego2lidar)


def moves_of(
    specs: dict[str, SignalSpec], grid: BEVGrid | None, *, follow: bool = False
) -> dict[str, Move]:
    """The moves of the maps that are not on `grid` yet, or that follow an augmentation."""
    moves = {}
    for name, spec in specs.items():
        if spec.grid is None or (not follow and (grid is None or spec.grid == grid)):
            continue
        moves[name] = Move(source=spec.grid, target=grid or spec.grid, follow=follow)
    return moves


def _covers(source: BEVGrid, target: BEVGrid) -> bool:
    blank = torch.zeros((1, 1, *source.shape))
    return bool(resample(blank, from_grid=source, to_grid=target, path="torch")[1].all())
