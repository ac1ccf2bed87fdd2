"""Residual networks for images: ResNet-18/34/50 shapes and narrower ones.

Parameter names are those of torchvision's checkpoints (conv1, bn1, layer1.0.conv1, ...), without
the classifier. The stride of a bottleneck sits in its 3x3 convolution ("pytorch style").
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from fd3d.models.recompute import Recomputing


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Shape of a residual network.

    Args:
        bottleneck: 1x1-3x3-1x1 blocks of four times the width; otherwise two 3x3 convolutions.
        stem: channels after the 7x7 stem, which halves the picture twice.
        widths: width of each stage; every stage after the first halves the map.
        blocks: blocks of each stage.
        outputs: indices of the stages whose maps are returned.
    """

    bottleneck: bool = True
    stem: int = 64
    widths: tuple[int, ...] = (64, 128, 256, 512)
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    outputs: tuple[int, ...] = (2, 3)

    @property
    def output_channels(self) -> tuple[int, ...]:
        expansion = Bottleneck.expansion if self.bottleneck else 1
        return tuple(self.widths[stage] * expansion for stage in self.outputs)

    def output_stride(self, output: int = 0) -> int:
        """Picture pixels per cell of the given returned map."""
        return 4 * 2 ** self.outputs[output]


class BasicBlock(Recomputing):
    """Two 3x3 convolutions with a shortcut; `downsample` is applied to the shortcut if given."""

    def __init__(
        self, *, inputs: int, width: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, Y, X) to (B, width, Y / stride, X / stride)."""
        return self.again(self._run, x)

    def _run(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(self.bn2(self.conv2(x)) + shortcut, inplace=True)


class Bottleneck(Recomputing):
    """1x1, 3x3 (with the stride), 1x1 to four times the width, with a shortcut."""

    expansion = 4

    def __init__(
        self, *, inputs: int, width: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, 4 * width, H / stride, W / stride)."""
        return self.again(self._run, x)

    def _run(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        x = functional.relu(self.bn2(self.conv2(x)), inplace=True)
        return functional.relu(self.bn3(self.conv3(x)) + shortcut, inplace=True)


class ResNet(Recomputing):
    """Multi-scale maps of pictures; see `ResNetConfig`. All batch norms train."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv2d(3, config.stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(config.stem)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = config.stem
        for stage, (width, blocks) in enumerate(zip(config.widths, config.blocks, strict=True)):
            layer, channels = _stage(config, channels, width, blocks, 1 if stage == 0 else 2)
            self.add_module(f"layer{stage + 1}", layer)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) normalised RGB to the maps of the stages in `config.outputs`."""
        x = self.again(self._stem, images)
        found: list[Tensor] = []
        for stage in range(max(self.config.outputs) + 1):
            x = getattr(self, f"layer{stage + 1}")(x)
            if stage in self.config.outputs:
                found.append(x)
        return tuple(found)

    def _stem(self, images: Tensor) -> Tensor:
        return self.maxpool(functional.relu(self.bn1(self.conv1(images)), inplace=True))


def _stage(
    config: ResNetConfig, inputs: int, width: int, blocks: int, stride: int
) -> tuple[nn.Sequential, int]:
    block = Bottleneck if config.bottleneck else BasicBlock
    outputs = width * (Bottleneck.expansion if config.bottleneck else 1)
    downsample = None
    if stride != 1 or inputs != outputs:
        downsample = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
        )
    first = block(inputs=inputs, width=width, stride=stride, downsample=downsample)
    rest = [block(inputs=outputs, width=width) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest), outputs
