"""The image neck of BEVDet: a feature pyramid that keeps only its finest level."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


class NamedConv(nn.Module):
    """A convolution called `conv`, as the wrapped convolutions in mmcv's checkpoints are."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class FPN(nn.Module):
    """1x1 laterals, coarse added to fine by nearest upsampling, one 3x3 on the finest level.

    Args:
        inputs: channels of the maps, finest first.
        outputs: channels of the result.
    """

    def __init__(self, *, inputs: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(NamedConv(width, outputs, 1) for width in inputs)
        self.fpn_convs = nn.ModuleList([NamedConv(outputs, outputs, 3)])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, inputs[i], h_i, w_i), finest first, to (B, outputs, h_0, w_0)."""
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        merged = laterals[-1]
        for lateral in reversed(laterals[:-1]):
            merged = lateral + functional.interpolate(
                merged, size=lateral.shape[-2:], mode="nearest"
            )
        return self.fpn_convs[0](merged)
