"""One lidar sweep of a world: 32 beams turning once, each ray cast at the ground and at all boxes.

The sweep is taken at one instant; the real sensor turns for 50 ms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fd3d.data.synthetic.parts import SLACK, pose_parts
from fd3d.data.synthetic.raster import expand
from fd3d.data.synthetic.render import Stage
from fd3d.data.synthetic.terrain import first_hit

BEAMS = 32
AZIMUTHS = 1080
MAX_RANGE = 70.0
_LOWEST, _STEP = np.radians(-30.67), np.radians(1.3333)  # elevations of the real 32-beam sensor
_TURN = 2 * np.pi / AZIMUTHS
_NEVER = np.float32(np.inf)


def _unit_rays() -> np.ndarray:
    """(BEAMS * AZIMUTHS, 3) unit directions, beam by beam from the lowest, lidar frame."""
    elevation = (_LOWEST + _STEP * np.arange(BEAMS))[:, None]
    azimuth = (_TURN * np.arange(AZIMUTHS))[None]
    x = np.cos(elevation) * np.cos(azimuth)
    y = np.cos(elevation) * np.sin(azimuth)
    return np.stack([x, y, np.sin(elevation) + 0 * x], axis=-1).reshape(-1, 3)


_RAYS = _unit_rays()


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """points: (n, 5) float32 x y z intensity ring, lidar frame; inside: (actors,) int64 points in
    each actor's box."""

    points: np.ndarray
    inside: np.ndarray


def sweep(stage: Stage, pose: np.ndarray, time: float, rng: np.random.Generator) -> Sweep:
    """What the lidar at `pose` (4, 4, lidar to global) returns at `time`."""
    world, parts = stage.world, stage.parts
    bottom, yaw = world.placed(time)
    origin, turn = pose[:3, 3], pose[:3, :3]
    reach = first_hit(world.terrain, origin, _RAYS @ turn.T, near=1.0, far=MAX_RANGE + 5.0)
    middle = bottom + np.array([0.0, 0.0, 0.5]) * world.actors.size[:, [2]]
    local = (middle - origin) @ turn
    radius = np.linalg.norm(world.actors.size, axis=1) / 2
    near = np.linalg.norm(local, axis=1) - radius < MAX_RANGE
    chosen = np.flatnonzero(near[parts.actor])
    posed = pose_parts(parts, chosen, bottom, yaw, origin, turn)
    part, ray = _candidates(posed, parts.half[chosen])
    t = _enter(posed, parts.half[chosen], part, ray)
    struck = np.isfinite(t)
    part, ray, t = part[struck], ray[struck], t[struck]
    np.minimum.at(reach, ray, t)
    first = t <= reach[ray]
    hit = np.full(len(reach), -1)
    hit[ray[first]] = parts.actor[chosen[part[first]]]

    # Some returns get lost, more of them far away. Range noise stays below the boxes' slack.
    keep = (reach < MAX_RANGE) & (rng.random(len(reach)) > 0.03 + 0.1 * reach / MAX_RANGE)
    error = np.clip(rng.normal(0.0, 0.005, len(reach)), -SLACK * 0.75, SLACK * 0.75)
    ray = np.flatnonzero(keep)
    points = np.empty((len(ray), 5), dtype=np.float32)
    points[:, :3] = _RAYS[ray] * (reach[ray] + error[ray])[:, None]
    brightness = world.actors.palette[:, :2].mean(axis=(1, 2)) / 3.0
    intensity = np.where(hit[ray] >= 0, brightness[hit[ray]], 12.0)
    points[:, 3] = np.clip(intensity + rng.normal(0.0, 4.0, len(ray)), 0, 255).round()
    points[:, 4] = ray // AZIMUTHS
    return Sweep(points=points, inside=_count_inside(points[:, :3], stage, local, yaw, turn))


