"""`response`: what the expert's head says, for networks with a centre head.

Heatmap: cross-entropy of the apprentice's class logits against the expert's scores, weighted by
the square of their distance (Li et al., "Generalized Focal Loss"), over the sum of the scores.
Boxes: at the cells of the expert's boxes, the detector's own L1 loss with these boxes in place of
the truth. The form and the weights are ours, with the ratio of the detector's own losses.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fd3d.data.batch import Batch
from fd3d.distill.align import check_grids, seen_cells
from fd3d.distill.areas import cached_boxes
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.config import BEVDepthConfig, LossConfig
from fd3d.models.bevdepth.losses import box_losses
from fd3d.models.bevdepth.network import Outputs
from fd3d.models.bevdepth.targets import make_targets

WEIGHTS = {"response.heatmap": 1.0, "response.boxes": 0.25}


class Response(nn.Module):
    """Class scores and boxes of the expert as soft truth.

    Args:
        config: of the apprentice, for its tasks and its form of boxes.
        expert_grid: of the expert's heatmap.
        threshold: score from which the expert's boxes are taught.
    """

    def __init__(
        self, *, config: BEVDepthConfig, expert_grid: BEVGrid, threshold: float = 0.3
    ) -> None:
        super().__init__()
        self.ratio = check_grids(config.grid, expert_grid)
        self.config, self.threshold = config, threshold

    def forward(
        self, apprentice: Outputs, expert: dict[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The terms of `WEIGHTS`, unweighted; needs the signals heatmap (scores) and detections."""
        logits = torch.cat([maps["heatmap"].float() for maps in apprentice.tasks], dim=1)
        # The best of the cells that nest in one: their mean would flatten the peaks.
        wanted = functional.max_pool2d(expert["heatmap"].detach().float(), self.ratio)
        # A cell that holds unseen ones is not known.
        known = 1 - functional.max_pool2d((~seen_cells(expert)).float(), self.ratio)
        wanted = wanted * known
        mine = logits.sigmoid()
        entropy = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        focal = (entropy * (mine - wanted).square() * known).sum() / wanted.sum().clamp(min=1.0)
        return {"response.heatmap": focal, "response.boxes": self._boxes(apprentice, expert, batch)}

    def _boxes(self, apprentice: Outputs, expert: dict[str, Tensor], batch: Batch) -> Tensor:
        config = self.config
        tables = [table[table[:, 9] >= self.threshold] for table in expert["detections"]]
        targets = make_targets(
            boxes=cached_boxes(tables, batch, grid=config.grid),
            labels=[table[:, 10].long() for table in tables],
            dt=batch.dt if config.displacement else torch.ones_like(batch.dt),
            grid=config.grid,
            tasks=config.tasks,
            convention=config.convention,
        )
        plain = LossConfig(bbox=1.0)
        terms = [
            sum(box_losses(maps, target, plain).values())
            for maps, target in zip(apprentice.tasks, targets, strict=True)
        ]
        return sum(terms)
