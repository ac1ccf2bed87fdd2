"""Depth targets, splatting cells, CBGS and submissions against stored values of the original code;
see `parity_files`."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from parity_files import files
from pyquaternion import Quaternion

from fd3d.boxes import YAW, old_yaw
from fd3d.data.batch import Detections
from fd3d.data.depth import nearest_depth
from fd3d.data.frames import CameraShot, Frame
from fd3d.data.images import ImageSpec
from fd3d.data.sampling import class_balanced
from fd3d.evaluation import frame_results
from fd3d.grid import BEVGrid
from fd3d.models import public
from fd3d.models.bevdepth.camera_aware import camera_numbers
from fd3d.models.bevdepth.losses import depth_loss
from fd3d.models.bevdepth.pooling import cells_of
from fd3d.models.bevdepth.view_transform import Cameras, frustum_points

SIZE = {"height": 256, "width": 704}


@pytest.mark.parametrize("path", files("depth target 1"))
def test_parity_of_first_generation_depth(path):
    golden = np.load(path)
    u, v, depth = golden["in/points_uvd"].T
    spec = ImageSpec(**SIZE)
    maps = nearest_depth(np.zeros(len(u), int), u, v, depth, cameras=1, spec=spec)
    (name,) = (name for name in golden.files if name.startswith("depthmap_"))
    np.testing.assert_array_equal(maps[0], golden[name])
    loss = 100 * depth_loss(
        torch.from_numpy(golden["in/depth_logits"]), torch.from_numpy(maps)[None], spec
    )
    assert loss.item() == pytest.approx(float(golden["loss_depth_weight100"]), rel=1e-5)


@pytest.mark.parametrize("path", files("depth target 2"))
def test_parity_of_second_generation_depth(path):
    golden = np.load(path)
    u, v, depth = golden["in/points_uvd"].T
    image = public.bevdet_r50_4d_depth().image
    rows, columns = (size * image.stride for size in golden["onehot_argmax_plus1_0none"].shape)
    spec = replace(image, height=rows, width=columns)
    maps = nearest_depth(np.zeros(len(u), int), u, v, depth, cameras=1, spec=spec)
    # The original draws pixels first and takes each block's nearest afterwards.
    pixels = np.full((rows, columns), np.inf)
    pixels[golden["depthmap/rows"], golden["depthmap/cols"]] = golden["depthmap/vals"]
    blocks = pixels.reshape(rows // 16, 16, columns // 16, 16).min(axis=(1, 3))
    np.testing.assert_array_equal(maps[0], np.where(np.isinf(blocks), 0, blocks))
    first, _, step = spec.depth_range
    bins = np.where(maps[0] > 0, np.floor((maps[0] - first) / step) + 1, 0)
    np.testing.assert_array_equal(bins, golden["onehot_argmax_plus1_0none"])
    logits = torch.from_numpy(golden["in/depth_logits"])
    loss = 3 * depth_loss(logits, torch.from_numpy(maps)[None], spec, "softmax-bce")
    assert loss.item() == pytest.approx(float(golden["loss_depth_weight3"]), rel=1e-5)


def cameras_from(numbers):
    """The cameras that G2's 27 numbers (1, 6, 27) describe."""
    numbers = torch.from_numpy(numbers)

    def square(columns):
        matrix = torch.eye(3).repeat(*numbers.shape[:2], 1, 1)
        for (row, column), source in columns.items():
            matrix[..., row, column] = numbers[..., source]
        return matrix

    augment = square({(0, 0): 10, (0, 1): 11, (1, 0): 12, (1, 1): 13, (2, 2): 14})
    pose = augment @ numbers[..., 15:].view(*numbers.shape[:2], 3, 4)
    shift = torch.zeros(*numbers.shape[:2], 3)
    shift[..., 0], shift[..., 1] = numbers[..., 6], numbers[..., 9]
    return Cameras(
        rots=pose[..., :3],
        trans=pose[..., 3],
        intrins=square({(0, 0): 0, (1, 1): 1, (0, 2): 2, (1, 2): 3}),
        post_rots=square({(0, 0): 4, (0, 1): 5, (1, 0): 7, (1, 1): 8}),
        post_trans=shift,
        bev_augment=augment[:, 0],
    )


@pytest.mark.parametrize("path", files("voxels 2"))
def test_parity_of_points_per_cell(path):
    golden = np.load(path)
    config = public.bevdet_r50_4d_depth()
    cameras = cameras_from(golden["mlp_input"])
    np.testing.assert_allclose(
        camera_numbers(cameras), golden["mlp_input"][0], rtol=1e-5, atol=1e-6
    )
    points = frustum_points(cameras, config.image)
    cells = cells_of(points, config.grid, config.heights)
    counts = np.bincount(cells[cells >= 0], minlength=128 * 128).reshape(128, 128)
    # A few points in a hundred thousand lie on a border, where rounding decides.
    assert abs(counts.sum() - golden["n_points_kept"]) <= 1e-4 * golden["n_points_kept"]
    moved = np.abs(counts - golden["points_per_cell_yx"]).sum()
    assert moved <= 1e-3 * golden["n_points_kept"]
    # Truncation keeps what lies less than a cell below the lower bound.
    between = (points[..., 0] > -52.0) & (points[..., 0] < -51.2) & (cells >= 0)
    assert between.sum() > 0


