"""Augmentation, depth targets, CBGS and submissions against stored values of the original code; see
`parity_files`."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from parity_files import files
from pyquaternion import Quaternion

from fd3d.augment import BEVAugmentation, draw_bev, move_boxes
from fd3d.boxes import YAW, old_yaw, wrap_angle
from fd3d.data.batch import Detections
from fd3d.data.depth import nearest_depth
from fd3d.data.frames import CameraShot, Frame
from fd3d.data.images import (
    ImageSpec,
    View,
    apply_view,
    draw_view,
    normalise,
    view_for_test,
    view_matrix,
)
from fd3d.data.sampling import class_balanced
from fd3d.evaluation import frame_results
from fd3d.grid import BEVGrid
from fd3d.models import public
from fd3d.models.bevdepth.camera_aware import camera_numbers
from fd3d.models.bevdepth.losses import depth_loss
from fd3d.models.bevdepth.pooling import cells_of
from fd3d.models.bevdepth.view_transform import Cameras, frustum_points

SIZE = {"height": 256, "width": 704}
# The stored runs were on nuScenes' own pictures.
STORED = (1600, 900)


class Replay:
    """The original's global generator, asked as ours is.

    The original draws a second number, whose range is empty, between resize and crop.
    """

    def __init__(self, seed):
        self.state = np.random.RandomState(seed)
        self.asked = 0

    def uniform(self, low=0.0, high=1.0):
        self.asked += 1
        value = self.state.uniform(low, high)
        if self.asked == 1:
            self.state.uniform()
        return value

    def integers(self, end):
        return self.state.choice(list(range(end)))


@pytest.mark.parametrize("path", files("augmentation 1", "augmentation 2"))
def test_parity_of_picture_views(path):
    golden = np.load(path)
    first = "img/post_rot2" in golden.files
    spec = ImageSpec(**SIZE, resize_test=0.04 if first else 0.0)
    prefix = "img/" if first else ""
    rows = golden[f"{prefix}params_seed_istrain_resize_rw_rh_crop4_flip_rotdeg"]
    rotations, shifts = golden[f"{prefix}post_rot2"], golden[f"{prefix}post_tran2"]
    for row, rotation, shift in zip(rows, rotations, shifts, strict=True):
        seed, trains, resize, width, height, left, top, _, _, flip, degrees = row
        view = draw_view(spec, STORED, Replay(int(seed))) if trains else view_for_test(spec, STORED)
        assert view.resized == (width, height) and (view.left, view.top) == (left, top)
        assert view.resize == pytest.approx(resize, abs=1e-12)
        assert view.flip == flip and view.rotate_degrees == pytest.approx(degrees, abs=1e-9)
        matrix, vector = view_matrix(spec, view)
        np.testing.assert_allclose(matrix[:2, :2], rotation, atol=1e-6)
        np.testing.assert_allclose(vector[:2], shift, atol=1e-4)


@pytest.mark.parametrize("path", files("augmentation 2"))
def test_parity_of_pixels(path):
    from PIL import Image

    golden = np.load(path)
    (name,) = (name for name in golden.files if name.startswith("pix/out_dims"))
    numbers = re.fullmatch(r"pix/out_dims(\d+)x(\d+)_crop(\d+)_(\d+)_\d+_\d+_flip_rot(\d+)", name)
    width, height, left, top, degrees = (int(number) for number in numbers.groups())
    rows, columns, _ = golden[name].shape
    spec = ImageSpec(height=rows, width=columns)
    view = View(
        resize=1.0,
        resized=(width, height),
        left=left,
        top=top,
        flip=True,
        rotate_degrees=float(degrees),
    )
    pixels = apply_view(Image.fromarray(golden["pix/in"]), spec, view)
    difference = np.abs(pixels.astype(int) - golden[name].astype(int))
    # The stored picture is noise, where resizing only what the crop keeps shows most.
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.02 and (difference > 1).mean() < 1e-3
    # Every eighth row and column of the picture, with blue first.
    prepared = normalise(golden[name], public.bevdet_r50().image)[:, ::8, ::8]
    np.testing.assert_allclose(prepared, golden["pix/normalized_fp32_chw_sub"], atol=1e-5)


@pytest.mark.parametrize("path", files("augmentation 1"))
def test_parity_of_first_generation_bev_augmentation(path):
    golden = np.load(path)
    cases = sorted({name.split("/")[0] for name in golden.files if name.endswith("/rot_T")})
    for case in cases:
        turn = golden[f"{case}/rot_T"]
        flip_y, flip_x = golden[f"{case}/hflip_vflip"]
        augmentation = BEVAugmentation(
            rotate=float(np.arctan2(turn[1, 0], turn[0, 0])),
            scale=float(golden[f"{case}/scale"]),
            flip_y=bool(flip_y),
            flip_x=bool(flip_x),
        )
        linear = augmentation.matrix()[:3, :3]
        for name, tolerance in (("points", 2e-5), ("trans", 2e-6)):
            moved = golden[f"in/{name}"] @ linear.T
            np.testing.assert_allclose(moved, golden[f"{case}/{name}"], atol=tolerance)
        np.testing.assert_allclose(linear @ golden["in/rots"], golden[f"{case}/rots"], atol=2e-6)
        boxes = golden["in/boxes_gravity_center"].astype(np.float64)
        boxes[:, YAW] = old_yaw(boxes[:, YAW])
        moved = move_boxes(boxes, augmentation)
        expected = golden[f"{case}/boxes"].astype(np.float64)
        # The original keeps the bottom centre.
        moved[:, 2] -= moved[:, 5] / 2
        turned = wrap_angle(old_yaw(moved[:, YAW]) - expected[:, YAW])
        np.testing.assert_allclose(turned, 0, atol=1e-5)
        rest = [column for column in range(9) if column != YAW]
        np.testing.assert_allclose(moved[:, rest], expected[:, rest], atol=5e-5)


def second_augmentation(degrees, scale, flip_x, flip_y):
    """An augmentation in G2's terms: degrees counter-clockwise."""
    return BEVAugmentation(
        rotate=-math.radians(degrees), scale=scale, flip_x=bool(flip_x), flip_y=bool(flip_y)
    )


