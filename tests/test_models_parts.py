"""Part labels of image cells, from boxes and lidar depth."""

from dataclasses import replace

import torch

from fd3d import models
from fd3d.efficiency import blank_batch
from fd3d.models.bevdepth.parts import PARTS, UNKNOWN, cell_points, part_labels, part_loss


def scene(yaw: float):
    """Level cameras, all depth at 10 m ahead (y), and a bus of class 3 that stands there."""
    model = models.build("bevdepth-tiny-l")
    batch = blank_batch(model)
    depth = torch.full((1, 6, *model.image.depth_shape), 10.0)
    depth[:, :, 0] = 0.0
    box = torch.tensor([[0.0, 10.0, 0.0, 3.0, 8.0, 3.0, yaw, 0.0, 0.0]])
    batch = replace(batch, depth=depth, boxes=(box,), labels=(torch.tensor([3]),))
    return batch, model.image


def test_cells_without_a_point_are_unknown_and_the_rest_lie_at_their_depth():
    batch, image = scene(yaw=0.0)
    points = cell_points(batch, image)
    torch.testing.assert_close(points[:, :, 1:, :, 1], torch.full_like(points[:, :, 1:, :, 1], 10))
    labels = part_labels(batch, image)
    assert (labels[:, 0] == UNKNOWN).all() and (labels[:, 1:] >= 0).all()


def test_front_and_rear_halves_swap_with_the_heading():
    """Heading +x is to the right in a camera that looks along +y."""
    for yaw, right, left in ((0.0, 7, 8), (torch.pi, 8, 7)):
        batch, image = scene(yaw)
        labels = part_labels(batch, image)[0]
        points = cell_points(batch, image)[0, 0]
        inside = (points[..., 0].abs() < 4.0) & (points[..., 2].abs() < 1.5)
        inside[0] = False
        assert inside.sum() > 10
        assert (labels[inside & (points[..., 0] > 0.1)] == right).all()
        assert (labels[inside & (points[..., 0] < -0.1)] == left).all()
        assert (labels[points[..., 0].abs() > 4.3] <= 0).all()


def test_no_boxes_is_all_background_and_the_loss_is_finite():
    batch, image = scene(yaw=0.0)
    batch = replace(batch, boxes=(torch.zeros(0, 9),), labels=(torch.zeros(0, dtype=torch.int64),))
    labels = part_labels(batch, image)
    assert set(labels.unique().tolist()) == {UNKNOWN, 0}
    logits = torch.zeros(6, PARTS, *image.depth_shape, requires_grad=True)
    loss = part_loss(logits, labels)
    loss.backward()
    torch.testing.assert_close(loss.item(), torch.tensor(float(PARTS)).log().item())
    nothing = part_loss(logits, torch.full_like(labels, UNKNOWN))
    assert nothing.item() == 0.0
