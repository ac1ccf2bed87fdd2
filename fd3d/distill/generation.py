"""Masked generation: an apprentice's map is blanked in places, and a generator has to complete it
to the expert's (Yang et al., "Masked Generative Distillation"), inside areas."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Generator(nn.Sequential):
    """Conv 3x3, ReLU, conv 3x3, all of as many channels as the expert's map."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        )


def kept_patches(like: Tensor, *, masked: float, patch: int) -> Tensor:
    """(B, 1, Y, X) of 0 (masked) and 1 for maps (B, C, Y, X): squares of `patch` cells, each masked
    with probability `masked`, from torch's global generator."""
    rows, columns = (-(-size // patch) for size in like.shape[-2:])
    drawn = torch.rand((len(like), 1, rows, columns), device=like.device) >= masked
    whole = functional.interpolate(drawn.float(), scale_factor=patch, mode="nearest")
    return whole[..., : like.shape[-2], : like.shape[-1]]


def masked_error(
    aligned: Tensor,
    target: Tensor,
    *,
    area: Tensor,
    counted: Tensor,
    scale: Tensor,
    generator: nn.Module,
    masked: float,
    patch: int,
) -> Tensor:
    """sum w |G(A (1 - mask)) - E|^2 / max(1, sum w), scalar, float32.

    |.|^2 is the mean over channels in units of `scale`, the expert's channel deviation.

    Args:
        aligned, target: (B, C, Y, X) maps of apprentice and expert on one grid.
        area: (B, 1, Y, X) bool, where patches are masked: nowhere else.
        counted: (B, 1, Y, X) weights w.
    """
    kept = kept_patches(aligned, masked=masked, patch=patch)
    kept = torch.where(area, kept, torch.ones_like(kept))
    made = generator(aligned * kept.to(aligned.dtype)).float()
    error = ((made - target) / scale).square().mean(dim=1, keepdim=True)
    return (error * counted).sum() / counted.sum().clamp(min=1.0)
