"""Deformable convolutions, modulated (DCNv2) and plain (DCNv1), in plain torch for CPU and CUDA.

Dai et al., "Deformable Convolutional Networks"; Zhu et al., "Deformable ConvNets v2: More
Deformable, Better Results". Channel order of offsets and masks, and parameter names, are those of
mmcv's `ModulatedDeformConv2dPack` and `DeformConv2dPack`, whose checkpoints load without change.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fd3d.models.precision import full_precision


class DeformableConv2d(nn.Module):
    """3x3 convolution that samples where it wants: each tap has an offset and a weight in (0, 1).

    One offset group, stride 1, padding 1, with bias. Starts as a plain convolution at half
    strength: the offset convolution is zero.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.conv_offset = nn.Conv2d(inputs, 27, 3, padding=1)
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        raw = self.conv_offset(x).float()
        offsets, strength = raw[:, :18], raw[:, 18:].sigmoid()
        return deform_conv2d(x, offsets, strength, self.weight, self.bias)


class GroupedDeformableConv2d(nn.Module):
    """DCNv1: as `DeformableConv2d`, in channel groups, without weights of the taps or a bias."""

    def __init__(self, inputs: int, outputs: int, *, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, 3, 3))
        self.conv_offset = nn.Conv2d(inputs, 18, 3, padding=1)
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W)."""
        return deform_conv2d(x, self.conv_offset(x).float(), None, self.weight, None)


def deform_conv2d(
    x: Tensor, offsets: Tensor, strength: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """3x3 deformable convolution with padding 1; zero outside of the map.

    Args:
        x: (B, C, H, W).
        offsets: (B, 18, H, W) float32 pixels; (dy, dx) of tap 0, of tap 1, ... row by row.
        strength: (B, 9, H, W) factor of each tap, or None for one.
        weight, bias: (O, C / groups, 3, 3), whose second axis says how many groups there are, and
            (O,) or None.
    """
    batch, channels, height, width = x.shape
    # Sampling positions need more bits than bfloat16 has.
    with full_precision(x):
        rows, columns = _tap_positions(offsets.float(), height, width)
        grid = torch.stack(
            [(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1
        ).view(batch, 9 * height, width, 2)
        taps = functional.grid_sample(
            x.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False
        ).view(batch, channels, 9, height * width)
        if strength is not None:
            taps = taps * strength.float().view(batch, 1, 9, height * width)
    outputs, inputs = weight.shape[:2]
    groups = channels // inputs
    taps = taps.reshape(batch, groups, inputs * 9, height * width)
    mixed = torch.matmul(weight.reshape(groups, outputs // groups, -1), taps)
    mixed = mixed.view(batch, outputs, height, width)
    return mixed if bias is None else mixed + bias.to(mixed.dtype).view(1, -1, 1, 1)


def _tap_positions(offsets: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns (B, 9, H, W) that the nine taps read, in pixels of the map."""
    device = offsets.device
    pairs = offsets.view(offsets.shape[0], 9, 2, height, width)
    step = torch.arange(3, device=device, dtype=offsets.dtype) - 1
    row = torch.arange(height, device=device, dtype=offsets.dtype)
    column = torch.arange(width, device=device, dtype=offsets.dtype)
    rows = row.view(1, 1, height, 1) + step.repeat_interleave(3).view(1, 9, 1, 1)
    columns = column.view(1, 1, 1, width) + step.repeat(3).view(1, 9, 1, 1)
    return rows + pairs[:, :, 0], columns + pairs[:, :, 1]
