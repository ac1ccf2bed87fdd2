"""Where a network's cameras stand at each of its moments, in the frame that it works in.

BEVDet's first generation (G1) works in the keyframe's LIDAR frame and takes its adjacent pictures
from sweeps; the second (G2) works in the ego frame and takes them from the keyframes before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fd3d.classes import CAMERAS

if TYPE_CHECKING:
    from fd3d.data.frames import Adjacent, Frame

FRONT = CAMERAS.index("CAM_FRONT")


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One picture of every camera; axes in the order of CAMERAS.

    files: below the dataroot. cameras: (N, 4, 4) camera to the network's frame, float64. intrins:
    (N, 3, 3) pixels of the stored pictures.
    """

    files: tuple[str, ...]
    cameras: np.ndarray
    intrins: np.ndarray


def cameras_in_ego(camera2ego: np.ndarray, ego2global: np.ndarray, key: np.ndarray) -> np.ndarray:
    """(..., 4, 4) cameras in the key ego frame, float64.

    Args:
        camera2ego, ego2global: (..., 4, 4) mounting, and the car's pose at the picture's time.
        key: (4, 4) the car's pose that gives the frame. G2 takes that of the *first* camera of the
            keyframe here, though boxes are in that of CAM_FRONT: milliseconds apart.
    """
    return np.linalg.inv(key) @ ego2global @ camera2ego


def sweep_moments(frame: Frame, adjacent: Adjacent | None) -> list[Moment]:
    """The keyframe and its adjacent sweep, if any, in the keyframe's LIDAR frame."""
    intrins = np.stack([shot.intrinsic for shot in frame.cameras])
    cameras = frame.camera_to_lidar()
    files = tuple(shot.file for shot in frame.cameras)
    moments = [Moment(files=files, cameras=cameras, intrins=intrins)]
    if adjacent is not None:
        cameras = ego_motion(frame, adjacent) @ cameras
        moments.append(Moment(files=adjacent.files, cameras=cameras, intrins=intrins))
    return moments


def ego_motion(frame: Frame, adjacent: Adjacent) -> np.ndarray:
    """(4, 4) LIDAR at the adjacent moment to the keyframe's, with the keyframe's mounting."""
    now = frame.ego2global @ frame.lidar2ego
    return np.linalg.inv(now) @ adjacent.ego2global @ frame.lidar2ego


def keyframe_moments(frames: Sequence[Frame]) -> list[Moment]:
    """The keyframe, first, and others in the keyframe's ego frame."""
    key = frames[0].cameras[0].ego2global
    return [
        Moment(
            files=tuple(shot.file for shot in frame.cameras),
            cameras=cameras_in_ego(
                np.stack([shot.camera2ego for shot in frame.cameras]),
                np.stack([shot.ego2global for shot in frame.cameras]),
                key,
            ),
            intrins=np.stack([shot.intrinsic for shot in frame.cameras]),
        )
        for frame in frames
    ]
