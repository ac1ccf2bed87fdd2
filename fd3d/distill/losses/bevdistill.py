"""`bevdistill`: BEVDistill (Chen et al., ICLR 2023), for a network with a centre head.

Dense: squared error, summed over channels, inside the Gaussians of the true boxes (smallest radius
1), over the sum of the mask. Sparse: features of both maps at the student's sampling points, each
behind a linear map and two layers, contrasted by InfoNCE at temperature .07: of all places the
apprentice's features of the expert's own place shall be the nearest. A centre head has no sampling
points; ours are the expert's 50 best boxes, as many as the published form teaches. Its third term,
the L1 distance of matched boxes, needs queries and is left out. Published weights: `WEIGHTS`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fd3d.data.batch import Batch
from fd3d.distill.align import Project, check_grids, seen_cells
from fd3d.distill.areas import cached_boxes, object_gaussians
from fd3d.distill.points import on_grid, values_at
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.network import Outputs
from fd3d.models.precision import full_precision

WEIGHTS = {"bevdistill.dense": 1e-2, "bevdistill.sparse": 0.2}


class BEVDistill(nn.Module):
    """Dense features near objects, and contrast between the expert's objects.

    Args:
        channels, grid: of the apprentice's map.
        expert_channels, expert_grid: of the expert's map; the comparison is made there.
        objects: of the expert's boxes, by score. temperature: of the contrast.
    """

    def __init__(
        self,
        *,
        channels: int,
        grid: BEVGrid,
        expert_channels: int,
        expert_grid: BEVGrid,
        objects: int = 50,
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        check_grids(grid, expert_grid)
        self.grid, self.objects, self.temperature = expert_grid, objects, temperature
        self.align = Project(
            channels=channels, expert_channels=expert_channels, shape=expert_grid.shape
        )
        self.project, self.expert_project = _encoder(expert_channels), _encoder(expert_channels)

    def forward(
        self, apprentice: Outputs, expert: dict[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The terms of `WEIGHTS`, unweighted; needs the signals bev and detections."""
        mine, theirs = self.align(apprentice.bev).float(), expert["bev"].detach().float()
        valid = seen_cells(expert)
        mine, theirs = mine * valid, theirs * valid
        mask = object_gaussians(batch, self.grid, min_radius=1).to(mine) * valid
        error = (mine - theirs).square().sum(dim=1, keepdim=True)
        best = [table[table[:, 9].argsort(descending=True)] for table in expert["detections"]]
        tables = [table[: self.objects] for table in best]
        boxes = cached_boxes(tables, batch, grid=self.grid)
        return {
            "bevdistill.dense": (error * mask).sum() / mask.sum().clamp(min=1.0),
            "bevdistill.sparse": self._contrast(mine, theirs, valid, boxes),
        }

    def _contrast(
        self, mine: Tensor, theirs: Tensor, valid: Tensor, boxes: Sequence[Tensor]
    ) -> Tensor:
        """InfoNCE, mean over frames; zero for one with fewer than two boxes to tell apart."""
        ours, wanted = [], []
        for row, frame in enumerate(boxes):
            centres = frame[on_grid(frame, self.grid), :2]
            unseen = values_at((~valid[row]).float(), centres, self.grid)[:, 0]
            centres = centres[unseen < 1e-3]
            ours.append(values_at(mine[row], centres, self.grid))
            wanted.append(values_at(theirs[row], centres, self.grid))
        counts = [len(frame) for frame in ours]
        if sum(counts) < 2:
            # Statistics of a batch need two; every parameter still gets a gradient.
            return mine.sum() * 0.0 + sum(p.sum() for p in self.parameters()) * 0.0
        with full_precision(mine):
            one, other = self.project(torch.cat(ours)), self.expert_project(torch.cat(wanted))
            ours = functional.normalize(one, dim=1).split(counts)
            wanted = functional.normalize(other, dim=1).split(counts)
            found = [
                _nearest(one, other, self.temperature) if len(one) > 1 else one.sum() * 0.0
                for one, other in zip(ours, wanted, strict=True)
            ]
        return torch.stack(found).mean()


def _nearest(ours: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of (M, C) expert's features choosing the apprentice's of the same row."""
    alike = wanted @ ours.T / temperature
    return functional.cross_entropy(alike, torch.arange(len(ours), device=alike.device))


def _encoder(channels: int) -> nn.Sequential:
    width = 2 * channels
    return nn.Sequential(
        nn.Linear(channels, width),
        nn.Linear(width, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width),
    )
