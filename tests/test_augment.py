import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fd3d.augment import BEVAugmentation, draw_bev, move_boxes
from fd3d.boxes import YAW, corners, wrap_angle

augmentations = st.builds(
    BEVAugmentation,
    rotate=st.floats(-3, 3),
    scale=st.floats(0.5, 2),
    flip_y=st.booleans(),
    flip_x=st.booleans(),
)


def _boxes(seed: int, count: int = 7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(-40, 40, size=(count, 9))
    boxes[:, 3:6] = rng.uniform(0.4, 9, size=(count, 3))
    boxes[:, YAW] = rng.uniform(-np.pi, np.pi, size=count)
    return boxes


def _move(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return points @ matrix[:3, :3].T + matrix[:3, 3]


@given(augmentations, st.integers(0, 50))
def test_corners_of_moved_boxes_are_the_moved_corners(augmentation, seed):
    boxes = _boxes(seed)
    moved = corners(move_boxes(boxes, augmentation))
    expected = _move(corners(boxes), augmentation.matrix())
    # A flip changes which corner is called front-left, not where the corners are.
    for one, other in zip(moved, expected, strict=True):
        distance = np.linalg.norm(one[:, None] - other[None], axis=2)
        assert (distance.min(axis=1) < 1e-6).all()
        assert (distance.min(axis=0) < 1e-6).all()


@given(augmentations, st.integers(0, 50))
def test_a_moved_box_ends_where_its_velocity_led(augmentation, seed):
    boxes = _boxes(seed)
    later = boxes.copy()
    later[:, :2] += boxes[:, 7:9]
    step = move_boxes(later, augmentation)[:, :2] - move_boxes(boxes, augmentation)[:, :2]
    np.testing.assert_allclose(step, move_boxes(boxes, augmentation)[:, 7:9], atol=1e-8)


@given(augmentations, st.integers(0, 50))
def test_heading_of_a_moved_box_is_the_moved_heading(augmentation, seed):
    boxes = _boxes(seed)
    tip = boxes[:, :3].copy()
    tip[:, 0] += np.cos(boxes[:, YAW])
    tip[:, 1] += np.sin(boxes[:, YAW])
    along = _move(tip, augmentation.matrix()) - _move(boxes[:, :3], augmentation.matrix())
    yaw = move_boxes(boxes, augmentation)[:, YAW]
    np.testing.assert_allclose(wrap_angle(yaw - np.arctan2(along[:, 1], along[:, 0])), 0, atol=1e-6)


@given(augmentations, st.integers(0, 50))
def test_moved_cameras_see_moved_points_at_the_same_pixels(augmentation, seed):
    rng = np.random.default_rng(seed)
    camera = np.eye(4)
    camera[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    camera[:3, 3] = rng.normal(size=3)
    seen = rng.uniform(1, 40, size=(20, 3))
    points = _move(seen, camera)
    matrix = augmentation.matrix()
    moved_camera = matrix @ camera
    back = np.linalg.solve(moved_camera[:3, :3], (_move(points, matrix) - moved_camera[:3, 3]).T).T
    np.testing.assert_allclose(back, seen, atol=1e-6)


def test_rotation_is_clockwise_and_comes_before_the_flips():
    quarter = np.pi / 2
    ahead = np.array([[0.0, 1.0, 0.5]])
    turned = BEVAugmentation(rotate=quarter, scale=2.0)
    np.testing.assert_allclose(_move(ahead, turned.matrix()), [[2, 0, 1]], atol=1e-12)
    flipped = BEVAugmentation(rotate=quarter, scale=2.0, flip_x=True)
    np.testing.assert_allclose(_move(ahead, flipped.matrix()), [[-2, 0, 1]], atol=1e-12)


def test_missing_velocities_stay_missing():
    boxes = _boxes(1)
    boxes[2, 7:9] = np.nan
    moved = move_boxes(boxes, BEVAugmentation(rotate=0.3, flip_x=True))
    assert np.isnan(moved[2, 7:9]).all()
    assert np.isfinite(np.delete(moved, 2, axis=0)).all()


def test_draws_cover_the_ranges_and_repeat_by_seed():
    rng = np.random.default_rng(0)
    drawn = [draw_bev(rng) for _ in range(400)]
    angles = np.array([one.rotate for one in drawn])
    scales = np.array([one.scale for one in drawn])
    assert np.abs(angles).max() <= 0.3925 and np.abs(angles).max() > 0.35
    assert 0.95 <= scales.min() < 0.96 and 1.04 < scales.max() <= 1.05
    assert 140 < sum(one.flip_x for one in drawn) < 260
    assert 140 < sum(one.flip_y for one in drawn) < 260
    assert draw_bev(np.random.default_rng(0)) == drawn[0]
