"""Draws a scene: hills, road, light, and things put where they do not run into one another.

Positions are drawn around the place where the car is at a random moment, so that every frame of a
scene has about as many things around it. A candidate whose discs would touch something placed
before it, at any moment of the scene, is thrown away.
"""

from __future__ import annotations

import numpy as np

from fd3d.data.synthetic import things
from fd3d.data.synthetic.light import draw_light
from fd3d.data.synthetic.rig import LEAD_IN_SECONDS
from fd3d.data.synthetic.terrain import draw_terrain
from fd3d.data.synthetic.things import KINDS
from fd3d.data.synthetic.world import Actors, Ego, Motion, Path, Road, World, join_motion

# Annotated things within 50 m of the car in an average frame; fewer where they are kept nearer.
CROWD = (25.0, 38.0)
FULL_REACH = 50.0
_DISCS = 5
_ROWS = ("barrier", "cone")


def draw_world(rng: np.random.Generator, *, duration: float, reach: float = FULL_REACH) -> World:
    """A scene of `duration` seconds, all of it decided by `rng`; things keep within about `reach`
    metres of the car."""
    terrain = draw_terrain(rng)
    standing = rng.random() < 0.12
    ego = Ego(
        start=0.0,
        speed=0.0 if standing else float(rng.uniform(2.0, 10.0)),
        sway=float(rng.uniform(-0.3, 0.3)),
        wobble=np.stack(
            [np.radians(rng.uniform(0.1, 0.5, 2)), rng.uniform(0.8, 2.5, 2), rng.uniform(0, 6, 2)],
            axis=1,
        ),
    )
    road = _draw_road(rng, ahead=float(ego.travelled(duration)))
    light = draw_light(rng)
    crowd = _Crowd(rng, road, ego, duration, reach)
    crowd.fill(wanted=float(rng.uniform(*CROWD)) * reach / FULL_REACH)
    annotated = len(crowd.rows)
    crowd.scenery()
    rows = crowd.rows
    actors = Actors(
        category=tuple(
            KINDS[row["kind"]].category if i < annotated else "" for i, row in enumerate(rows)
        ),
        attribute=tuple(row["attribute"] for row in rows),
        shape=tuple(row["shape"] for row in rows),
        size=np.stack([row["size"] for row in rows]),
        motion=join_motion([row["motion"] for row in rows]),
        palette=np.stack([things.draw_palette(rng, row["kind"], row["shape"]) for row in rows]),
    )
    return World(terrain=terrain, road=road, ego=ego, actors=actors, light=light, duration=duration)


def _draw_road(rng: np.random.Generator, *, ahead: float) -> Road:
    start, step = -150.0, 0.5
    s = np.arange(start, ahead + 150.0, step)
    bend = rng.uniform(0.0, 0.016) * np.sin(
        2 * np.pi * s / rng.uniform(110, 200) + rng.uniform(0, 6)
    )
    bend += rng.normal(0.0, 0.002)
    yaw = np.cumsum(bend) * step + rng.uniform(-np.pi, np.pi)
    xy = np.cumsum(np.stack([np.cos(yaw), np.sin(yaw)], axis=1), axis=0) * step
    xy += rng.uniform(300.0, 1500.0, 2)
    path = Path(start=start, step=step, xy=xy, yaw=yaw)
    lanes_with = (0.0, -3.6)[: rng.integers(1, 3)]
    lanes_against = (3.6, 7.2)[: rng.integers(1, 3)]
    where, crossings = -40.0 + rng.uniform(0, 40), []
    while where < ahead + 60.0:
        crossings.append((where, np.radians(rng.uniform(50, 130))))
        where += rng.uniform(35.0, 80.0)
    return Road(
        path=path,
        left=lanes_against[-1] + 4.2,
        right=lanes_with[-1] - 4.2,
        lanes_with=lanes_with,
        lanes_against=lanes_against,
        crossings=np.array(crossings),
    )


def _still(xy: np.ndarray, yaw: float) -> Motion:
    return _free(xy, yaw, 0.0, 0.0)


def _free(xy: np.ndarray, yaw: float, speed: float, yaw_rate: float) -> Motion:
    return Motion(
        on_road=np.array([False]),
        start=np.array([xy], dtype=np.float64),
        yaw=np.array([yaw]),
        speed=np.array([speed]),
        yaw_rate=np.array([yaw_rate]),
    )


def _on_road(s: float, offset: float, speed: float, *, against: bool) -> Motion:
    return Motion(
        on_road=np.array([True]),
        start=np.array([[s, offset]]),
        yaw=np.array([np.pi if against else 0.0]),
        speed=np.array([speed]),
        yaw_rate=np.array([0.0]),
    )


