"""One camera image of a world: ground, things, light, air and noise.

Images are worked on as three planes (3, H, W) in float32. All depths are along the optical axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from fd3d.data.synthetic import shapes
from fd3d.data.synthetic.ground import (
    METRES,
    Ground,
    cast_shadows,
    look_up,
    paint_ground,
    shadow_at,
)
from fd3d.data.synthetic.parts import Parts, build_parts, pose_parts
from fd3d.data.synthetic.raster import FAR, Faces, Fragments, rasterise, visible_faces
from fd3d.data.synthetic.terrain import first_hit, refine
from fd3d.data.synthetic.world import Light, World

_COARSE = 8  # pixels between the rays that are marched; the others start from their result
_GLOW = 0.85  # lamps are at least this bright, at night as well


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A world with what drawing it needs: its boxes, the picture on the ground, a tile of noise."""

    world: World
    parts: Parts
    ground: Ground
    noise: np.ndarray  # flat float32, unit variance


def set_stage(world: World, rng: np.random.Generator) -> Stage:
    """What all images of one scene share."""
    return Stage(
        world=world,
        parts=build_parts(world.actors),
        ground=paint_ground(world, rng),
        noise=rng.standard_normal(1 << 19, dtype=np.float32),
    )


@dataclass(frozen=True, kw_only=True)
class View:
    """A pinhole camera at one moment.

    pose: (4, 4) camera to global; intrinsic: (3, 3) pixels of this image size; time: seconds.
    """

    pose: np.ndarray
    intrinsic: np.ndarray
    width: int
    height: int
    time: float

    def rays(self) -> np.ndarray:
        """(3, 3): homogeneous pixels (u, v, 1) to global rays of depth 1."""
        return self.pose[:3, :3] @ np.linalg.inv(self.intrinsic)