def _candidates(posed, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(part, ray) pairs that may meet: the rays in each part's window of azimuth and elevation."""
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, 8).T
    corners = signs * half[:, None] - posed.eye[:, None]  # actor's axes, seen from the sensor
    corners = np.einsum("nki,nij->nkj", corners, posed.turn)
    flat = np.linalg.norm(corners[..., :2], axis=-1)
    middle = np.einsum("ni,nij->nj", -posed.eye, posed.turn)
    centre = np.arctan2(middle[:, 1], middle[:, 0])
    azimuth = np.arctan2(corners[..., 1], corners[..., 0]) - centre[:, None]
    azimuth = (azimuth + np.pi) % (2 * np.pi) - np.pi
    # The nearest point of an edge can be nearer than its corners.
    nearest = np.linalg.norm(middle[:, :2], axis=1) - np.linalg.norm(half[:, :2], axis=1) - 0.2
    nearest = np.minimum(flat.min(axis=1), np.maximum(nearest, 0.5))
    top, low = corners[..., 2].max(axis=1), corners[..., 2].min(axis=1)
    highest = np.arctan2(top, np.where(top > 0, nearest, flat.max(axis=1)))
    lowest = np.arctan2(low, np.where(low < 0, nearest, flat.max(axis=1)))
    beam0 = np.clip(np.floor((lowest - _LOWEST) / _STEP), 0, BEAMS).astype(int)
    beam1 = np.clip(np.ceil((highest - _LOWEST) / _STEP) + 1, 0, BEAMS).astype(int)
    column0 = np.floor((azimuth.min(axis=1) + centre) / _TURN).astype(int)
    column1 = np.ceil((azimuth.max(axis=1) + centre) / _TURN).astype(int) + 1
    part, beam = expand(beam0, np.maximum(beam1 - beam0, 0))
    run, column = expand(column0[part], (column1 - column0)[part])
    return part[run], beam[run] * AZIMUTHS + column % AZIMUTHS


def _enter(posed, half: np.ndarray, part: np.ndarray, ray: np.ndarray) -> np.ndarray:
    """Range at which each ray enters its part's box, inf where it passes by (slab test)."""
    turn, eye = posed.turn.astype(np.float32), posed.eye.astype(np.float32)
    half = half.astype(np.float32)
    dx, dy, dz = _RAYS.astype(np.float32)[ray].T
    enter, leave = np.full(len(ray), -_NEVER), np.full(len(ray), _NEVER)
    for axis in range(3):
        a, b, c = turn[part, axis].T
        along = a * dx + b * dy + c * dz
        inverse = 1 / np.where(np.abs(along) < 1e-9, np.float32(1e-9), along)
        one = (half[:, axis] - eye[:, axis])[part] * inverse
        two = (-half[:, axis] - eye[:, axis])[part] * inverse
        enter = np.maximum(enter, np.minimum(one, two))
        leave = np.minimum(leave, np.maximum(one, two))
    return np.where((enter < leave) & (enter > 0.3), enter, _NEVER)


def _count_inside(
    points: np.ndarray, stage: Stage, middle: np.ndarray, yaw: np.ndarray, turn: np.ndarray
) -> np.ndarray:
    """(actors,) points in each annotated box, 0 for scenery; middle: (actors, 3) lidar frame."""
    number = stage.world.actors.annotated
    yaw, half = yaw[:number], stage.world.actors.size[:number, [1, 0, 2]] / 2
    cos, sin = np.cos(yaw)[:, None], np.sin(yaw)[:, None]
    axes = np.stack(
        [cos * turn[0] + sin * turn[1], cos * turn[1] - sin * turn[0], 0 * cos + turn[2]], axis=1
    )
    offset = np.einsum("nij,nj->ni", axes, middle[:number]).astype(np.float32)
    inside = np.ones((number, len(points)), dtype=bool)
    for axis in range(3):
        along = axes[:, axis].astype(np.float32) @ points.T - offset[:, axis, None]
        inside &= np.abs(along) <= half[:, axis, None].astype(np.float32)
    total = np.zeros(len(middle), dtype=np.int64)
    total[:number] = inside.sum(axis=1)
    return total
