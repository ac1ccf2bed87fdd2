"""Instance areas on the ground and in the image planes, against few-line references."""

from dataclasses import replace

import pytest
import torch
from made_fd3d import GRID, make_pair

from fd3d.boxes import corners
from fd3d.distill.areas import bev_areas, cached_boxes, image_areas
from fd3d.distill.pv import cell_pixels


@pytest.fixture(scope="module")
def pair(synthetic):
    return make_pair(synthetic)


def test_image_areas_are_the_hull_of_the_corners(pair):
    """A cell well inside the projected corners' bounds' middle is in; one outside of them by more
    than the growth is out."""
    _, apprentice, batch, _ = pair
    image, shape = apprentice.image, apprentice.image.depth_shape
    pixels = cell_pixels(image, shape, "cpu").view(-1, 2)
    inside = outside = 0
    for row in range(len(batch)):
        for box in batch.boxes[row]:
            one = tuple(box[None] if r == row else torch.zeros(0, 9) for r in range(len(batch)))
            area = image_areas(one, batch=batch, image=image, shape=shape)
            area = area.view(len(batch), 6, -1)
            assert not area[1 - row].any()
            points = torch.from_numpy(corners(box[None].numpy())[0]).float()
            for camera in range(6):
                seen = (points - batch.trans[row, 0, camera]) @ batch.rots[row, 0, camera]
                if (seen[:, 2] < 1).any():
                    assert not (area[row, camera].any() and (seen[:, 2] < -3).all())
                    continue
                flat = seen @ batch.intrins[row, 0, camera].T
                flat = torch.cat([flat[:, :2] / flat[:, 2:], torch.ones(8, 1)], dim=1)
                at = (flat @ batch.post_rots[row, 0, camera].T)[:, :2]
                at = at + batch.post_trans[row, 0, camera, :2]
                low, high = at.min(dim=0).values, at.max(dim=0).values
                far = ((pixels < low - 12) | (pixels > high + 12)).any(dim=1)
                assert not area[row, camera][far].any()
                outside += int(far.sum())
                middle = at.mean(dim=0)
                near = (pixels - middle).norm(dim=1) < (high - low).min() / 6
                assert area[row, camera][near].all()
                inside += int(near.sum())
    assert inside > 20 and outside > 1000


def test_bev_areas_put_x_in_columns():
    box = torch.tensor([[20.0, -10.0, 0.0, 2.0, 4.0, 1.5, 0.0, 0.0, 0.0]])
    area = bev_areas([box, torch.zeros(0, 9)], grid=GRID)
    rows, columns = area[0, 0].nonzero(as_tuple=True)
    assert abs(float(columns.float().mean()) * 0.8 - 25.6 + 0.4 - 20) < 0.5
    assert abs(float(rows.float().mean()) * 0.8 - 25.6 + 0.4 + 10) < 0.5
    assert not area[1].any()


def test_cached_boxes_follow_the_augmentation(pair):
    _, _, batch, signals = pair
    turn = torch.tensor([[0.0, -1.1, 0.0], [1.1, 0.0, 0.0], [0.0, 0.0, 1.1]])
    moved = replace(batch, bev_augment=turn.expand(2, 3, 3))
    for table, boxes in zip(
        signals["detections"], cached_boxes(signals["detections"], moved, grid=GRID), strict=True
    ):
        torch.testing.assert_close(boxes[:, :3], table[:, :3] @ turn.T)
        torch.testing.assert_close(boxes[:, 3:6], table[:, 3:6] * 1.1)
        apart = (boxes[:, 6] - table[:, 6] - torch.pi / 2 + torch.pi) % (2 * torch.pi)
        torch.testing.assert_close(apart, torch.full_like(apart, torch.pi), atol=1e-4, rtol=0)
