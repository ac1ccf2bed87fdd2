"""What the head should say: heatmaps, and ground-truth boxes as codes (see `codes`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fd3d.boxes import VX, VY, H
from fd3d.classes import CLASSES
from fd3d.grid import BEVGrid
from fd3d.heatmap import box_cells, box_radii, draw_gaussians
from fd3d.models.bevdepth.codes import encode

# G1 trains on at most this many objects of a task in a frame, chosen by class, then input order.
MAX_OBJECTS = 500


@dataclass(frozen=True, kw_only=True)
class TaskTargets:
    """Targets of one task for a batch.

    heatmap: (B, classes, Y, X) float32. Objects, by frame, class, input order: frame (K,) and cell
    (K,) = row * X + col, int64; codes (K, 10) float32 as in `codes`, velocities times `dt`; known
    (K, 10) bool, False where the annotation has no velocity.
    """

    heatmap: Tensor
    frame: Tensor
    cell: Tensor
    codes: Tensor
    known: Tensor


def make_targets(
    *,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    dt: Tensor,
    grid: BEVGrid,
    tasks: Sequence[Sequence[str]],
    convention: str = "old",
) -> tuple[TaskTargets, ...]:
    """Targets of every task; B frames of boxes (M, 9) and labels (M,), dt (B,) seconds that turn
    velocities into displacements, one where the network predicts velocities; `convention` as in
    `codes`.

    Centres outside of the grid and boxes without a size are left out.
    """
    counts = torch.tensor([len(item) for item in labels], device=dt.device)
    frame = torch.repeat_interleave(torch.arange(len(boxes), device=dt.device), counts)
    everything = torch.cat([item.float() for item in boxes]).to(dt.device)
    label = torch.cat(list(labels)).to(dt.device)

    order = torch.argsort(frame * len(CLASSES) + label, stable=True)
    frame, everything, label = frame[order], everything[order], label[order]
    exact, cells, valid = box_cells(everything, grid)
    task_of_class = [task for task, names in enumerate(tasks) for _ in names]
    task = torch.tensor(task_of_class, device=dt.device)[label]
    valid &= _rank(frame * len(tasks) + task) < MAX_OBJECTS
    valid &= everything[:, H] > 0

    frame, everything, label, task = frame[valid], everything[valid], label[valid], task[valid]
    exact, cells = exact[valid], cells[valid]
    heatmap = draw_gaussians(
        cells=cells,
        radii=box_radii(everything, grid),
        planes=frame * len(CLASSES) + label,
        count=len(boxes) * len(CLASSES),
        shape=grid.shape,
    ).view(len(boxes), len(CLASSES), *grid.shape)
    codes, known = _codes(everything, exact - cells, dt[frame], convention)
    cell = cells[:, 1] * grid.nx + cells[:, 0]
    maps = heatmap.split([len(names) for names in tasks], dim=1)
    return tuple(
        TaskTargets(
            heatmap=maps[index],
            frame=frame[task == index],
            cell=cell[task == index],
            codes=codes[task == index],
            known=known[task == index],
        )
        for index in range(len(tasks))
    )


def _rank(group: Tensor) -> Tensor:
    """(M,) how many earlier entries have the same value; `group` is sorted."""
    position = torch.arange(len(group), device=group.device)
    return position - torch.searchsorted(group, group)


def _codes(boxes: Tensor, offset: Tensor, dt: Tensor, convention: str) -> tuple[Tensor, Tensor]:
    moving = torch.cat([boxes[:, :VX], boxes[:, VX : VY + 1] * dt[:, None]], dim=1)
    codes = encode(moving, offset, convention)
    known = ~codes.isnan()
    return codes.nan_to_num(nan=0.0), known