class _Crowd:
    """Collects rows (dicts of kind, shape, size, motion, attribute) that stay clear of the rest."""

    def __init__(
        self, rng: np.random.Generator, road: Road, ego: Ego, duration: float, reach: float
    ) -> None:
        self.rng, self.road, self.ego, self.duration = rng, road, ego, duration
        self.reach = reach
        self.rows: list[dict] = []
        self.times = np.arange(-LEAD_IN_SECONDS - 0.1, duration + 0.2, 0.25)
        self.ego_xy, ego_yaw = road.path.at(ego.travelled(self.times))
        ahead = np.stack([np.cos(ego_yaw), np.sin(ego_yaw)], axis=-1)
        self.discs = [self._discs(np.array([2.2, 5.6, 1.8]), self.ego_xy + 0.9 * ahead, ego_yaw)]

    def fill(self, *, wanted: float) -> None:
        """Place things until on average `wanted` of them are within reach of the car."""
        names = list(KINDS)
        shares = np.array([KINDS[name].share for name in names])
        counts = np.zeros(len(names))
        for _ in range(900):
            if counts.sum() >= wanted:
                break
            lack = shares * (wanted * 0.5 + counts.sum()) - counts
            pick = int(np.argmax(lack + self.rng.gumbel(0.0, 0.35, len(names))))
            counts[pick] += self._place(names[pick])

    def scenery(self) -> None:
        """Unlabelled things: buildings, walls, trees, poles."""
        rng = self.rng
        density = rng.uniform(0.2, 1.0) * (1 + self.ego.travelled(self.duration) / 100)
        plan = (
            ("building", 9, (9, 14, 8), (20, 60)),
            ("wall", 3, (0.4, 9, 1.6), (12, 40)),
            ("tree", 12, (3.2, 3.2, 6.0), (12, 50)),
            ("pole", 8, (0.22, 0.22, 4.0), (6, 40)),
        )
        for shape, number, size, reach in plan:
            for _ in range(int(number * density * rng.uniform(0.6, 1.4))):
                xy, road_yaw = self._beside(rng.uniform(*reach))
                yaw = road_yaw + rng.normal(0.0, 0.15) + np.pi / 2 * rng.integers(4)
                self._try(
                    "scenery", shape, np.array(size) * rng.uniform(0.7, 1.4, 3), _still(xy, yaw)
                )

    def _place(self, name: str) -> float:
        """Try one thing (or one row of them); how many it adds to an average frame."""
        rng, kind = self.rng, KINDS[name]
        shape = kind.shapes[rng.integers(len(kind.shapes))]
        if name in _ROWS:
            return self._place_row(name, shape)
        moving = bool(rng.random() < kind.moving)
        sitting = False
        if name in things.CYCLES:
            # A rider does not mean motion: one in three that wait has one too.
            shape = "cycle_rider" if moving or rng.random() < 0.35 else "cycle"
        elif name == "pedestrian" and not moving and rng.random() < 0.12:
            shape, sitting = "sitter", True
        size = things.draw_size(rng, kind, shape)
        speed = float(rng.uniform(*kind.speed)) if moving else 0.0
        if name in things.VEHICLES:
            motion, in_lane = self._drive(size, speed)
        elif name in things.CYCLES and moving and rng.random() < 0.4:
            motion, in_lane = self._along_road(speed, edge=True), False
        else:
            motion, in_lane = self._anywhere(speed), False
        attribute = things.attribute(name, shape, moving=moving, in_lane=in_lane, sitting=sitting)
        return self._try(name, shape, size, motion, attribute)

    def _place_row(self, name: str, shape: str) -> float:
        """A line of barriers or cones, along, across or beside the road."""
        rng, kind = self.rng, KINDS[name]
        size = things.draw_size(rng, kind, shape)
        xy, road_yaw = self._beside(rng.uniform(-1.0, 14.0))
        line = road_yaw + (rng.normal(0.0, 0.1) if rng.random() < 0.4 else rng.uniform(-3.2, 3.2))
        gap = size[0] + rng.uniform(0.25, 0.7) if name == "barrier" else rng.uniform(1.2, 3.0)
        direction = np.array([np.cos(line), np.sin(line)])
        # A barrier's long side is its width, so it faces across the line.
        facing = line + np.pi / 2 + (np.pi if rng.random() < 0.5 else 0.0)
        added = 0.0
        for i in range(rng.integers(2, 5)):
            spot = xy + direction * gap * i + rng.normal(0.0, 0.08, 2)
            added += self._try(name, shape, size, _still(spot, facing + rng.normal(0.0, 0.07)))
        return added

    def _drive(self, size: np.ndarray, speed: float) -> tuple[Motion, bool]:
        """A vehicle's place: in a lane, on a crossing street, parked, or out on an open lot."""
        rng, road = self.rng, self.road
        draw = rng.random()
        if speed > 0:
            if draw < 0.45:
                return self._along_road(speed, edge=False), True
            if draw < 0.75:
                return self._on_crossing(speed, rng.choice([-1.9, 1.9])), True
            return self._anywhere(speed), False
        if draw < 0.15:
            return self._along_road(0.0, edge=False), True
        if draw < 0.5:
            left = rng.random() < 0.5
            angled = rng.random() < 0.5
            half = size[1] / 2 if angled else size[0] / 2
            offset = road.left - 2.2 + half if left else road.right + 2.2 - half
            xy, yaw = road.path.at(self._arc_length(), offset)
            turn = (
                rng.choice([-1, 1]) * rng.uniform(0.6, np.pi / 2) if angled else rng.normal(0, 0.06)
            )
            return _still(xy, float(yaw) + turn + np.pi * rng.integers(2)), False
        if draw < 0.65:
            return self._on_crossing(0.0, rng.choice([-1, 1]) * rng.uniform(4.0, 6.0)), False
        return self._anywhere(0.0), False

    def _along_road(self, speed: float, *, edge: bool) -> Motion:
        rng, road = self.rng, self.road
        against = bool(rng.random() < 0.5)
        if edge:
            offset = road.left - 3.0 if against else road.right + 3.0
        else:
            offset = rng.choice(road.lanes_against if against else road.lanes_with)
        moment = rng.uniform(0, self.duration)
        s = self.ego.travelled(moment) + rng.uniform(-0.96, 0.96) * self.reach
        s -= (-speed if against else speed) * moment
        return _on_road(float(s), float(offset + rng.normal(0.0, 0.15)), speed, against=against)

    def _on_crossing(self, speed: float, offset: float) -> Motion:
        rng, road = self.rng, self.road
        here = self.ego.travelled(rng.uniform(0, self.duration))
        near = np.flatnonzero(np.abs(road.crossings[:, 0] - here) < 45)
        if len(near) == 0:
            return self._anywhere(speed)
        centre, yaw = road.crossing(int(rng.choice(near)))
        yaw += np.pi * rng.integers(2)
        along = np.array([np.cos(yaw), np.sin(yaw)])
        distance = rng.uniform(-0.84, 0.84) * self.reach - speed * rng.uniform(0, self.duration)
        # Traffic keeps to the right of its own direction, whatever the sign asked for.
        side = -abs(offset) if speed > 0 else offset
        spot = centre + along * distance + np.array([-along[1], along[0]]) * side
        return _free(spot, yaw, speed, 0.0)

    def _anywhere(self, speed: float) -> Motion:
        """Any place around the car, any heading, perhaps turning gently."""
        rng = self.rng
        moment = rng.uniform(0, self.duration)
        ego_xy, _ = self.road.path.at(self.ego.travelled(moment))
        radius = 4.5 + (self.reach - 4.5) * rng.random() ** 0.7
        bearing = rng.uniform(-np.pi, np.pi)
        spot = ego_xy + radius * np.array([np.cos(bearing), np.sin(bearing)])
        yaw, turn = rng.uniform(-np.pi, np.pi), 0.0
        if speed > 0 and rng.random() < 0.5:
            turn = float(np.clip(rng.normal(0.0, 0.12), -0.25, 0.25))
        motion = _free(spot, yaw, speed, turn)
        # Moved so that it is at `spot` at that moment.
        there, _ = motion.at(self.road.path, moment)
        return _free(2 * spot - there[0], yaw, speed, turn)

    def _arc_length(self) -> float:
        return float(
            self.ego.travelled(self.rng.uniform(0, self.duration))
            + self.rng.uniform(-0.96, 0.96) * self.reach
        )

    def _beside(self, distance: float) -> tuple[np.ndarray, float]:
        """A spot `distance` metres outside the asphalt, and the road's heading there."""
        left = self.rng.random() < 0.5
        offset = self.road.left + distance if left else self.road.right - distance
        xy, yaw = self.road.path.at(self._arc_length(), offset)
        return xy, float(yaw)

    def _try(
        self, kind: str, shape: str, size: np.ndarray, motion: Motion, attribute: str = ""
    ) -> float:
        xy, yaw = motion.at(self.road.path, self.times)
        xy, yaw = xy[:, 0], yaw[:, 0]
        discs, radius = self._discs(size, xy, yaw)
        for other, other_radius in self.discs:
            near = discs[:, :, None] - other[:, None, :]
            if (np.square(near).sum(-1) < (radius + other_radius + 0.1) ** 2).any():
                return 0.0
        self.discs.append((discs, radius))
        self.rows.append(
            {"kind": kind, "shape": shape, "size": size, "motion": motion, "attribute": attribute}
        )
        return float((np.linalg.norm(xy - self.ego_xy, axis=1) < self.reach).mean())

    def _discs(self, size: np.ndarray, xy: np.ndarray, yaw: np.ndarray) -> tuple[np.ndarray, float]:
        """((times, _DISCS, 2) centres, radius) of discs that cover the footprint."""
        short, long = sorted(size[:2])
        angle = yaw if size[1] >= size[0] else yaw + np.pi / 2
        along = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        places = np.linspace(-0.5, 0.5, _DISCS) * max(long - short, 0.0)
        spacing = max(long - short, 0.0) / (_DISCS - 1)
        radius = float(np.hypot(short / 2, max(spacing / 2, short * 0.2)))
        return xy[:, None] + along[:, None] * places[:, None], radius
