"""One scene as data: the road, the car that drives along it, all that stands or moves, light.

All positions are in the global frame, metres; all times are seconds from the scene's first
keyframe. Things are upright boxes whose bottom stands on the terrain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fd3d.data.synthetic.terrain import Terrain


@dataclass(frozen=True, kw_only=True)
class Path:
    """A curve in the ground plane, sampled every `step` metres from `start` metres on.

    xy: (n, 2); yaw: (n,) heading of the curve, radians, not wrapped.
    """

    start: float
    step: float
    xy: np.ndarray
    yaw: np.ndarray

    def at(self, s: np.ndarray, offset: np.ndarray | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """(xy (..., 2), yaw (...)) at arc length `s`, `offset` metres to the left of the curve."""
        where = (np.asarray(s, dtype=np.float64) - self.start) / self.step
        index = np.arange(len(self.yaw))
        yaw = np.interp(where, index, self.yaw)
        x = np.interp(where, index, self.xy[:, 0]) - np.sin(yaw) * offset
        y = np.interp(where, index, self.xy[:, 1]) + np.cos(yaw) * offset
        return np.stack([x, y], axis=-1), yaw


@dataclass(frozen=True, kw_only=True)
class Road:
    """The main road around the ego lane (offset 0, traffic on the right) and the crossing streets.

    left, right: offsets of the asphalt's edges; crossings: (n, 2) arc length and the angle of the
    crossing street against the main road, radians.
    """

    path: Path
    left: float
    right: float
    lanes_with: tuple[float, ...]
    lanes_against: tuple[float, ...]
    crossings: np.ndarray
    crossing_half_width: float = 4.0

    def crossing(self, number: int) -> tuple[np.ndarray, float]:
        """(centre (2,), yaw) of one crossing street."""
        xy, yaw = self.path.at(self.crossings[number, 0])
        return xy, float(yaw + self.crossings[number, 1])


@dataclass(frozen=True, kw_only=True)
class Motion:
    """How things move, one row each: along the road at an offset, or on a circle of their own.

    A row with `on_road` is at arc length start[0] + speed * direction * t and offset start[1] of
    the road; any other starts at start (x, y) and turns by yaw_rate. speed: metres per second.
    """

    on_road: np.ndarray  # (n,) bool
    start: np.ndarray  # (n, 2)
    yaw: np.ndarray  # (n,) radians; for rows on the road added to the road's own
    speed: np.ndarray  # (n,)
    yaw_rate: np.ndarray  # (n,) radians per second

    def at(self, path: Path, t: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(xy (..., n, 2), yaw (..., n)) at the times `t` (...)."""
        t = np.asarray(t, dtype=np.float64)[..., None]
        turned = self.yaw_rate * t
        chord = self.speed * t * np.sinc(turned / (2 * np.pi))
        bearing = self.yaw + turned / 2
        xy = self.start + np.stack([np.cos(bearing), np.sin(bearing)], axis=-1) * chord[..., None]
        yaw = np.broadcast_to(self.yaw + turned, xy.shape[:-1]).copy()
        road = self.on_road
        if road.any():
            forward = np.where(np.cos(self.yaw[road]) > 0, 1.0, -1.0)
            s = self.start[road, 0] + forward * self.speed[road] * t
            xy[..., road, :], along = path.at(s, self.start[road, 1])
            yaw[..., road] = along + self.yaw[road]
        return xy, yaw


def join_motion(motions: list[Motion]) -> Motion:
    """The rows of all `motions`, in order."""
    return Motion(
        **{
            name: np.concatenate([getattr(motion, name) for motion in motions])
            for name in ("on_road", "start", "yaw", "speed", "yaw_rate")
        }
    )


@dataclass(frozen=True, kw_only=True)
class Actors:
    """Everything that stands on the ground, one row each, annotated things first.

    size: (n, 3) width, length, height of the box in metres; category and attribute: nuScenes
    names, "" for scenery and for no attribute; shape: name in `shapes.SHAPES`; palette: (n, CODES,
    3) colour of each paint code, 0 to 255.
    """

    category: tuple[str, ...]
    attribute: tuple[str, ...]
    shape: tuple[str, ...]
    size: np.ndarray
    motion: Motion
    palette: np.ndarray

    def __len__(self) -> int:
        return len(self.category)

    @property
    def annotated(self) -> int:
        """How many rows, the first ones, have a category."""
        return sum(1 for name in self.category if name)


@dataclass(frozen=True, kw_only=True)
class Light:
    """Sun, sky and air of a scene; colours are factors or 0 to 255 values, RGB."""

    name: str
    ambient: np.ndarray  # (3,) factor on every face
    sun: np.ndarray  # (3,) factor on a face that looks straight into the sun
    sun_direction: np.ndarray  # (3,) unit, towards the sun
    shadow: float  # share of the sun that a cast shadow takes away
    haze: np.ndarray  # (3,) colour of far air and of the sky at the horizon
    zenith: np.ndarray  # (3,) colour of the sky above
    haze_per_metre: float
    noise: float  # standard deviation of the pixel noise, grey levels
    drops: int  # rain streaks in a million pixels


@dataclass(frozen=True, kw_only=True)
class Ego:
    """The car with the sensors: arc length s0 + speed * t + sway, and small body motion."""

    start: float
    speed: float
    sway: float
    wobble: np.ndarray  # (2, 3) amplitude rad, rate rad/s, phase rad of pitch and of roll

    def travelled(self, t: np.ndarray) -> np.ndarray:
        """Arc length on the road at the times `t`."""
        t = np.asarray(t, dtype=np.float64)
        return self.start + self.speed * t + self.sway * self.speed * np.sin(0.4 * t)


@dataclass(frozen=True, kw_only=True)
class World:
    """A whole scene, ready to be looked at at any time in `duration` seconds."""

    terrain: Terrain
    road: Road
    ego: Ego
    actors: Actors
    light: Light
    duration: float

    def ego_pose(self, t: float) -> np.ndarray:
        """(4, 4) float64 ego to global: on the road, tilted with the ground, swaying a little."""
        xy, yaw = self.road.path.at(self.ego.travelled(t))
        slope = self.terrain.gradient(xy)
        up = np.array([-slope[0], -slope[1], 1.0])
        up /= np.linalg.norm(up)
        forward = np.array([np.cos(yaw), np.sin(yaw), 0.0])
        forward -= up * (forward @ up)
        forward /= np.linalg.norm(forward)
        ground = np.stack([forward, np.cross(up, forward), up], axis=1)
        amplitude, rate, phase = self.ego.wobble.T
        pitch, roll = amplitude * np.sin(rate * t + phase)
        tilt_pitch = np.array(
            [
                [np.cos(pitch), 0.0, np.sin(pitch)],
                [0.0, 1.0, 0.0],
                [-np.sin(pitch), 0.0, np.cos(pitch)],
            ]
        )
        tilt_roll = np.array(
            [
                [1.0, 0.0, 0.0],
                [0.0, np.cos(roll), -np.sin(roll)],
                [0.0, np.sin(roll), np.cos(roll)],
            ]
        )
        pose = np.eye(4)
        pose[:3, :3] = ground @ tilt_pitch @ tilt_roll
        pose[:2, 3] = xy
        pose[2, 3] = self.terrain.height(xy)
        return pose

    def placed(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """(bottom (n, 3), yaw (n,)) of every actor at time `t`."""
        xy, yaw = self.actors.motion.at(self.road.path, t)
        return np.concatenate([xy, self.terrain.height(xy)[:, None]], axis=1), yaw
