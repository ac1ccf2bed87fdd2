"""Convolutional nets on BEV maps (and on depth features): residual stages and the LSS pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fd3d.models.recompute import Recomputing
from fd3d.models.resnet import BasicBlock


class BEVResNet(nn.Module):
    """Residual stages as BEVDet builds them; returns the map of every stage.

    The first block of every stage has a plain 3x3 convolution with bias and no norm in its
    shortcut, even where stride and width would not ask for one.

    Args:
        inputs: channels of the input map.
        widths, blocks, strides: of each stage.
    """

    def __init__(
        self, *, inputs: int, widths: Sequence[int], blocks: Sequence[int], strides: Sequence[int]
    ) -> None:
        super().__init__()
        stages = []
        for width, count, stride in zip(widths, blocks, strides, strict=True):
            shortcut = nn.Conv2d(inputs, width, 3, stride=stride, padding=1)
            first = BasicBlock(inputs=inputs, width=width, stride=stride, downsample=shortcut)
            rest = [BasicBlock(inputs=width, width=width) for _ in range(count - 1)]
            stages.append(nn.Sequential(first, *rest))
            inputs = width
        self.layers = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, inputs, Y, X) to one (B, width, Y', X') a stage."""
        found = []
        for stage in self.layers:
            x = stage(x)
            found.append(x)
        return tuple(found)


class BEVPyramid(Recomputing):
    """LSS's decoder: the coarsest stage joins the finest, then both grow to the grid's size.

    Args:
        inputs: channels of the fine and the coarse map together.
        width: channels of the two convolutions at the fine map's size.
        outputs: channels of the result.
        stride: of the finest stage, undone at the end.
    """

    def __init__(self, *, inputs: int, width: int, outputs: int, stride: int = 2) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.up2 = nn.Sequential(
            nn.Upsample(scale_factor=stride, mode="bilinear", align_corners=True),
            nn.Conv2d(width, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 1),
        )

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Maps of the finest and the coarsest stage to (B, outputs, Y, X)."""
        return self.again(self._run, fine, coarse)

    def _run(self, fine: Tensor, coarse: Tensor) -> Tensor:
        coarse = functional.interpolate(
            coarse, size=fine.shape[-2:], mode="bilinear", align_corners=True
        )
        return self.up2(self.conv(torch.cat([fine, coarse], dim=1)))
