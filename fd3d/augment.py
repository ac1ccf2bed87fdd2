"""BEV augmentation: rotation, scale and flips of the ground plane, as BEVDepth (G1) draws them.

One matrix moves everything: points, boxes, and the cameras, whose pixels then see the moved world
unchanged. Flips mirror the world, so yaw and velocity change their meaning with it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from fd3d.boxes import VX, VY, YAW, H, W


@dataclass(frozen=True, kw_only=True)
class BEVAugmentation:
    """One drawn augmentation of the LIDAR frame; applied as rotation, scale, then flips.

    rotate: radians, clockwise seen from above (G1's sign); scale: factor of all lengths;
    flip_y: y -> -y (G1's "horizontal"); flip_x: x -> -x ("vertical").
    """

    rotate: float = 0.0
    scale: float = 1.0
    flip_y: bool = False
    flip_x: bool = False

    def matrix(self) -> np.ndarray:
        """(4, 4) float64 from the un-augmented to the augmented frame."""
        cos, sin = math.cos(self.rotate), math.sin(self.rotate)
        turn = np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])
        flip = np.diag([-1.0 if self.flip_x else 1.0, -1.0 if self.flip_y else 1.0, 1.0])
        matrix = np.eye(4)
        matrix[:3, :3] = flip @ (self.scale * turn)
        return matrix


def generator(*purpose: object) -> np.random.Generator:
    """Random numbers that depend on what they are for and on nothing else."""
    text = "/".join(map(str, purpose))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def replayed(token: str, number: int) -> BEVAugmentation:
    """Augmentation `number` of those that a cache replays for a frame (`fd3d.distill.replay`)."""
    return draw_bev(generator("replay", number, token))


def draw_bev(
    rng: np.random.Generator,
    *,
    rotate: float = 0.3925,
    scale: tuple[float, float] = (0.95, 1.05),
    flip: float = 0.5,
) -> BEVAugmentation:
    """A training augmentation with G1's ranges; the draws are rotation, scale, flip y, flip x.

    Args:
        rng: where the numbers come from.
        rotate: radians; the angle is uniform in +- this.
        scale: lowest and highest factor.
        flip: probability of each of the two flips.
    """
    return BEVAugmentation(
        rotate=float(rng.uniform(-rotate, rotate)),
        scale=float(rng.uniform(*scale)),
        flip_y=bool(rng.uniform() < flip),
        flip_x=bool(rng.uniform() < flip),
    )


def move_boxes(boxes: np.ndarray, augmentation: BEVAugmentation) -> np.ndarray:
    """Boxes (N, 9) as `fd3d.boxes` after the augmentation; sizes and velocities scale along."""
    linear = augmentation.matrix()[:3, :3]
    moved = np.array(boxes, dtype=np.float64).reshape(-1, 9)
    heading = np.stack([np.cos(moved[:, YAW]), np.sin(moved[:, YAW])], axis=1)
    heading = heading @ linear[:2, :2].T
    moved[:, :3] = moved[:, :3] @ linear.T
    moved[:, W : H + 1] *= augmentation.scale
    moved[:, YAW] = np.arctan2(heading[:, 1], heading[:, 0])
    moved[:, VX : VY + 1] = moved[:, VX : VY + 1] @ linear[:2, :2].T
    return moved
