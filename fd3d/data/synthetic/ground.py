"""The picture painted on the ground: asphalt, markings, pavements, grass, and the shadows on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from fd3d.data.synthetic.rig import LEAD_IN_SECONDS
from fd3d.data.synthetic.world import Light, Road, World

METRES = 0.1  # side of a cell of the picture
_MARGIN = 85.0
_SHADOW_METRES = 0.25
_SHADOW_REACH = 56.0


@dataclass(frozen=True, kw_only=True)
class Ground:
    """packed: (rows, columns) uint32, bytes R G B and grain; corner: (2,) metres of cell [0, 0].

    Rows run along y, columns along x of the global frame.
    """

    packed: np.ndarray
    corner: np.ndarray


def paint_ground(world: World, rng: np.random.Generator) -> Ground:
    """The ground of a scene, far enough around the driven way for every camera."""
    ego_xy, _ = world.road.path.at(
        world.ego.travelled(np.linspace(-LEAD_IN_SECONDS, world.duration, 50))
    )
    low, high = ego_xy.min(axis=0) - _MARGIN, ego_xy.max(axis=0) + _MARGIN
    shape = np.ceil((high - low) / METRES).astype(int)
    earth = np.array([(88, 108, 58), (120, 112, 92), (128, 126, 122)][rng.integers(3)])
    picture = Image.new("RGBA", tuple(shape.tolist()), _shade(rng, earth))
    draw = ImageDraw.Draw(picture)

    def polygon(xy: np.ndarray, colour: tuple[int, int, int]) -> None:
        draw.polygon([tuple(p) for p in ((xy - low) / METRES).tolist()], fill=colour)

    for _ in range(70):
        centre = rng.uniform(low, high)
        angle = np.sort(rng.uniform(0, 2 * np.pi, 6))
        radius = rng.uniform(3, 14)
        patch = centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        polygon(patch, _shade(rng, earth, spread=0.12))
    _paint_roads(world.road, polygon, rng)
    # Drawn with a fourth channel from the start, so that nothing has to be interleaved afterwards.
    pixels = np.array(picture)
    grain = _grain(rng)
    tiles = (-(-shape[1] // len(grain)), -(-shape[0] // len(grain)))
    pixels[..., 3] = np.tile(grain, tiles)[: shape[1], : shape[0]]
    return Ground(packed=pixels.view(np.uint32)[..., 0], corner=low)


def _shade(rng: np.random.Generator, colour, spread: float = 0.06) -> tuple[int, int, int]:
    return tuple(
        int(v) for v in np.clip(np.asarray(colour) * (1 + rng.normal(0, spread, 3)), 0, 255)
    )


def _grain(rng: np.random.Generator) -> np.ndarray:
    """(512, 512) uint8 brightness, coarse and fine at once."""
    total = rng.normal(0.0, 14.0, (512, 512))
    for cells in (16, 64):
        coarse = rng.normal(0.0, 14.0, (cells, cells))
        total += np.kron(coarse, np.ones((512 // cells, 512 // cells)))
    return np.clip(total + 128, 0, 255).astype(np.uint8)


def _paint_roads(road: Road, polygon, rng: np.random.Generator) -> None:
    path = road.path
    s = path.start + path.step * np.arange(0, len(path.yaw), 4)
    asphalt, pavement = _shade(rng, (78, 78, 82)), _shade(rng, (142, 136, 128))
    white = (205, 205, 198)

    def band(right: float, left: float, colour, part: np.ndarray = s) -> None:
        polygon(np.concatenate([path.at(part, right)[0], path.at(part[::-1], left)[0]]), colour)

    def street(number: int, half: float, colour) -> None:
        centre, yaw = road.crossing(number)
        along, left = np.array([np.cos(yaw), np.sin(yaw)]), np.array([-np.sin(yaw), np.cos(yaw)])
        ends = np.array([[-90, -half], [90, -half], [90, half], [-90, half]])
        polygon(centre + ends[:, :1] * along + ends[:, 1:] * left, colour)

    crossings = range(len(road.crossings))
    for number in crossings:
        street(number, road.crossing_half_width + 2.5, pavement)
    band(road.right - 3.2, road.left + 3.2, pavement)
    for number in crossings:
        street(number, road.crossing_half_width, asphalt)
    band(road.right, road.left, asphalt)
    for number in crossings:
        street(number, 0.1, _shade(rng, (190, 170, 80)))
    lines = [1.8, road.left - 2.3, road.right + 2.3]
    lines += [lane + 1.8 for lane in (*road.lanes_with[1:], *road.lanes_against[:-1])]
    dashes = np.arange(s[0], s[-1] - 4.0, 8.0)
    for offset in lines:
        if offset == lines[0] or rng.random() < 0.3:
            band(offset - 0.09, offset + 0.09, white)
        else:
            for dash in dashes:
                band(offset - 0.09, offset + 0.09, white, dash + np.linspace(0, 3.5, 4))
    for number in crossings:
        where = road.crossings[number, 0] + road.crossing_half_width + 3.0
        for offset in np.arange(road.right + 0.6, road.left - 0.6, 1.1):
            band(offset, offset + 0.5, white, np.array([where, where + 2.8]))


@dataclass(frozen=True, kw_only=True)
class Shadows:
    """lit: (n, n) uint8, 255 in the sun and 0 in the shade; corner: (2,) metres of cell [0, 0]."""

    lit: np.ndarray
    corner: np.ndarray


def cast_shadows(
    light: Light, eye: np.ndarray, bottom: np.ndarray, yaw: np.ndarray, size: np.ndarray
) -> Shadows:
    """Where boxes (n) keep the sun off the ground around `eye` (3,), as if it were level.

    The shadow of an upright box is its footprint swept along one straight line: a hexagon.
    """
    cells = int(2 * _SHADOW_REACH / _SHADOW_METRES)
    corner = eye[:2] - _SHADOW_REACH
    picture = Image.new("L", (cells, cells), 255)
    draw = ImageDraw.Draw(picture)
    near = np.abs(bottom[:, :2] - eye[:2]).max(axis=1) < _SHADOW_REACH
    bottom, yaw, size = bottom[near], yaw[near], size[near]
    reach = -light.sun_direction[:2] / light.sun_direction[2]
    sweep = reach * np.minimum(size[:, 2:], 12.0 / max(np.linalg.norm(reach), 1e-6)) / 2
    along = np.stack([np.cos(yaw), np.sin(yaw)], axis=1)
    left = np.stack([-along[:, 1], along[:, 0]], axis=1)
    sides = np.stack([along * size[:, 1:2] / 2, left * size[:, :1] / 2, sweep], axis=1)
    sides *= np.where(sides[..., 1:] < 0, -1.0, 1.0)
    order = np.argsort(np.arctan2(sides[..., 1], sides[..., 0]), axis=1)
    sides = np.take_along_axis(sides, order[..., None], axis=1)
    walk = np.cumsum(np.concatenate([sides, -sides], axis=1), axis=1) * 2
    start = bottom[:, :2] + sweep - sides.sum(axis=1)
    hexagons = (start[:, None] + walk - corner) / _SHADOW_METRES
    for hexagon in hexagons.reshape(-1, 12).tolist():
        draw.polygon(hexagon, fill=0)
    return Shadows(lit=np.asarray(picture), corner=corner)


def look_up(table: np.ndarray, corner: np.ndarray, metres: float, x, y) -> np.ndarray:
    """table[row, column] at the ground points x, y; points outside take the nearest edge cell."""
    rows, columns = table.shape
    column = ((x - np.float32(corner[0])) * np.float32(1 / metres)).astype(np.int32)
    row = ((y - np.float32(corner[1])) * np.float32(1 / metres)).astype(np.int32)
    np.clip(column, 0, columns - 1, out=column)
    np.clip(row, 0, rows - 1, out=row)
    row *= columns
    row += column
    return np.take(table.reshape(-1), row)


def shadow_at(shadows: Shadows, x, y) -> np.ndarray:
    """0 to 1 (shade to sun) float32 at the ground points x, y; sunny outside the map."""
    lit = look_up(shadows.lit, shadows.corner, _SHADOW_METRES, x, y)
    return lit.astype(np.float32) * np.float32(1 / 255)
