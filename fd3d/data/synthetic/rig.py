"""The sensors of the synthetic car: where they sit, what they see, when they look.

Calibration follows the real nuScenes car (numbers of one scene, rounded), so that grids, image
sizes and matching ranges made for nuScenes fit. Frames: ego x forward, y left, z up; LIDAR_TOP
x right, y forward, z up; camera x right, y down, z along the optical axis. Intrinsics are in
pixels of a 1600 x 900 image, and a pixel with index i covers [i, i + 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pyquaternion import Quaternion

from fd3d.classes import CAMERAS

FULL_WIDTH = 1600
KEYFRAME_HZ = 2
# Images go back so far before the first keyframe, so that it too has the adjacent frame that a
# two-frame network wants, which G1 takes 1.5 s earlier.
LEAD_IN_SECONDS = 1.5
LIDAR = "LIDAR_TOP"


@dataclass(frozen=True, kw_only=True)
class Mount:
    """Where one sensor sits in the ego frame, and its pinhole matrix if it is a camera.

    rotation: unit quaternion w x y z, sensor to ego; translation: metres; intrinsic: (3, 3) pixels
    of a full-width image, None for the lidar; delay: seconds from the keyframe's lidar time.
    """

    channel: str
    rotation: tuple[float, float, float, float]
    translation: tuple[float, float, float]
    intrinsic: np.ndarray | None = None
    delay: float = 0.0

    def to_ego(self) -> np.ndarray:
        """(4, 4) float64, sensor to ego."""
        matrix = Quaternion(self.rotation).transformation_matrix
        matrix[:3, 3] = self.translation
        return matrix


_LIDAR_MOUNT = Mount(
    channel=LIDAR, rotation=(0.7078, -0.0065, 0.0106, -0.7063), translation=(0.944, 0.0, 1.84)
)

# channel: focal length, principal point, translation, rotation, delay. The lidar of the real car
# turns clockwise and triggers each camera as it sweeps past, hence the delays.
_CAMERA_FACTS = {
    "CAM_FRONT_LEFT": (
        (1272.6, 826.6, 479.8),
        (1.524, 0.495, 1.509),
        (0.6757, -0.6737, 0.2121, -0.2112),
        -0.043,
    ),
    "CAM_FRONT": (
        (1266.4, 816.3, 491.5),
        (1.701, 0.016, 1.511),
        (0.4998, -0.5030, 0.4998, -0.4974),
        -0.035,
    ),
    "CAM_FRONT_RIGHT": (
        (1260.8, 808.0, 495.3),
        (1.551, -0.493, 1.496),
        (0.2060, -0.2027, 0.6825, -0.6714),
        -0.028,
    ),
    "CAM_BACK_LEFT": (
        (1256.7, 792.1, 492.8),
        (1.036, 0.485, 1.591),
        (0.6924, -0.7032, -0.1165, 0.1120),
        -0.001,
    ),
    "CAM_BACK": (
        (809.2, 829.2, 481.8),
        (0.028, 0.003, 1.579),
        (0.5038, -0.4974, -0.4942, 0.5045),
        -0.010,
    ),
    "CAM_BACK_RIGHT": (
        (1259.5, 807.3, 501.2),
        (1.015, -0.481, 1.562),
        (0.1228, -0.1324, -0.7004, 0.6905),
        -0.020,
    ),
}


def mounts(rng: np.random.Generator) -> dict[str, Mount]:
    """The lidar and the six cameras of one car, by channel.

    Every car is assembled a little differently: cameras are turned by some tenths of a degree,
    shifted by about a centimetre and their focal length is off by some tenths of a percent.
    """
    rig = {LIDAR: _LIDAR_MOUNT}
    for channel in CAMERAS:
        (focal, cx, cy), translation, rotation, delay = _CAMERA_FACTS[channel]
        turn = rng.normal(0.0, np.radians(0.4), 3)
        angle = float(np.linalg.norm(turn))
        jitter = Quaternion(axis=turn / angle, radians=angle)
        focal = focal * float(1 + rng.normal(0.0, 0.003))
        rig[channel] = Mount(
            channel=channel,
            rotation=tuple((Quaternion(rotation).normalised * jitter).elements.tolist()),
            translation=tuple((np.array(translation) + rng.normal(0.0, 0.01, 3)).tolist()),
            intrinsic=np.array([[focal, 0.0, cx], [0.0, focal, cy], [0.0, 0.0, 1.0]]),
            delay=delay,
        )
    return rig


def intrinsic_at(mount: Mount, width: int) -> np.ndarray:
    """The (3, 3) pinhole matrix of `mount` for images that are `width` pixels wide."""
    matrix = mount.intrinsic * (width / FULL_WIDTH)
    matrix[2, 2] = 1.0
    return matrix


def quaternion(rotation: np.ndarray) -> list[float]:
    """w x y z of a (3, 3) rotation matrix."""
    return Quaternion(matrix=rotation, rtol=1e-5, atol=1e-6).normalised.elements.tolist()
