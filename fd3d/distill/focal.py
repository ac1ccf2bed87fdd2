"""FD3D's fine scale: what the head samples from the expert's map, asked of the apprentice's too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fd3d.distill.head import DistillationHead, HeadOutputs, Sampled, sample
from fd3d.models.precision import full_precision


def focal_error(
    aligned: Tensor,
    target: Tensor,
    *,
    valid: Tensor,
    head: DistillationHead,
    said: HeadOutputs,
    trust: Sequence[Tensor],
) -> Tensor:
    """sum over layers and queries of c |s_A - s_E|^2 / max(1, sum c), |.|^2 the mean over channels
    in units of s_E's deviation; c the best class score times trust, where the expert saw.

    Args:
        aligned, target: (B, C, Y, X) of the apprentice and the expert, on the head's grid or on
            another over the same ground.
        valid: (B, 1, Y, X) bool: the expert's cells that count.
        said: by `head`, for `target`.
        trust: (B, Q) of each layer.

    Places, weights and the value projection are constants, so that the two maps cannot agree on
    nothing; the gradient reaches `aligned` alone.
    """
    slope, offset = _norm(head, target)
    total, counts = aligned.sum() * 0.0, aligned.new_zeros(())
    with full_precision(aligned):
        aligned = aligned.float()
        layers = zip(head.layers, said.logits, said.sampled, trust, strict=True)
        for layer, logits, seen, trusted in layers:
            # The head's norm and its projection are one linear map.
            matrix = layer.look.value.weight.detach()
            bias = matrix @ offset + layer.look.value.bias.detach()
            how = (seen.places.detach(), seen.weights.detach(), matrix * slope, bias)
            with torch.no_grad():
                # Not `seen.values`: both maps go one way, whose rounding then cancels.
                wanted = sample(target, *how)
                known = _known(valid, seen)
                count = logits.detach().sigmoid().amax(dim=-1) * known * trusted
                scale = _deviation(wanted[known])
            error = ((sample(aligned, *how) - wanted) / scale).square().mean(dim=-1)
            total = total + (error * count).sum()
            counts = counts + count.sum()
    return total / counts.clamp(min=1.0)


def _norm(head: DistillationHead, target: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) factors and offsets by which the head has just normalised the expert's map."""
    norm = head.norm
    if norm.training:
        var, mean = torch.var_mean(target, dim=(0, 2, 3), correction=0)
    else:
        var, mean = norm.running_var, norm.running_mean
    slope = norm.weight / (var + norm.eps).sqrt()
    return slope.detach(), (norm.bias - mean * slope).detach()


def _deviation(values: Tensor) -> Tensor:
    """(width,) standard deviations of (K, width); ones where there are too few."""
    if len(values) < 2:
        return values.new_ones(values.shape[1])
    return values.std(dim=0).clamp(min=1e-6)


def _known(valid: Tensor, seen: Sampled) -> Tensor:
    """(B, Q) bool: queries none of whose places read from a cell that does not count."""
    where = (2 * seen.places.detach() - 1).flatten(2, 3)  # (B, Q, heads * points, 2)
    unseen = functional.grid_sample((~valid).float(), where, align_corners=False)
    return unseen[:, 0].amax(dim=-1) < 1e-6
