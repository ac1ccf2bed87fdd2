"""The distillation head's own training: each true box to one query, then focal loss and L1.

As in DETR (Carion et al.), with the weights of DETR3D: focal loss 2; L1 .25 of metres, log sizes,
sine and cosine of yaw, a fifth of that for velocities; the matching costs are the same.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fd3d.data.batch import Batch
from fd3d.distill.head import HEIGHTS, HeadOutputs, encode
from fd3d.distill.points import on_grid, values_at
from fd3d.grid import BEVGrid

WEIGHTS = {"head.class": 2.0, "head.box": 0.25}
_MATCHED = 8  # velocities, which may be unknown, do not decide a match
_ALPHA, _GAMMA = 0.25, 2.0


def head_losses(
    found: HeadOutputs, batch: Batch, grid: BEVGrid, valid: Tensor
) -> dict[str, Tensor]:
    """Terms "head.class" and "head.box", unweighted (`WEIGHTS`), summed over the layers, both
    divided by the number of true boxes (at least one).

    Args:
        batch: boxes and labels in the grid's frame; those beyond the grid are left out.
        valid: (B, 1, Y, X) bool: cells that the expert saw; boxes elsewhere are left out.
    """
    truth = [_on_grid(*frame, grid) for frame in zip(batch.boxes, batch.labels, valid, strict=True)]
    count = max(1, sum(len(labels) for _, labels in truth))
    weights = code_weights(found.codes[0], grid)
    classes, boxes = [], []
    for logits, codes in zip(found.logits, found.codes, strict=True):
        wanted = torch.zeros_like(logits)
        error = codes.sum() * 0.0
        for row, (true, labels) in enumerate(truth):
            query, box = match(logits[row], codes[row], true, labels, weights)
            wanted[row, query, labels[box]] = 1.0
            apart = (codes[row, query] - true[box].nan_to_num()).abs() * weights
            error = error + (apart * ~true[box].isnan()).sum()
        classes.append(focal_loss(logits, wanted).sum())
        boxes.append(error)
    return {
        "head.class": sum(classes) / count,
        "head.box": sum(boxes) / count,
    }


def focal_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Elementwise sigmoid focal loss (alpha .25, gamma 2) against 0 and 1."""
    score = logits.sigmoid()
    right = torch.where(wanted > 0, score, 1 - score)
    share = torch.where(wanted > 0, _ALPHA, 1 - _ALPHA)
    sign = 2 * wanted - 1
    return -share * (1 - right) ** _GAMMA * torch.nn.functional.logsigmoid(sign * logits)


@torch.no_grad()
def match(
    logits: Tensor, codes: Tensor, true: Tensor, labels: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and boxes of the cheapest pairing of one frame, as two (K,) index tensors.

    Args:
        logits, codes: (Q, 10) and (Q, CODES) of a layer.
        true, labels: (M, CODES) and (M,); with more boxes than queries the dearest are left out.
        weights: (CODES,) of their differences.
    """
    score = logits[:, labels].sigmoid().clamp(1e-6, 1 - 1e-6)
    gain = _ALPHA * (1 - score) ** _GAMMA * -score.log()
    loss = (1 - _ALPHA) * score**_GAMMA * -(1 - score).log()
    mine, theirs = ((value * weights)[:, :_MATCHED] for value in (codes, true))
    apart = torch.cdist(mine, theirs, p=1)
    cost = WEIGHTS["head.class"] * (gain - loss) + WEIGHTS["head.box"] * apart
    pairs = linear_sum_assignment(cost.cpu().numpy())
    query, box = (torch.from_numpy(index).to(codes.device) for index in pairs)
    return query, box


def code_weights(like: Tensor, grid: BEVGrid) -> Tensor:
    """(CODES,) weights that turn fractions into metres."""
    places = (grid.x_max - grid.x_min, grid.y_max - grid.y_min, HEIGHTS[1] - HEIGHTS[0])
    return like.new_tensor((*places, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2))


def _on_grid(boxes: Tensor, labels: Tensor, valid: Tensor, grid: BEVGrid) -> tuple[Tensor, Tensor]:
    """Codes and labels of the boxes whose centre lies in a cell that counts."""
    inside = on_grid(boxes, grid) & (boxes[:, 3:6] > 0).all(dim=1)
    # Between cells' centres all of them must count.
    inside &= values_at((~valid).float(), boxes[:, :2].float(), grid)[:, 0] < 1e-6
    return encode(boxes[inside].float(), grid), labels[inside]
