"""Targets, losses and decoding against stored values of the original code; see `parity_files`."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from parity_files import drawn_heads, files, ours

from fd3d.boxes import wrap_angle
from fd3d.grid import BEVGrid
from fd3d.models import public
from fd3d.models.bevdepth.decode import candidates, decode
from fd3d.models.bevdepth.losses import head_losses
from fd3d.models.bevdepth.targets import make_targets
from fd3d.models.presets import bevdepth_r50l


def config_of(golden):
    """The network whose head a file is of: its generation shows in the names of the losses, and the
    number of tasks in G2's."""
    if any(name.startswith("loss_v1") for name in golden.files):
        return bevdepth_r50l()
    six = "t1/heatmap" in golden.files
    return public.bevdet4d_r50_depth() if six else public.bevdet_r50_4d_depth()


@pytest.fixture(params=files("head 1", "head 2"))
def case(request):
    """The stored file, its network's config on the file's grid, and the head maps behind it."""
    golden = np.load(request.param)
    config = config_of(golden)
    cells = golden["t0/heatmap"].shape[-1]
    grid = BEVGrid.square(half_extent=51.2, cells=cells, frame=config.grid.frame)
    return golden, replace(config, grid=grid), drawn_heads(golden)


def golden_targets(golden, config):
    return make_targets(
        boxes=[ours(golden["in/gt_boxes_gravity_center"], config.convention, bottom=False)],
        labels=[torch.from_numpy(golden["in/gt_labels"])],
        # The stored velocities are what the head predicts already.
        dt=torch.ones(1),
        grid=config.grid,
        tasks=config.tasks,
        convention=config.convention,
    )


def test_parity_of_targets(case):
    golden, config, _ = case
    for task, target in enumerate(golden_targets(golden, config)):
        used = golden[f"t{task}/mask"] > 0
        np.testing.assert_allclose(target.heatmap, golden[f"t{task}/heatmap"], atol=1e-6)
        np.testing.assert_array_equal(target.cell, golden[f"t{task}/ind"][used])
        np.testing.assert_allclose(target.codes, golden[f"t{task}/anno_box"][used], atol=2e-5)


def test_parity_of_losses(case):
    golden, config, tasks = case
    targets = golden_targets(golden, config)
    losses = {"loss": config.loss, "loss_v1-bevdepth4d-r50": config.loss}
    losses["loss_v1-bevdepth-r50"] = public.bevdepth_r50l_single().loss
    stored = [name for name in golden.files if name.startswith("loss")]
    for key in stored:
        variant, name = key.split("/")
        terms = head_losses(tasks, targets, losses[variant])
        found = terms[name.replace(".loss_", ".")].item()
        assert found == pytest.approx(float(golden[key]), rel=2e-5), key
    assert len(stored) % len(terms) == 0 and len(terms) == 6 * len(tasks)


def assert_same_boxes(found, stored):
    difference = (found - stored).abs()
    difference[:, 6] = wrap_angle(found[:, 6] - stored[:, 6]).abs()
    assert difference.max() < 1e-4


def test_parity_of_candidates(case):
    golden, config, tasks = case
    for task, maps in enumerate(tasks):
        boxes, scores, classes = (
            item[0]
            for item in candidates(maps, grid=config.grid, count=500, convention=config.convention)
        )
        good = (scores > 0.1) & (boxes[:, :3].abs() <= torch.tensor([61.2, 61.2, 10])).all(dim=1)
        stored = {name: golden[f"decode/t{task}/{name}"] for name in ("bboxes", "scores", "labels")}
        np.testing.assert_allclose(scores[good], stored["scores"], atol=1e-6)
        np.testing.assert_array_equal(classes[good], stored["labels"])
        expected = ours(stored["bboxes"], config.convention, bottom=False)
        assert_same_boxes(boxes[good], expected)


def test_parity_of_suppression(case):
    golden, config, tasks = case
    (found,) = decode(
        tasks,
        torch.ones(1),
        grid=config.grid,
        config=config.decode,
        convention=config.convention,
    )
    np.testing.assert_allclose(found.scores, golden["final/scores"], atol=1e-6)
    np.testing.assert_array_equal(found.labels, golden["final/labels"])
    expected = ours(golden["final/boxes_bottomcenter"], config.convention, bottom=True)
    assert_same_boxes(found.boxes, expected)
