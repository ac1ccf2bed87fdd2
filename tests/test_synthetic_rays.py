"""The ray casters of the synthetic images: against brute force, and what hills do to depth."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fd3d.data.synthetic.parts import Parts, pose_parts
from fd3d.data.synthetic.placement import draw_world
from fd3d.data.synthetic.raster import rasterise, visible_faces
from fd3d.data.synthetic.terrain import draw_terrain, first_hit


def test_depth_is_not_a_function_of_the_image_row():
    down = np.array([[np.cos(0.05), 0.0, -np.sin(0.05)]])
    depths = []
    for seed in range(12):
        world = draw_world(np.random.default_rng(seed), duration=3.0)
        for moment in (0.0, 3.0):
            pose = world.ego_pose(moment)
            origin = pose[:3, 3] + pose[:3, :3] @ [1.7, 0.0, 1.5]
            depths.extend(first_hit(world.terrain, origin, down @ pose[:3, :3].T, near=1, far=150))
    depths = np.array(depths)
    # On level ground and a stiff car each would be 30 m.
    assert np.std(depths[np.isfinite(depths)]) > 3.0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_rays_meet_the_ground_where_it_is_and_nowhere_before(seed):
    rng = np.random.default_rng(seed)
    terrain = draw_terrain(rng)
    xy = rng.uniform(-500, 500, 2)
    origin = np.array([*xy, terrain.height(xy) + rng.uniform(1.0, 3.0)])
    rays = rng.normal(size=(200, 3)) * [1.0, 1.0, 0.15]
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    t = first_hit(terrain, origin, rays, near=0.5, far=100.0)
    hit = np.isfinite(t)
    points = origin + rays[hit] * t[hit, None]
    missed = np.abs(terrain.height(points[:, :2]) - points[:, 2])
    # A ray that grazes a crest may keep the interpolated place, centimetres off the ground.
    assert np.median(missed) < 0.01 and missed.max() < 0.3
    before = origin + rays * (np.minimum(t, 100.0)[:, None] * 0.7)
    assert (before[:, 2] > terrain.height(before[:, :2]) - 0.1).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_rasteriser_agrees_with_casting_every_ray_at_every_box(seed):
    rng = np.random.default_rng(seed)
    number, height, width = 4, 36, 64
    parts = Parts(
        actor=np.arange(number),
        picture=np.zeros(number, dtype=np.int64),
        centre=rng.uniform(-0.5, 0.5, (number, 3)),
        half=rng.uniform(0.2, 2.0, (number, 3)),
    )
    bottom = np.stack(
        [rng.uniform(4, 20, number), rng.uniform(-6, 6, number), rng.uniform(-2, 2, number)], axis=1
    )
    yaw = rng.uniform(-np.pi, np.pi, number)
    camera = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    intrinsic = np.array([[50.0, 0.0, width / 2], [0.0, 50.0, height / 2], [0.0, 0.0, 1.0]])
    to_global = camera @ np.linalg.inv(intrinsic)
    posed = pose_parts(parts, np.arange(number), bottom, yaw, np.zeros(3), to_global)
    faces = visible_faces(parts, posed)
    nearest = np.zeros((height, width), dtype=np.float32)
    _, counts = rasterise(faces, nearest, faces.part, number)

    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    rays = np.stack([u, v, np.ones_like(u)], axis=-1) @ to_global.T
    expected = np.full((number, height, width), np.inf)
    for i in range(number):
        cos, sin = np.cos(yaw[i]), np.sin(yaw[i])
        to_box = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        eye, along = to_box @ -bottom[i] - parts.centre[i], rays @ to_box.T
        one, two = (parts.half[i] - eye) / along, (-parts.half[i] - eye) / along
        enter, leave = np.minimum(one, two).max(-1), np.maximum(one, two).min(-1)
        if (np.abs(eye) < parts.half[i] + 0.05).all():
            return  # the camera is inside a box
        expected[i] = np.where((enter < leave) & (enter > 0), enter, np.inf)
    first = expected.min(axis=0)
    same = np.abs(nearest - np.where(np.isfinite(first), 1 / first, 0)) < 1e-3
    assert (~same).sum() <= 4  # pixels whose centre lies on an edge, to rounding
    np.testing.assert_allclose(counts[:, 1], np.isfinite(expected).sum(axis=(1, 2)), atol=4)