def render(
    stage: Stage, view: View, rng: np.random.Generator, *, count: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """The image (H, W, 3) uint8 RGB; with `count` also (actors, 2) visible and coverable pixels."""
    world, light = stage.world, stage.world.light
    bottom, yaw = world.placed(view.time)
    planes, nearest = _draw_ground(stage, view, bottom, yaw)
    chosen = _in_sight(stage.parts, world, view, bottom)
    posed = pose_parts(stage.parts, chosen, bottom, yaw, view.pose[:3, 3], view.rays())
    faces = visible_faces(stage.parts, posed)
    owner = stage.parts.actor[faces.part] if count else None
    fragments, counts = rasterise(faces, nearest, owner, len(world.actors))
    _draw_fragments(stage, planes, faces, fragments)
    return _develop(planes, nearest, light, stage.noise, rng), counts


def _in_sight(parts: Parts, world: World, view: View, bottom: np.ndarray) -> np.ndarray:
    """Rows of `parts` whose actor may be in the picture."""
    size = world.actors.size
    middle = bottom + np.array([0.0, 0.0, 0.5]) * size[:, [2]]
    local = (middle - view.pose[:3, 3]) @ view.pose[:3, :3]
    radius = np.linalg.norm(size, axis=1) / 2
    depth = local[:, 2] + radius
    wide = max(view.intrinsic[0, 2], view.width - view.intrinsic[0, 2]) / view.intrinsic[0, 0]
    inside = (depth > 0.3) & (local[:, 2] < FAR)
    inside &= np.abs(local[:, 0]) < wide * np.maximum(depth, 0) + radius * 1.5
    return np.flatnonzero(inside[parts.actor])


def _draw_ground(stage: Stage, view: View, bottom: np.ndarray, yaw: np.ndarray):
    """Planes (3, H, W) with sky and ground, and 1 / depth (H, W), 0 for the sky."""
    world, light, terrain = stage.world, stage.world.light, stage.world.terrain
    height, width, origin = view.height, view.width, view.pose[:3, 3]
    rays = view.rays()
    planes = _sky(light, rays, height, width)
    nearest = np.zeros((height, width), dtype=np.float32)

    # March a coarse grid of rays. Where they miss, go on with the plane through the camera's foot,
    # so that 1 / depth stays smooth across the horizon.
    across = np.arange(_COARSE / 2, width + _COARSE / 2, _COARSE)
    down = np.arange(_COARSE / 2, height + _COARSE / 2, _COARSE)
    pixels = np.stack([*np.meshgrid(across, down), np.ones((len(down), len(across)))], axis=-1)
    coarse = (pixels @ rays.T).reshape(-1, 3)
    t = first_hit(terrain, origin, coarse, near=0.8, far=FAR).reshape(pixels.shape[:2])
    above = origin[2] - terrain.height(origin[:2])
    level = (-coarse[:, 2] / above).reshape(t.shape)
    guess = np.where(np.isfinite(t), 1 / t, np.minimum(level, 1 / FAR)).astype(np.float32)
    rows_hit = np.flatnonzero(np.isfinite(t).any(axis=1))
    if len(rows_hit) == 0:
        return planes, nearest
    top = max(0, (int(rows_hit[0]) - 1) * _COARSE)
    box = (0, 0, width / _COARSE, height / _COARSE)
    guess = Image.fromarray(guess).resize((width, height), Image.Resampling.BILINEAR, box=box)
    guess = np.asarray(guess)[top:]

    u = np.arange(width, dtype=np.float32) + np.float32(0.5)
    v = np.arange(top, height, dtype=np.float32) + np.float32(0.5)
    m = rays.astype(np.float32)
    directions = tuple(m[i, 0] * u + (m[i, 1] * v + m[i, 2])[:, None] for i in range(3))
    start = 1 / np.maximum(guess, np.float32(1 / FAR))
    t, miss = refine(terrain, origin, directions, start)
    solid = (miss < 0.05) & (t > 0.3) & (t < FAR)
    lost = np.flatnonzero(~solid & (guess > 1 / FAR))
    if len(lost):
        again = np.stack([direction.reshape(-1)[lost] for direction in directions], axis=1)
        t.reshape(-1)[lost] = first_hit(terrain, origin, again, near=0.8, far=FAR)
        solid.reshape(-1)[lost] = t.reshape(-1)[lost] < FAR
    t = np.where(solid, t, np.float32(FAR))
    nearest[top:] = np.where(solid, 1 / t, np.float32(0))
    x = np.float32(origin[0]) + t * directions[0]
    y = np.float32(origin[1]) + t * directions[1]
    texel = look_up(stage.ground.packed, stage.ground.corner, METRES, x, y)
    shadows = cast_shadows(light, origin, bottom, yaw, world.actors.size)
    sunny = 1 - np.float32(light.shadow) * (1 - shadow_at(shadows, x, y))
    grain = (texel >> 24).astype(np.float32) * np.float32(0.4 / 128) + np.float32(0.6)
    sun = light.sun * light.sun_direction[2]
    for channel in range(3):
        colour = ((texel >> (8 * channel)) & 255).astype(np.float32)
        lit = np.float32(light.ambient[channel]) + np.float32(sun[channel]) * sunny
        planes[channel, top:] = np.where(solid, colour * grain * lit, planes[channel, top:])
    return planes, nearest


def _sky(light: Light, rays: np.ndarray, height: int, width: int) -> np.ndarray:
    v = np.arange(height) + 0.5
    middle = rays @ np.stack([np.full(height, width / 2), v, np.ones(height)])
    elevation = middle[2] / np.linalg.norm(middle, axis=0)
    blend = np.clip(elevation / 0.4, 0, 1) ** 0.7
    colour = light.haze[:, None] + (light.zenith - light.haze)[:, None] * blend
    return np.repeat(colour.astype(np.float32)[..., None], width, axis=2)


def _draw_fragments(stage: Stage, planes: np.ndarray, faces: Faces, found: Fragments) -> None:
    """Paint the visible fragments: paint code from the atlas, colour from the actor's palette."""
    light, actors, parts = stage.world.light, stage.world.actors, stage.parts
    texels = shapes.TEXELS
    across = (faces.across * (texels / 2)).astype(np.float32)
    up = (faces.up * (texels / 2)).astype(np.float32)
    depth = 1 / found.inverse_depth
    face = found.face

    def texel_index(linear: np.ndarray) -> np.ndarray:
        a, b, c = linear[face].T
        place = (a * found.u + b * found.v + c) * depth + np.float32(texels / 2)
        return np.clip(place.astype(np.int32), 0, texels - 1)

    first = ((parts.picture[faces.part] * 6 + faces.side) * texels * texels).astype(np.int32)
    index = first[face] + texel_index(up) * texels + texel_index(across)
    code = np.take(shapes.atlas().codes, index)
    slot = parts.actor[faces.part][face] * shapes.CODES + code
    facing = np.maximum(faces.normal @ light.sun_direction, 0.0)
    # Faces turned up get the whole sky, upright ones half of it and some light from the ground.
    sky = 0.8 + 0.2 * faces.normal[:, 2]
    glowing = np.isin(code, shapes.EMITTING)
    for channel in range(3):
        lit = (light.ambient[channel] * sky + light.sun[channel] * facing).astype(np.float32)
        shade = lit[face]
        shade[glowing] = np.maximum(shade[glowing], np.float32(_GLOW))
        paint = actors.palette[:, :, channel].reshape(-1).astype(np.float32)
        planes[channel].reshape(-1)[found.pixel] = paint[slot] * shade


def _develop(
    planes: np.ndarray, nearest: np.ndarray, light: Light, noise: np.ndarray, rng
) -> np.ndarray:
    """Haze, rain, pixel noise, and rounding to uint8 (H, W, 3)."""
    height, width = nearest.shape
    solid = nearest > 0
    reach = np.divide(np.float32(-light.haze_per_metre), nearest, where=solid)
    clear = np.exp(np.where(solid, reach, np.float32(0)))
    image = np.empty((height, width, 3), dtype=np.uint8)
    streaks = _streaks(light, height, width, rng)
    starts = rng.integers(0, len(noise) // 2, 3)
    for channel, plane in enumerate(planes):
        haze = np.float32(light.haze[channel])
        plane = haze + (plane - haze) * clear
        flat = plane.reshape(-1)
        flat[streaks] = flat[streaks] * np.float32(0.7) + np.float32(60)
        part = noise[starts[channel] :][: flat.size]
        grain = part if len(part) == flat.size else np.resize(part, flat.size)
        flat += grain * np.float32(light.noise)
        image[..., channel] = np.clip(plane, 0, 255)
    return image


def _streaks(light: Light, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Flat pixel numbers of the falling rain in this image."""
    number = int(light.drops * height * width / 1e6)
    length = max(3, height // 30)
    row = rng.integers(0, height - length, number)
    column = rng.integers(0, width, number)
    return (((row[:, None] + np.arange(length)) * width) + column[:, None]).reshape(-1)
