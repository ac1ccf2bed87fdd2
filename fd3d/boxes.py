"""Boxes in the one convention used inside this project, and its converters to others.

boxes: (N, 9) = x y z w l h yaw vx vy. Centre (not bottom) in metres; w across, l along the heading,
h up; yaw counter-clockwise from +x to the heading, radians; velocity in metres per second. All in
one right-handed frame with z up, which the caller names (global, ego or lidar). Missing velocities
are NaN. Heading yaw = 0 points along +x in every frame.
"""

from __future__ import annotations

import numpy as np

X, Y, Z, W, L, H, YAW, VX, VY = range(9)


def wrap_angle(angle):
    """`angle` (array or tensor, radians) brought to [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def old_yaw(yaw):
    """Yaw of mmdet3d before 1.0 (clockwise, from -y) for a counter-clockwise yaw; self-inverse.

    BEVDet's first generation regresses sine and cosine of this angle.
    """
    return -yaw - np.pi / 2


def transform(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Boxes (N, 9) moved by the rigid `matrix` (4, 4); sizes stay, yaw follows the heading.

    Tilt is dropped as nuScenes' own evaluation drops it: the new yaw is that of the heading
    vector projected on the new ground plane. NaN velocities stay NaN.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 9)
    rotation, translation = matrix[:3, :3], matrix[:3, 3]
    zeros = np.zeros(len(boxes))
    heading = np.stack([np.cos(boxes[:, YAW]), np.sin(boxes[:, YAW]), zeros], axis=1)
    velocity = np.stack([boxes[:, VX], boxes[:, VY], zeros], axis=1)
    moved = boxes.copy()
    moved[:, :3] = boxes[:, :3] @ rotation.T + translation
    heading = heading @ rotation.T
    moved[:, YAW] = np.arctan2(heading[:, 1], heading[:, 0])
    moved[:, VX : VY + 1] = (velocity @ rotation.T)[:, :2]
    return moved


def seen_from(boxes: np.ndarray, pose: np.ndarray) -> np.ndarray:
    """Boxes (N, 9) of a level frame, such as the global one, in the frame that stands there at the
    rigid `pose` (4, 4), tilted or not.

    As `transform` with the inverse pose, but for the yaw: the heading chosen is the one in the new
    ground plane that lies over the old heading. `transform` by `pose` leads back to it exactly,
    where two projections would lose a square of the tilt.
    """
    moved = transform(boxes, np.linalg.inv(pose))
    heading = np.stack([np.cos(boxes[:, YAW]), np.sin(boxes[:, YAW])], axis=1)
    heading = heading @ np.linalg.inv(pose[:2, :2]).T
    moved[:, YAW] = np.arctan2(heading[:, 1], heading[:, 0])
    return moved


def corners(boxes: np.ndarray) -> np.ndarray:
    """(N, 8, 3) corners: the bottom four, then the top four, each front-left, front-right,
    back-right, back-left seen along the heading."""
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 9)
    along = np.array([1, 1, -1, -1, 1, 1, -1, -1]) / 2
    left = np.array([1, -1, -1, 1, 1, -1, -1, 1]) / 2
    up = np.array([-1, -1, -1, -1, 1, 1, 1, 1]) / 2
    dx = boxes[:, L, None] * along
    dy = boxes[:, W, None] * left
    dz = boxes[:, H, None] * up
    cos, sin = np.cos(boxes[:, YAW, None]), np.sin(boxes[:, YAW, None])
    points = np.stack([cos * dx - sin * dy, sin * dx + cos * dy, dz], axis=2)
    return points + boxes[:, None, :3]


def corners_bev(boxes: np.ndarray) -> np.ndarray:
    """(N, 4, 2) footprint corners, front-left first, clockwise seen from above."""
    return corners(boxes)[:, :4, :2]
