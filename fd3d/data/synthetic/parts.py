"""The boxes that a scene's actors are made of, and where they are at one moment.

Actors are drawn SLACK metres smaller than their annotated boxes on each side, so that lidar points
on a surface are inside the box in spite of noise and rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fd3d.data.synthetic import shapes
from fd3d.data.synthetic.world import Actors

SLACK = 0.02


@dataclass(frozen=True, kw_only=True)
class Parts:
    """All boxes of all actors, one row each, in their actor's own upright frame.

    actor: (P,) row in `Actors`; picture: (P,) number in the atlas; centre: (P, 3) metres from the
    middle of the actor's bottom; half: (P, 3) half extents along x (front), y (left), z (up).
    """

    actor: np.ndarray
    picture: np.ndarray
    centre: np.ndarray
    half: np.ndarray


def build_parts(actors: Actors) -> Parts:
    """The boxes of `actors`, in their order."""
    atlas = shapes.atlas()
    actor, picture = [], []
    for row, shape in enumerate(actors.shape):
        first, count = atlas.first[shape]
        actor.extend([row] * count)
        picture.extend(range(first, first + count))
    actor, picture = np.array(actor), np.array(picture)
    extent = atlas.extents[picture].reshape(-1, 3, 2)
    room = actors.size[actor][:, [1, 0, 2]] - 2 * SLACK  # length, width, height
    middle, half = extent.mean(axis=2), (extent[:, :, 1] - extent[:, :, 0]) / 2
    centre = middle * room
    centre[:, 2] += SLACK
    return Parts(actor=actor, picture=picture, centre=centre, half=half * room)


@dataclass(frozen=True, kw_only=True)
class Posed:
    """Some of the parts as one sensor sees them at one moment.

    row: (n,) which rows of `Parts`; turn: (n, 3, 3) from the sensor's frame (or any linear function
    of it) to the actor's; eye: (n, 3) the sensor's place relative to the part's centre, actor's
    frame; cos, sin: (n,) of the actor's yaw.
    """

    row: np.ndarray
    turn: np.ndarray
    eye: np.ndarray
    cos: np.ndarray
    sin: np.ndarray


def pose_parts(
    parts: Parts,
    chosen: np.ndarray,
    bottom: np.ndarray,
    yaw: np.ndarray,
    origin: np.ndarray,
    to_global: np.ndarray,
) -> Posed:
    """Rows `chosen` of `parts` seen from `origin` (3,); to_global (3, 3) turns sensor to global.

    bottom (n, 3) and yaw (n,) are those of the actors, as `World.placed` gives them.
    """
    actor = parts.actor[chosen]
    cos, sin = np.cos(yaw[actor]), np.sin(yaw[actor])
    away = origin - bottom[actor]
    eye = np.stack([cos * away[:, 0] + sin * away[:, 1], cos * away[:, 1] - sin * away[:, 0]], 1)
    eye = np.concatenate([eye, away[:, 2:]], axis=1) - parts.centre[chosen]
    turn = np.empty((len(chosen), 3, 3))
    turn[:, 0] = cos[:, None] * to_global[0] + sin[:, None] * to_global[1]
    turn[:, 1] = cos[:, None] * to_global[1] - sin[:, None] * to_global[0]
    turn[:, 2] = to_global[2]
    return Posed(row=chosen, turn=turn, eye=eye, cos=cos, sin=sin)
