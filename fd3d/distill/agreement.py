"""Where an expert's detections and the ground truth agree, and where the expert is wrong.

An expert that misses a thing has nothing to teach there, and one that sees a thing where none is
teaches a mistake. A detection and a true box agree when they are of one class and their centres lie
within two metres on the ground, as for the nuScenes errors of true positives; each agrees with at
most one, the surest detection choosing first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fd3d.classes import CLASSES

NEAR = 2.0


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of one frame: detections (K,) bool that agree with a true box, true boxes (M,) bool that a
    detection agrees with."""

    detections: Tensor
    truth: Tensor


def agreement(
    found: Tensor, scores: Tensor, classes: Tensor, boxes: Tensor, labels: Tensor
) -> Agreement:
    """Who agrees with whom, by falling score.

    Args:
        found, scores, classes: (K, 9), (K,) and (K,) of the detections.
        boxes, labels: (M, 9) and (M,) of the truth, in the same frame.
    """
    right = torch.zeros(len(found), dtype=torch.bool, device=found.device)
    met = torch.zeros(len(boxes), dtype=torch.bool, device=found.device)
    if not len(found) or not len(boxes):
        return Agreement(detections=right, truth=met)
    apart = torch.cdist(found[:, :2].float(), boxes[:, :2].float())
    apart[classes[:, None].long() != labels[None, :].to(classes.device).long()] = torch.inf
    for row in scores.argsort(descending=True).tolist():
        nearest = int(torch.where(met, torch.inf, apart[row]).argmin())
        if not met[nearest] and apart[row, nearest] <= NEAR:
            right[row] = met[nearest] = True
    return Agreement(detections=right, truth=met)


@dataclass(kw_only=True)
class Mistakes:
    """Counts of one class: detections that agree with a true box, that do not, and true boxes that
    no detection agrees with."""

    right: int = 0
    false: int = 0
    missed: int = 0


def count_mistakes(
    frames: Sequence[tuple[Tensor, Tensor, Tensor]], *, min_score: float
) -> dict[str, Mistakes]:
    """Class name -> its counts over frames of (detections table (K, 11), boxes (M, 9), labels),
    detections of at least `min_score`."""
    counts = {name: Mistakes() for name in CLASSES}
    for table, boxes, labels in frames:
        table = table[table[:, 9] >= min_score]
        found = agreement(table[:, :9], table[:, 9], table[:, 10], boxes, labels)
        for index, name in enumerate(CLASSES):
            own = found.detections[table[:, 10] == index]
            counts[name].right += int(own.sum())
            counts[name].false += int((~own).sum())
            counts[name].missed += int((~found.truth[labels == index]).sum())
    return counts
