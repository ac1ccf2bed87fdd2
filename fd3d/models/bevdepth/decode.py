"""From the head's maps to boxes in the project's convention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fd3d.boxes import L, W, X, Y
from fd3d.data.batch import Detections
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.codes import decode_codes
from fd3d.models.bevdepth.config import DecodeConfig, NMSConfig
from fd3d.models.bevdepth.head import BRANCHES
from fd3d.models.bevdepth.nms import circle_nms, rotated_nms


@torch.no_grad()
def decode(
    tasks: Sequence[dict[str, Tensor]],
    dt: Tensor,
    *,
    grid: BEVGrid,
    config: DecodeConfig,
    convention: str = "old",
) -> list[Detections]:
    """One `Detections` a frame: tasks one after the other, inside a task by falling score.

    `tasks` as the head returns them; dt (B,) seconds turns displacements into velocities, which
    are zero where dt is zero (one where the network predicts velocities); `convention` as in
    `codes`. Results are on the maps' device, in the frame of `grid`.
    """
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(len(dt))]
    first_label = 0
    for maps, nms in zip(tasks, config.nms, strict=True):
        boxes, scores, classes = candidates(
            maps, grid=grid, count=config.candidates, convention=convention
        )
        limit = boxes.new_tensor(config.centre_limit)
        good = (scores > config.min_score) & (boxes[..., :3].abs() <= limit).all(dim=-1)
        # The exponential of a wild log size overflows; no submission may hold that.
        good &= boxes.isfinite().all(dim=-1)
        for index in range(len(dt)):
            chosen = good[index]
            box, label = boxes[index][chosen], classes[index][chosen]
            kept = suppress(box, label, nms).to(box.device)
            box[:, 7:] *= torch.where(dt[index] > 0, 1 / dt[index].clamp(min=1e-6), 0.0).to(box)
            found[index].append((box[kept], scores[index][chosen][kept], label[kept] + first_label))
        first_label += maps["heatmap"].shape[1]
    return [
        Detections(
            boxes=torch.cat([box for box, _, _ in parts]),
            scores=torch.cat([score for _, score, _ in parts]),
            labels=torch.cat([label for _, _, label in parts]),
            frame=grid.frame,
        )
        for parts in found
    ]


def candidates(
    maps: dict[str, Tensor], *, grid: BEVGrid, count: int, convention: str = "old"
) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` best cells of one task: boxes (B, K, 9), scores (B, K), classes (B, K).

    Boxes as `fd3d.boxes`, except that the last two columns are still displacements.
    """
    heat = maps["heatmap"].float().sigmoid().flatten(1)
    scores, index = heat.topk(min(count, heat.shape[1]), dim=1)
    cells = grid.nx * grid.ny
    classes = index // cells
    cell = index % cells
    joined = torch.cat([maps[name].float() for name in BRANCHES], dim=1).flatten(2)
    codes = joined.gather(2, cell[:, None].expand(-1, joined.shape[1], -1)).transpose(1, 2)
    x = (cell % grid.nx + codes[..., 0]) * grid.cell_x + grid.x_min
    y = (cell // grid.nx + codes[..., 1]) * grid.cell_y + grid.y_min
    return decode_codes(codes, x, y, convention), scores, classes


def suppress(boxes: Tensor, classes: Tensor, config: NMSConfig) -> Tensor:
    """(K,) int64 indices kept, on the host, of boxes (M, 9) sorted by falling score."""
    table = boxes.double().cpu().numpy()
    if config.circle:
        return torch.from_numpy(circle_nms(table[:, :2], config.threshold, config.keep))
    footprints = table[:, [X, Y, W, L, 6]]
    footprints[:, 2:4] *= np.asarray(config.factors)[classes.cpu().numpy(), None]
    return torch.from_numpy(rotated_nms(footprints, config.threshold, config.keep))
