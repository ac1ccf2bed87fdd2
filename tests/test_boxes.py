import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fd3d.boxes import YAW, corners, corners_bev, old_yaw, transform, wrap_angle

seeds = st.integers(0, 10_000)


def _boxes(seed: int, count: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(-60, 60, size=(count, 9))
    boxes[:, 3:6] = rng.uniform(0.3, 12, size=(count, 3))
    boxes[:, YAW] = rng.uniform(-np.pi, np.pi, size=count)
    return boxes


def _flat_pose(angle: float, shift: np.ndarray) -> np.ndarray:
    pose = np.eye(4)
    pose[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    pose[:3, 3] = shift
    return pose


@given(seeds, st.floats(-3.1, 3.1))
def test_corners_of_transformed_boxes_are_the_transformed_corners(seed, angle):
    boxes = _boxes(seed)
    pose = _flat_pose(angle, np.random.default_rng(seed).normal(size=3) * 100)
    moved = corners(transform(boxes, pose))
    expected = corners(boxes) @ pose[:3, :3].T + pose[:3, 3]
    np.testing.assert_allclose(moved, expected, atol=1e-9)


@given(seeds, st.floats(-3.1, 3.1))
def test_transforming_there_and_back_changes_nothing(seed, angle):
    boxes = _boxes(seed)
    pose = _flat_pose(angle, np.array([400.0, 1100.0, 1.0]))
    back = transform(transform(boxes, pose), np.linalg.inv(pose))
    np.testing.assert_allclose(np.delete(back, YAW, 1), np.delete(boxes, YAW, 1), atol=1e-9)
    np.testing.assert_allclose(wrap_angle(back[:, YAW] - boxes[:, YAW]), 0, atol=1e-9)


@given(seeds)
def test_corners_span_the_sizes_around_the_centre(seed):
    boxes = _boxes(seed)
    points = corners(boxes)
    np.testing.assert_allclose(points.mean(axis=1), boxes[:, :3], atol=1e-9)
    across = np.linalg.norm(points[:, 0] - points[:, 1], axis=1)
    along = np.linalg.norm(points[:, 1] - points[:, 2], axis=1)
    up = np.linalg.norm(points[:, 0] - points[:, 4], axis=1)
    np.testing.assert_allclose(np.stack([across, along, up], axis=1), boxes[:, 3:6], atol=1e-9)


@given(seeds)
def test_footprint_runs_clockwise_from_the_front_left(seed):
    boxes = _boxes(seed)
    footprint = corners_bev(boxes)
    x, y = footprint[..., 0], footprint[..., 1]
    twice_area = (x * np.roll(y, -1, axis=1) - y * np.roll(x, -1, axis=1)).sum(axis=1)
    np.testing.assert_allclose(twice_area, -2 * boxes[:, 3] * boxes[:, 4], rtol=1e-6)
    offset = footprint[:, 0] - boxes[:, :2]
    ahead = offset[:, 0] * np.cos(boxes[:, YAW]) + offset[:, 1] * np.sin(boxes[:, YAW])
    left = offset[:, 1] * np.cos(boxes[:, YAW]) - offset[:, 0] * np.sin(boxes[:, YAW])
    np.testing.assert_allclose(ahead, boxes[:, 4] / 2, atol=1e-9)
    np.testing.assert_allclose(left, boxes[:, 3] / 2, atol=1e-9)


@given(st.floats(-50, 50))
def test_old_yaw_is_its_own_inverse_and_wrapping_keeps_the_direction(angle):
    assert old_yaw(old_yaw(angle)) == pytest.approx(angle)
    wrapped = wrap_angle(angle)
    assert -np.pi <= wrapped < np.pi
    assert np.cos(wrapped) == pytest.approx(np.cos(angle), abs=1e-9)
    assert np.sin(wrapped) == pytest.approx(np.sin(angle), abs=1e-9)


def test_old_yaw_of_a_car_that_faces_backwards_along_y_is_zero():
    assert old_yaw(-np.pi / 2) == pytest.approx(0)


def test_velocity_turns_with_the_frame_and_missing_ones_stay_missing():
    boxes = _boxes(0, 2)
    boxes[0, 7:9] = [3.0, 0.0]
    boxes[1, 7:9] = np.nan
    moved = transform(boxes, _flat_pose(np.pi / 2, np.zeros(3)))
    np.testing.assert_allclose(moved[0, 7:9], [0.0, 3.0], atol=1e-9)
    assert np.isnan(moved[1, 7:9]).all()