@pytest.mark.parametrize("path", files("augmentation 2"))
def test_parity_of_second_generation_bev_augmentation(path):
    golden = np.load(path)
    # The original's columns are l w h with the bottom as z; ours w l h and the centre.
    boxes = golden["bda/in_boxes"].astype(np.float64)[:, [0, 1, 2, 4, 3, 5, 6, 7, 8]]
    rows = golden["bda/params_rotdeg_scale_flipdx_flipdy"]
    for row, matrix, stored in zip(
        rows, golden["bda/out_mat"], golden["bda/out_boxes"], strict=True
    ):
        augmentation = second_augmentation(*row)
        np.testing.assert_allclose(augmentation.matrix()[:3, :3], matrix, atol=1e-6)
        moved = move_boxes(boxes, augmentation)
        expected = stored[:, [0, 1, 2, 4, 3, 5, 6, 7, 8]]
        np.testing.assert_allclose(wrap_angle(moved[:, YAW] - expected[:, YAW]), 0, atol=1e-5)
        rest = [column for column in range(9) if column != YAW]
        np.testing.assert_allclose(moved[:, rest], expected[:, rest], atol=5e-5)
    for seed, row in enumerate(golden["bda/sample_seed0to7"]):
        rng = np.random.RandomState(seed)
        drawn = draw_bev(rng, rotate=math.radians(22.5))
        # The order of the two flips differs, and the sign of the rotation: neither shows in use.
        flips = bool(row[2]), bool(row[3])
        assert math.degrees(drawn.rotate) == pytest.approx(row[0], abs=1e-9)
        assert drawn.scale == pytest.approx(row[1], abs=1e-12)
        assert (drawn.flip_y, drawn.flip_x) == flips


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
