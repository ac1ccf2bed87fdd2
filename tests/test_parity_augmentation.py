"""Picture views, pixels and BEV augmentation against stored values of the original code; see
`parity_files`."""

import math
import re

import numpy as np
import pytest
from parity_files import files

from fd3d.augment import BEVAugmentation, draw_bev, move_boxes
from fd3d.boxes import YAW, old_yaw, wrap_angle
from fd3d.data.images import (
    ImageSpec,
    View,
    apply_view,
    draw_view,
    normalise,
    view_for_test,
    view_matrix,
)
from fd3d.models import public

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
