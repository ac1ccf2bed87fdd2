"""Projected box edges and results files read back."""

import numpy as np
import pytest
from PIL import Image

from fd3d import boxes as boxlib
from fd3d.draw import frame_picture, project_edges, submitted_boxes

INTRINSIC = np.array([[100.0, 0, 80], [0, 100.0, 45], [0, 0, 1]])
# Global x right, y forward, z up; camera x right, y down, z forward.
LOOKING_ALONG_Y = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])


def box(x, y, z=0.0, yaw=0.0):
    return np.array([[x, y, z, 2.0, 4.0, 1.5, yaw, 0.0, 0.0]])


def test_edges_of_a_box_ahead_surround_its_centre():
    edges = project_edges(box(3, 20), global_to_camera=LOOKING_ALONG_Y, intrinsic=INTRINSIC)
    assert edges.shape == (12, 2, 2)
    centre = np.array([80 + 100 * 3 / 20, 45.0])
    assert (edges.reshape(-1, 2).min(axis=0) < centre).all()
    assert (edges.reshape(-1, 2).max(axis=0) > centre).all()
    # yaw 0 lies across the view: its nearer face, 19 m away, reaches from x = 1 to x = 5.
    assert edges[..., 0].max() == pytest.approx(80 + 100 * 5 / 19)
    assert edges[..., 0].min() == pytest.approx(80 + 100 * 1 / 21)


def test_what_lies_behind_the_camera_is_not_drawn_and_what_crosses_is_cut():
    behind = project_edges(box(0, -20), global_to_camera=LOOKING_ALONG_Y, intrinsic=INTRINSIC)
    assert len(behind) == 0
    crossing = project_edges(box(0, 0), global_to_camera=LOOKING_ALONG_Y, intrinsic=INTRINSIC)
    assert 0 < len(crossing) <= 12
    # Cut at 0.3 m: no pixel is further out than the box's half size seen at that distance.
    assert np.abs(crossing - [80, 45]).max() <= 100 * 2.0 / 0.3 + 1e-9


def test_submitted_boxes_read_back_yaw_size_and_threshold():
    yaw = 2.2
    record = {
        "translation": [1.0, 2.0, 3.0],
        "size": [1.9, 4.5, 1.6],
        "rotation": [np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)],
        "velocity": [0.5, -0.5],
        "detection_score": 0.4,
    }
    read = submitted_boxes([record, {**record, "detection_score": 0.1}], min_score=0.3)
    np.testing.assert_allclose(read, [[1, 2, 3, 1.9, 4.5, 1.6, yaw, 0.5, -0.5]])
    assert submitted_boxes([], min_score=0.3).shape == (0, 9)


def test_a_picture_of_a_frame_is_written(synthetic, tmp_path):
    frame = synthetic.open().frame(0)
    path = tmp_path / "frame.png"
    layers = {"ground truth": frame.boxes, "nothing": np.zeros((0, 9))}
    frame_picture(path, frame=frame, dataroot=synthetic.dataroot, layers=layers, title="x")
    with Image.open(path) as picture:
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    green = np.array([0x2E, 0xCC, 0x40])
    assert (np.abs(colours.astype(int) - green).max(axis=1) < 8).sum() > 100


def test_the_view_from_above_uses_the_footprint():
    feet = boxlib.corners_bev(box(0, 0, yaw=np.pi / 2))[0]
    np.testing.assert_allclose(sorted(np.ptp(feet, axis=0)), [2.0, 4.0])
