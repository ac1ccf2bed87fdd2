import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fd3d.augment import BEVAugmentation
from fd3d.data.depth import depth_maps, load_points, nearest_depth
from fd3d.data.images import ImageSpec, View, view_matrix
from fd3d.errors import UsageError

SPEC = ImageSpec(height=64, width=176)
# Camera axes (right, down, forward) in the LIDAR frame (right, forward, up).
FORWARD = np.array([[1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]])
INTRINSIC = np.array([[200.0, 0, 176], [0, 200.0, 99], [0, 0, 1.0]])
VIEW = View(resize=0.5, resized=(176, 99), left=0, top=35)


def _rig() -> dict[str, np.ndarray]:
    turned = np.array([[0, -1.0, 0], [1.0, 0, 0], [0, 0, 1.0]]) @ FORWARD
    matrix, vector = view_matrix(SPEC, VIEW)
    return {
        "rots": np.stack([FORWARD, turned]),
        "trans": np.array([[0.1, 0.5, -0.3], [-0.5, 0.0, -0.3]]),
        "intrins": np.stack([INTRINSIC] * 2),
        "post_rots": np.stack([matrix] * 2),
        "post_trans": np.stack([vector] * 2),
    }


def _cloud(seed: int, count: int = 3000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, 3)) * [25, 25, 2]).astype(np.float32)


def test_a_point_lands_in_its_cell_at_its_distance_along_the_axis():
    rig = _rig()
    point = rig["trans"][0] + [2.0, 20.0, 1.0]
    maps = depth_maps(point[None].astype(np.float32), spec=SPEC, **rig)
    # u = 176 + 200 * 2 / 20 = 196, v = 99 - 200 / 20 = 89 in the picture; halved, 35 rows cut.
    row, column = round((89 / 2 - 35) / 16), round(196 / 2 / 16)
    assert maps.shape == (2, 4, 11) and maps.dtype == np.float32
    assert maps[0, row, column] == pytest.approx(20.0)
    assert np.count_nonzero(maps) == 1


@given(st.integers(0, 1000))
def test_maps_equal_a_plain_loop_over_the_points(seed):
    rig = _rig()
    points = _cloud(seed, 400)
    expected = np.full((2, 4, 11), np.inf)
    for camera in range(2):
        for point in points.astype(np.float64):
            seen = INTRINSIC @ rig["rots"][camera].T @ (point - rig["trans"][camera])
            depth = seen[2]
            if not 1 <= depth < 60:
                continue
            pixel = rig["post_rots"][camera] @ [*seen[:2] / depth, 0] + rig["post_trans"][camera]
            column, row = np.rint(pixel[:2] / 16).astype(int)
            if 0 <= column < 11 and 0 <= row < 4:
                expected[camera, row, column] = min(expected[camera, row, column], depth)
    expected[np.isinf(expected)] = 0
    maps = depth_maps(points, spec=SPEC, **rig)
    # A point within rounding of a cell border may fall on either side.
    close = np.isclose(maps, expected, rtol=1e-4)
    assert close.mean() > 0.95


@given(
    st.integers(0, 1000),
    st.builds(
        BEVAugmentation,
        rotate=st.floats(-0.4, 0.4),
        scale=st.floats(0.9, 1.1),
        flip_x=st.booleans(),
        flip_y=st.booleans(),
    ),
)
def test_moving_points_and_cameras_alike_leaves_the_maps_as_they_are(seed, augmentation):
    rig = _rig()
    points = _cloud(seed, 1000)
    linear = augmentation.matrix()[:3, :3]
    moved = dict(rig, rots=linear @ rig["rots"], trans=rig["trans"] @ linear.T)
    before = depth_maps(points, spec=SPEC, **rig)
    after = depth_maps((points @ linear.T).astype(np.float32), spec=SPEC, **moved)
    assert np.isclose(before, after, rtol=1e-4).mean() > 0.97


def test_depths_outside_of_the_range_are_left_out():
    depth = np.array([0.5, 1.0, 59.9, 60.0])
    u = np.array([0.0, 16.0, 32.0, 48.0])
    zeros = np.zeros(4)
    maps = nearest_depth(zeros.astype(int), u, zeros, depth, cameras=1, spec=SPEC)
    np.testing.assert_allclose(maps[0, 0, :4], [0, 1.0, 59.9, 0], rtol=1e-6)


def test_lidar_files_that_cannot_be_used_are_named(tmp_path):
    for name, length in (("missing", None), ("empty", 0), ("short", 28), ("torn", 1999)):
        path = tmp_path / f"{name}.bin"
        if length is not None:
            path.write_bytes(bytes(length))
        with pytest.raises(UsageError, match=path.name):
            load_points(path)
    (tmp_path / "whole.bin").write_bytes(bytes(2000))
    assert load_points(tmp_path / "whole.bin").shape == (100, 3)
