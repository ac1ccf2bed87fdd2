import pytest
import torch
from torch.nn import functional

from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.alignment import adjacent_to_current, warp
from fd3d.models.deformable import DeformableConv2d, deform_conv2d
from fd3d.models.fpn import FPN
from fd3d.models.resnet import ResNet, ResNetConfig


def read(image, row, column):
    """Bilinear value of a (C, H, W) map at a point, zero outside."""
    total = torch.zeros(image.shape[0])
    for r in (int(row // 1), int(row // 1) + 1):
        for c in (int(column // 1), int(column // 1) + 1):
            if 0 <= r < image.shape[1] and 0 <= c < image.shape[2]:
                total += image[:, r, c] * (1 - abs(row - r)) * (1 - abs(column - c))
    return total


def test_deformable_convolution_equals_its_definition():
    torch.manual_seed(0)
    x, offsets = torch.randn(1, 3, 4, 5), torch.randn(1, 18, 4, 5) * 1.5
    strength, weight, bias = torch.rand(1, 9, 4, 5), torch.randn(2, 3, 3, 3), torch.randn(2)
    found = deform_conv2d(x, offsets, strength, weight, bias)
    for row in range(4):
        for column in range(5):
            expected = bias.clone()
            for tap in range(9):
                dy, dx = offsets[0, 2 * tap : 2 * tap + 2, row, column].tolist()
                where = row + tap // 3 - 1 + dy, column + tap % 3 - 1 + dx
                value = read(x[0], *where) * strength[0, tap, row, column]
                expected += weight[:, :, tap // 3, tap % 3] @ value
            torch.testing.assert_close(found[0, :, row, column], expected, atol=1e-4, rtol=1e-4)


def test_a_fresh_deformable_convolution_is_a_plain_one_at_half_strength():
    torch.manual_seed(0)
    layer, x = DeformableConv2d(4, 6), torch.randn(2, 4, 7, 9)
    plain = functional.conv2d(x, layer.weight * 0.5, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bottleneck", [True, False])
def test_backbone_and_neck_shapes(bottleneck):
    config = ResNetConfig(
        bottleneck=bottleneck, stem=8, widths=(8, 12, 16), blocks=(1, 2, 1), outputs=(1, 2)
    )
    maps = ResNet(config).eval()(torch.zeros(2, 3, 64, 96))
    assert [tuple(x.shape) for x in maps] == [
        (2, config.output_channels[0], 8, 12),
        (2, config.output_channels[1], 4, 6),
    ]
    assert config.output_stride() == 8
    neck = FPN(inputs=config.output_channels, outputs=10)
    assert neck(maps).shape == (2, 10, 8, 12)


GRID = BEVGrid(x_min=-10, x_max=10, y_min=-6, y_max=6, nx=20, ny=12)


def pose(x, y):
    rots = torch.eye(3).expand(1, 2, 6, 3, 3).clone()
    trans = torch.zeros(1, 2, 6, 3)
    trans[:, 1, :, :2] = torch.tensor([x, y])
    return rots, trans


def test_a_still_car_leaves_the_adjacent_map_alone():
    bev = torch.randn(1, 4, *GRID.shape)
    torch.testing.assert_close(warp(bev, adjacent_to_current(*pose(0, 0)), GRID), bev)


def test_a_landmark_moves_with_the_car():
    # The car drove 3 m along +x between the frames, so the adjacent camera is 3 m behind; what
    # the adjacent map shows at column 15 is at column 12 of the current one.
    bev = torch.zeros(1, 1, *GRID.shape)
    bev[0, 0, 4, 15] = 1.0
    moved = warp(bev, adjacent_to_current(*pose(-3.0, 0.0)), GRID)
    assert moved[0, 0, 4, 12] == pytest.approx(1.0, abs=1e-4)
    assert moved.sum() == pytest.approx(1.0, abs=1e-4)


def test_the_motion_keeps_its_digits_under_autocast():
    poses = pose(-3.217, 0.123)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = adjacent_to_current(*poses)
    torch.testing.assert_close(coarse, adjacent_to_current(*poses), atol=0, rtol=0)
