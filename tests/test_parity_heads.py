"""Targets, losses and decoding against stored values of the original code; see `parity_files`."""

import numpy as np
import pytest
import torch
from parity_files import drawn_heads, files

from fd3d.boxes import old_yaw
from fd3d.grid import BEVGrid
from fd3d.models import presets
from fd3d.models.bevdepth.config import LossConfig
from fd3d.models.bevdepth.decode import candidates, decode
from fd3d.models.bevdepth.losses import head_losses
from fd3d.models.bevdepth.targets import make_targets

CONFIG = presets.bevdepth_r50l()
# Of velocities, by the network whose loss it was.
CODE_WEIGHTS = {"bevdepth4d-r50": 1.0, "bevdepth-r50": 0.2}


@pytest.fixture(params=files("head 1"))
def case(request):
    """The stored file, its grid, and the head maps it was made from."""
    golden = np.load(request.param)
    cells = golden["t0/heatmap"].shape[-1]
    return golden, BEVGrid.square(half_extent=51.2, cells=cells), drawn_heads(golden)


def golden_targets(golden, grid):
    boxes = torch.from_numpy(golden["in/gt_boxes_gravity_center"]).clone()
    boxes[:, 6] = old_yaw(boxes[:, 6])
    # The stored velocities are displacements already.
    return make_targets(
        boxes=[boxes],
        labels=[torch.from_numpy(golden["in/gt_labels"])],
        dt=torch.ones(1),
        grid=grid,
        tasks=CONFIG.tasks,
    )


def test_parity_of_targets(case):
    golden, grid, _ = case
    for task, target in enumerate(golden_targets(golden, grid)):
        used = golden[f"t{task}/mask"] > 0
        np.testing.assert_allclose(target.heatmap, golden[f"t{task}/heatmap"], atol=1e-6)
        np.testing.assert_array_equal(target.cell, golden[f"t{task}/ind"][used])
        np.testing.assert_allclose(target.codes, golden[f"t{task}/anno_box"][used], atol=2e-5)


def test_parity_of_losses(case):
    golden, grid, tasks = case
    targets = golden_targets(golden, grid)
    stored = [key for key in golden.files if key.startswith("loss")]
    for key in stored:
        variant, name = key.removeprefix("loss_v1-").split("/")
        code = (1.0,) * 8 + (CODE_WEIGHTS[variant],) * 2
        terms = head_losses(tasks, targets, LossConfig(code=code))
        found = terms[name.replace(".loss_", ".")].item()
        assert found == pytest.approx(float(golden[key]), rel=2e-5), key
    assert len(stored) % len(terms) == 0 and len(terms) == 6 * len(tasks)


def old_boxes(boxes, *, bottom):
    """Rows of ours as the original's: old yaw, and z at the bottom where asked."""
    boxes = boxes.clone()
    boxes[:, 6] = old_yaw(boxes[:, 6])
    if bottom:
        boxes[:, 2] -= boxes[:, 5] / 2
    return boxes.numpy()


def assert_same_boxes(found, stored):
    difference = np.abs(found - stored)
    difference[:, 6] = np.abs(np.angle(np.exp(1j * (found[:, 6] - stored[:, 6]))))
    assert difference.max() < 1e-4


def test_parity_of_candidates(case):
    golden, grid, tasks = case
    for task, maps in enumerate(tasks):
        boxes, scores, classes = (item[0] for item in candidates(maps, grid=grid, count=500))
        good = (scores > 0.1) & (boxes[:, :3].abs() <= torch.tensor([61.2, 61.2, 10])).all(dim=1)
        stored = {name: golden[f"decode/t{task}/{name}"] for name in ("bboxes", "scores", "labels")}
        np.testing.assert_allclose(scores[good], stored["scores"], atol=1e-6)
        np.testing.assert_array_equal(classes[good], stored["labels"])
        assert_same_boxes(old_boxes(boxes[good], bottom=False), stored["bboxes"])


def test_parity_of_suppression(case):
    golden, grid, tasks = case
    (found,) = decode(tasks, torch.ones(1), grid=grid, config=CONFIG.decode)
    np.testing.assert_allclose(found.scores, golden["final/scores"], atol=1e-6)
    np.testing.assert_array_equal(found.labels, golden["final/labels"])
    assert_same_boxes(old_boxes(found.boxes, bottom=True), golden["final/boxes_bottomcenter"])
