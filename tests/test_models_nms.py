import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shapely.geometry import Polygon

from fd3d.models.bevdepth.nms import (
    circle_nms,
    footprint_corners,
    intersection_areas,
    rotated_iou,
    rotated_nms,
)


def footprints_of(count, seed, spread=6.0):
    rng = np.random.default_rng(seed)
    centres = rng.uniform(-spread, spread, (count, 2))
    sizes = rng.uniform(0.3, 8, (count, 2))
    return np.concatenate([centres, sizes, rng.uniform(-7, 7, (count, 1))], axis=1)


def shapely_iou(first, second):
    one, two = (Polygon(footprint_corners(box[None])[0]) for box in (first, second))
    return one.intersection(two).area / one.union(two).area


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_overlap_equals_shapely(seed):
    boxes = footprints_of(8, seed, spread=3.0)
    found = rotated_iou(boxes[:4], boxes[4:])
    expected = [shapely_iou(one, two) for one, two in zip(boxes[:4], boxes[4:], strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-9)


@settings(max_examples=40, deadline=None)
@example(seed=13609, turn=np.pi / 2)
@given(
    seed=st.integers(0, 100_000), turn=st.sampled_from([0, np.pi / 2, np.pi, 1e-9, -1e-13, 1e-6])
)
def test_coincident_edges_are_counted_once(seed, turn):
    box = footprints_of(1, seed)
    same = box.copy()
    same[:, 4] += turn
    if abs(turn) == np.pi / 2:
        same[:, [2, 3]] = same[:, [3, 2]]
    np.testing.assert_allclose(rotated_iou(box, same), 1.0, atol=2e-5)


def test_overlap_of_touching_nested_and_distant_boxes():
    base = np.array([[0.0, 0.0, 2.0, 4.0, 0.0]])
    others = np.array(
        [[4.0, 0, 2, 4, 0], [0, 0, 1, 1, 0.3], [50, 0, 2, 4, 0], [2.0, 0.0, 2.0, 4.0, 0.0]]
    )
    areas = intersection_areas(
        footprint_corners(np.repeat(base, 4, axis=0)), footprint_corners(others)
    )
    np.testing.assert_allclose(areas, [0, 1, 0, 4], atol=1e-12)


def test_width_is_across_the_heading():
    corners = footprint_corners(np.array([[0.0, 0.0, 2.0, 6.0, np.pi / 2]]))[0]
    np.testing.assert_allclose(np.ptp(corners, axis=0), [2.0, 6.0], atol=1e-12)


@pytest.mark.parametrize("threshold", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_rotated_nms_equals_a_plain_greedy_one(seed, threshold):
    boxes = footprints_of(60, seed, spread=12.0)
    kept = []
    for index, box in enumerate(boxes):
        if all(shapely_iou(boxes[other], box) <= threshold for other in kept):
            kept.append(index)
    assert rotated_nms(boxes, threshold, keep=100).tolist() == kept
    assert rotated_nms(boxes, threshold, keep=3).tolist() == kept[:3]


def test_circle_nms_compares_squared_distances():
    centres = np.array([[0.0, 0], [1.4, 0], [2.0, 0], [1.0, 0.0], [5.0, 0]])
    assert circle_nms(centres, threshold=2.0, keep=9).tolist() == [0, 2, 4]


def test_no_boxes_and_one_box():
    assert rotated_nms(np.zeros((0, 5)), 0.2, keep=10).tolist() == []
    assert circle_nms(np.zeros((0, 2)), 0.2, keep=10).tolist() == []
    assert rotated_nms(np.array([[0, 0, 1, 1, 0.0]]), 0.2, keep=10).tolist() == [0]


def test_five_hundred_crowded_boxes_take_a_fraction_of_a_second():
    boxes = footprints_of(500, 1, spread=20.0)
    start = time.perf_counter()
    rotated_nms(boxes, 0.2, keep=500)
    assert time.perf_counter() - start < 1.0
