"""Where preset focal keeps every cell: at objects of the ground truth and of the expert."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cache_tools.presets import SignalCodec
from fd3d.boxes import transform
from fd3d.data.index import FrameIndex
from fd3d.distill.areas import footprints
from fd3d.grid import BEVGrid

_SCORE = 9


@dataclass(frozen=True, kw_only=True)
class Focus:
    """The mask of what is kept of a frame's maps.

    Args:
        index: where the ground truth is.
        grid: of the maps.
        codec: how many of the expert's boxes count, and how far the mask reaches around each.
    """

    index: FrameIndex
    grid: BEVGrid
    codec: SignalCodec

    def __call__(self, token: str, detections: np.ndarray) -> np.ndarray:
        """(Y, X) bool for the frame `token`, whose `detections` are a cached table (M, 11)."""
        frame = self.index.frame(self.index.position(token))
        best = detections[np.argsort(-detections[:, _SCORE], kind="stable")]
        best = best[best[:, _SCORE] >= self.codec.focus_score][: self.codec.focus_boxes, :9]
        if self.grid.frame != "lidar":
            best = transform(best, np.linalg.inv(frame.pose("ego")) @ frame.pose("lidar"))
        boxes = np.concatenate([frame.boxes_in(self.grid.frame), best])
        margin = self.codec.focus_margin
        return footprints(torch.from_numpy(boxes), grid=self.grid, margin=margin).numpy()