@pytest.mark.parametrize("path", files("depth target 1"))
def test_parity_of_the_lattice_and_the_grid(path):
    golden = np.load(path)
    spec = ImageSpec(**SIZE)
    eye = torch.eye(3).expand(1, 1, 3, 3)
    origin = torch.zeros(1, 1, 3)
    cameras = Cameras(rots=eye, trans=origin, intrins=eye, post_rots=eye, post_trans=origin)
    stored = torch.from_numpy(golden["frustum_first"])
    # With identities in every place a point is (u d, v d, d).
    expected = torch.cat([stored[..., :2] * stored[..., 2:], stored[..., 2:]], dim=-1)
    step = int(stored[1, 0, 0, 2] - stored[0, 0, 0, 2])
    torch.testing.assert_close(frustum_points(cameras, spec)[0, 0, ::step], expected)
    grid = BEVGrid.square(half_extent=51.2, cells=int(golden["nx"][0]))
    np.testing.assert_allclose(golden["dx"][:2], [grid.cell_x, grid.cell_y], rtol=1e-6)
    np.testing.assert_allclose(golden["bx"][:2], grid.cell_to_metres()[:2, 2], rtol=1e-6)


@pytest.mark.parametrize("path", files("cbgs"))
def test_parity_of_class_balanced_draws(path):
    golden = np.load(path)
    (name,) = (name for name in golden.files if name.startswith("indices_npseed"))
    seed = int(name.removeprefix("indices_npseed"))
    drawn = class_balanced(golden["presence"], rng=np.random.RandomState(seed))
    np.testing.assert_array_equal(drawn, golden[name])


def pose(values, name):
    matrix = Quaternion(values[f"{name}_rotation"]).transformation_matrix
    matrix[:3, 3] = values[f"{name}_translation"]
    return matrix


def frame_at(*, lidar2ego, ego2global):
    """A frame whose cameras saw what they saw at the lidar's time."""
    nothing = np.zeros(0)
    shot = CameraShot(
        file="",
        size=(1600, 900),
        timestamp=0,
        intrinsic=np.eye(3),
        camera2ego=np.eye(4),
        ego2global=ego2global,
    )
    return Frame(
        token="tok0",
        scene="",
        timestamp=0,
        lidar_file="",
        lidar2ego=lidar2ego,
        ego2global=ego2global,
        cameras=(shot,) * 6,
        boxes=np.zeros((0, 9)),
        labels=nothing,
        lidar_points=nothing,
        radar_points=nothing,
        visibility=nothing,
        attributes=(),
    )


def assert_same_rows(rows, expected):
    assert len(rows) == len(expected)
    order = lambda row: -row["detection_score"]  # noqa: E731
    for row, other in zip(sorted(rows, key=order), sorted(expected, key=order), strict=True):
        assert row["detection_name"] == other["detection_name"]
        assert row["attribute_name"] == other["attribute_name"]
        np.testing.assert_allclose(row["translation"], other["translation"], atol=1e-4)
        np.testing.assert_allclose(row["size"], other["size"], atol=1e-5)
        np.testing.assert_allclose(row["velocity"], other["velocity"], atol=1e-4)
        turned = Quaternion(row["rotation"]).inverse * Quaternion(other["rotation"])
        assert abs(turned.degrees) < 0.01


@pytest.mark.parametrize("path", files("submission 1"))
def test_parity_of_first_generation_submissions(path):
    golden = json.loads(path.read_text())
    given = golden["_input"]
    boxes = np.array(given["boxes_bottomcenter"])
    boxes[:, 2] += boxes[:, 5] / 2
    boxes[:, YAW] = old_yaw(boxes[:, YAW])
    info = given["info"]
    if given["speed_mode"] == "abs_dis":
        # The network predicts displacements over the time to the adjacent frame.
        adjacent = info["prev"][min(given["max_interval"] // 2, len(info["prev"]) - 1)]
        boxes[:, 7:9] /= abs(info["timestamp"] - adjacent["timestamp"]) * 1e-6
    found = Detections(
        boxes=torch.from_numpy(boxes),
        scores=torch.tensor(given["scores"], dtype=torch.float64),
        labels=torch.tensor(given["labels"]),
    )
    frame = frame_at(lidar2ego=pose(info, "lidar2ego"), ego2global=pose(info, "ego2global"))
    (expected,) = golden["results"].values()
    assert_same_rows(frame_results(frame, found), expected)


@pytest.mark.parametrize("path", files("submission 2"))
def test_parity_of_second_generation_submissions(path):
    golden = json.loads(path.read_text())
    given = golden["_input"]
    boxes = np.array(given["boxes_bottomcenter"])[:, [0, 1, 2, 4, 3, 5, 6, 7, 8]]
    boxes[:, 2] += boxes[:, 5] / 2
    found = Detections(
        boxes=torch.from_numpy(boxes),
        scores=torch.tensor(given["scores"], dtype=torch.float64),
        labels=torch.tensor(given["labels"]),
        frame="ego",
    )
    frame = frame_at(lidar2ego=np.eye(4), ego2global=pose(given["ego2global"], "ego2global"))
    rows = frame_results(frame, found)
    (expected,) = golden["results"].values()
    # The original writes the bottom's height where nuScenes wants the centre's; ours does not.
    for row in rows:
        row["translation"][2] -= row["size"][2] / 2
    assert_same_rows(rows, expected)
