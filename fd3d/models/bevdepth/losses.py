"""Training terms of BEVDepth: heatmaps, box codes, and depth against lidar. All in float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fd3d.data.images import ImageSpec
from fd3d.models.bevdepth.config import LossConfig
from fd3d.models.bevdepth.head import BRANCHES
from fd3d.models.bevdepth.targets import TaskTargets
from fd3d.models.precision import full_precision

# How the ten codes are grouped into terms.
TERMS = {"xy": (0, 2), "z": (2, 3), "whl": (3, 6), "yaw": (6, 8), "vel": (8, 10)}


def heatmap_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Gaussian focal loss (alpha 2, gamma 4) summed over cells, divided by the number of peaks."""
    score = logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)
    peak = target == 1
    # Away from peaks the target is below one; at a peak the second factor is zero by itself.
    right = -(score + 1e-12).log() * (1 - score) ** 2 * peak
    wrong = -(1 - score + 1e-12).log() * score**2 * (1 - target) ** 4
    return (right + wrong).sum() / peak.sum().clamp(min=1)


def box_losses(
    maps: dict[str, Tensor], target: TaskTargets, config: LossConfig
) -> dict[str, Tensor]:
    """L1 terms xy, z, whl, yaw, vel of one task, each divided by the number of objects."""
    joined = torch.cat([maps[name].float() for name in BRANCHES], dim=1).flatten(2)
    predicted = joined[target.frame, :, target.cell]
    weights = predicted.new_tensor(config.code)
    if config.nan_velocity == "ignore":
        weights = weights * target.known
    error = (predicted - target.codes).abs() * weights
    total = error.sum(dim=0) * (config.bbox / (len(target.frame) + 1e-4))
    return {name: total[first:end].sum() for name, (first, end) in TERMS.items()}


def head_losses(
    tasks: Sequence[dict[str, Tensor]], targets: Sequence[TaskTargets], config: LossConfig
) -> dict[str, Tensor]:
    """Weighted terms "task0.heatmap", "task0.xy", ... of every task."""
    terms: dict[str, Tensor] = {}
    for index, (maps, target) in enumerate(zip(tasks, targets, strict=True)):
        loss = heatmap_loss(maps["heatmap"], target.heatmap) * config.heatmap
        terms[f"task{index}.heatmap"] = loss
        for name, value in box_losses(maps, target, config).items():
            terms[f"task{index}.{name}"] = value
    return terms


def depth_loss(logits: Tensor, depth: Tensor, image: ImageSpec, form: str = "bce") -> Tensor:
    """How far the depth logits are from the lidar's bins; only cells with a point add to it.

    Args:
        logits: (B * N, D, h, w).
        depth: (B, N, h, w) metres, 0 where no point fell.
        image: its depth range names the bins.
        form: "bce" is G1's: each bin a sigmoid (though lifting uses softmax), the mean over *all*
            cells and bins; "softmax-bce" is G2's: each bin's softmax probability, the sum over
            bins, the mean over cells with a point; "ce" is softmax cross-entropy, the mean over
            those.
    """
    first, _, step = image.depth_range
    logits = logits.float()
    depth = depth.reshape(-1, *logits.shape[-2:])
    seen = (depth > 0).to(logits.dtype)
    bins = ((depth - first) / step).floor().long().clamp(0, logits.shape[1] - 1)
    if form == "ce":
        entropy = functional.cross_entropy(logits, bins, reduction="none")
        return (entropy * seen).sum() / seen.sum().clamp(min=1)
    if form == "softmax-bce":
        wanted = torch.zeros_like(logits).scatter_(1, bins[:, None], 1.0)
        # torch refuses this loss under autocast, as half precision would spoil it.
        with full_precision(logits):
            entropy = functional.binary_cross_entropy(
                logits.softmax(dim=1), wanted, reduction="none"
            ).sum(dim=1)
        return (entropy * seen).sum() / seen.sum().clamp(min=1)
    # Sum over bins of BCE(logit, one-hot) without building the one-hot.
    right = logits.gather(1, bins[:, None])[:, 0]
    entropy = functional.softplus(logits).sum(dim=1) - right
    return (entropy * seen).sum() / logits.numel()
