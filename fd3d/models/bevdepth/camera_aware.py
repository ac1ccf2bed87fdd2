"""The depth branch of BEVDet's second generation, which is Megvii's DepthNet (BEVDepth, AAAI 2023).

27 numbers of each camera scale the channels of two branches: context, and depth through residual
blocks and atrous spatial pyramid pooling. Sub-modules carry the names of its checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fd3d.models.bevdepth.depth_net import Cameras
from fd3d.models.deformable import GroupedDeformableConv2d
from fd3d.models.precision import full_precision
from fd3d.models.resnet import BasicBlock

CAMERA_NUMBERS = 27
DILATIONS = (1, 6, 12, 18)


def camera_numbers(cameras: Cameras) -> Tensor:
    """(B * N, 27): focal lengths and centre, image rotation and shift, BEV augmentation, and the
    camera's pose without that augmentation as 3x4, row-major."""
    batch, views = cameras.rots.shape[:2]
    k, turn, shift = cameras.intrins, cameras.post_rots, cameras.post_trans
    augment = cameras.bev_augment
    if augment is None:
        augment = torch.eye(3, device=k.device).expand(batch, 3, 3)
    undo = torch.linalg.inv(augment)[:, None]
    pose = torch.cat([undo @ cameras.rots, undo @ cameras.trans[..., None]], dim=-1)
    moved = augment[:, None].expand(batch, views, 3, 3)
    numbers = [
        *(k[..., 0, 0], k[..., 1, 1], k[..., 0, 2], k[..., 1, 2]),
        *(turn[..., 0, 0], turn[..., 0, 1], shift[..., 0]),
        *(turn[..., 1, 0], turn[..., 1, 1], shift[..., 1]),
        *(moved[..., 0, 0], moved[..., 0, 1], moved[..., 1, 0], moved[..., 1, 1], moved[..., 2, 2]),
    ]
    numbers = torch.cat([torch.stack(numbers, dim=-1), pose.flatten(-2)], dim=-1)
    return numbers.flatten(0, 1)


class MLP(nn.Module):
    """Camera numbers to one number a channel."""

    def __init__(self, *, inputs: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(P, inputs) to (P, width)."""
        return self.fc2(functional.relu(self.fc1(x)))


class ChannelGate(nn.Module):
    """Scales the channels of a map by a sigmoid of what the MLP made of the camera."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(width, width, 1)
        self.conv_expand = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, camera: Tensor) -> Tensor:
        """(P, width, h, w) and (P, width) to (P, width, h, w)."""
        gate = functional.relu(self.conv_reduce(camera[:, :, None, None]))
        return x * self.conv_expand(gate).sigmoid()


class AtrousBranch(nn.Module):
    """One rate of the pyramid: 1x1 at rate 1, else a dilated 3x3; batch norm, ReLU."""

    def __init__(self, *, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        kernel = 1 if dilation == 1 else 3
        self.atrous_conv = nn.Conv2d(
            inputs,
            outputs,
            kernel,
            padding=0 if dilation == 1 else dilation,
            dilation=dilation,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.atrous_conv(x)))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al., DeepLab v3): four rates and the global mean.

    Args:
        width: channels in and out.
        middle: channels of each branch.
    """

    def __init__(self, *, width: int, middle: int) -> None:
        super().__init__()
        for number, dilation in enumerate(DILATIONS, start=1):
            branch = AtrousBranch(inputs=width, outputs=middle, dilation=dilation)
            self.add_module(f"aspp{number}", branch)
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d((1, 1)),
            nn.Conv2d(width, middle, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(),
        )
        self.conv1 = nn.Conv2d(middle * (len(DILATIONS) + 1), width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(P, width, h, w) to the same shape."""
        rates = [self.aspp1(x), self.aspp2(x), self.aspp3(x), self.aspp4(x)]
        mean = self.global_avg_pool(x).expand(-1, -1, *x.shape[-2:])
        x = self.conv1(torch.cat([*rates, mean], dim=1))
        return self.dropout(functional.relu(self.bn1(x)))


class DepthNet(nn.Module):
    """Depth logits and context from the neck's map and the cameras.

    Args:
        inputs: channels of the neck's map.
        width: channels of both branches.
        context: channels that are splatted.
        bins: depth bins.
        blocks: residual blocks of the depth branch.
        aspp: channels of each branch of its pyramid.
        deformable: whether a deformable convolution (4 groups) follows the pyramid.
    """

    def __init__(
        self,
        *,
        inputs: int,
        width: int,
        context: int,
        bins: int,
        blocks: int,
        aspp: int,
        deformable: bool,
    ) -> None:
        super().__init__()
        self.reduce_conv = nn.Sequential(
            nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.context_conv = nn.Conv2d(width, context, 1)
        self.bn = nn.BatchNorm1d(CAMERA_NUMBERS)
        self.depth_mlp = MLP(inputs=CAMERA_NUMBERS, width=width)
        self.depth_se = ChannelGate(width)
        self.context_mlp = MLP(inputs=CAMERA_NUMBERS, width=width)
        self.context_se = ChannelGate(width)
        layers: list[nn.Module] = [BasicBlock(inputs=width, width=width) for _ in range(blocks)]
        layers.append(ASPP(width=width, middle=aspp))
        if deformable:
            layers.append(GroupedDeformableConv2d(width, width, groups=4))
        layers.append(nn.Conv2d(width, bins, 1))
        self.depth_conv = nn.Sequential(*layers)

    def forward(self, x: Tensor, cameras: Tensor) -> tuple[Tensor, Tensor]:
        """(P, inputs, h, w) and (P, 27) to (P, bins, h, w) logits, (P, context, h, w) context."""
        # Focal lengths are in the thousands: their part is computed in float32 under autocast too.
        with full_precision(x):
            cameras = self.bn(cameras.float())
            for_context, for_depth = self.context_mlp(cameras), self.depth_mlp(cameras)
        x = self.reduce_conv(x)
        context = self.context_conv(self.context_se(x, for_context))
        return self.depth_conv(self.depth_se(x, for_depth)), context
