import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fd3d.boxes import wrap_angle
from fd3d.classes import CLASSES, ONE_TASK, SIX_TASKS
from fd3d.data.images import ImageSpec
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.config import (
    ONE_TASK_NMS,
    SIX_TASK_NMS,
    DecodeConfig,
    LossConfig,
    NMSConfig,
)
from fd3d.models.bevdepth.decode import decode
from fd3d.models.bevdepth.head import BRANCHES
from fd3d.models.bevdepth.losses import depth_loss, head_losses, heatmap_loss
from fd3d.models.bevdepth.targets import make_targets

GRID = BEVGrid.square(half_extent=51.2, cells=64)
VARIANTS = [(SIX_TASKS, SIX_TASK_NMS), (ONE_TASK, ONE_TASK_NMS)]


def spread_boxes(seed, count=30):
    """Boxes on a 12 m lattice, so that neither cells nor footprints are shared."""
    rng = torch.Generator().manual_seed(seed)
    slots = torch.randperm(49, generator=rng)[:count]
    boxes = torch.zeros(count, 9)
    boxes[:, 0] = (slots % 7) * 12.0 - 36.0 + torch.rand(count, generator=rng)
    boxes[:, 1] = (slots // 7) * 12.0 - 36.0 + torch.rand(count, generator=rng)
    boxes[:, 2] = torch.randn(count, generator=rng)
    boxes[:, 3:6] = torch.rand(count, 3, generator=rng) * 2 + 0.4
    boxes[:, 6] = (torch.rand(count, generator=rng) * 2 - 1) * math.pi
    boxes[:, 7:] = torch.randn(count, 2, generator=rng) * 4
    return boxes, torch.randint(0, 10, (count,), generator=rng)


def maps_from(targets, frames):
    """Head maps that say exactly what the targets ask for."""
    tasks = []
    for target in targets:
        codes = torch.zeros(frames, 10, GRID.ny * GRID.nx)
        codes[target.frame, :, target.cell] = target.codes
        parts = codes.view(frames, 10, GRID.ny, GRID.nx).split(list(BRANCHES.values()), dim=1)
        maps = dict(zip(BRANCHES, parts, strict=True))
        maps["heatmap"] = torch.logit((target.heatmap * 0.9).where(target.heatmap == 1, 1e-3))
        tasks.append(maps)
    return tuple(tasks)


@pytest.mark.parametrize(("tasks", "nms"), VARIANTS, ids=["six", "one"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_decoding_perfect_maps_returns_the_boxes(tasks, nms, seed):
    boxes, labels = zip(spread_boxes(seed), spread_boxes(seed + 1), strict=True)
    dt = torch.tensor([1.5, 0.75])
    targets = make_targets(boxes=boxes, labels=labels, dt=dt, grid=GRID, tasks=tasks)
    found = decode(maps_from(targets, 2), dt, grid=GRID, config=DecodeConfig(nms=nms))
    for frame in range(2):
        result = found[frame]
        assert len(result) == len(boxes[frame])
        nearest = torch.cdist(boxes[frame][:, :2], result.boxes[:, :2]).argmin(dim=1)
        assert sorted(nearest.tolist()) == list(range(len(result)))
        difference = result.boxes[nearest] - boxes[frame]
        difference[:, 6] = wrap_angle(difference[:, 6])
        assert difference.abs().max() < 2e-4
        torch.testing.assert_close(result.labels[nearest], labels[frame])
        torch.testing.assert_close(result.scores, torch.full((len(result),), 0.9))


def test_without_time_between_frames_velocities_are_zero():
    boxes, labels = spread_boxes(0)
    dt = torch.zeros(1)
    targets = make_targets(boxes=[boxes], labels=[labels], dt=dt, grid=GRID, tasks=SIX_TASKS)
    maps = maps_from(targets, 1)
    for task in maps:
        task["vel"] = torch.ones_like(task["vel"])
    (found,) = decode(maps, dt, grid=GRID, config=DecodeConfig(nms=SIX_TASK_NMS))
    assert len(found) == len(boxes) and not found.boxes[:, 7:].any()


def test_suppression_keeps_the_best_of_a_task_and_all_of_other_tasks():
    boxes = torch.zeros(3, 9)
    boxes[:, 3:6] = torch.tensor([2.0, 4.5, 1.5])
    boxes[1, 0] = 1.7
    boxes[2, 0] = -1.7
    labels = torch.tensor([0, 0, CLASSES.index("truck")])
    dt = torch.ones(1)
    targets = make_targets(boxes=[boxes], labels=[labels], dt=dt, grid=GRID, tasks=SIX_TASKS)
    maps = maps_from(targets, 1)
    maps[0]["heatmap"][0, 0, 32, 32] = 5.0
    (found,) = decode(maps, dt, grid=GRID, config=DecodeConfig(nms=SIX_TASK_NMS))
    assert found.labels.tolist() == [0, 1]
    assert found.scores[0] == pytest.approx(torch.sigmoid(torch.tensor(5.0)).item())


def test_maps_without_a_good_score_decode_to_nothing():
    maps = {name: torch.zeros(2, width, 64, 64) for name, width in BRANCHES.items()}
    maps["heatmap"] = torch.full((2, 10, 64, 64), -9.0)
    found = decode((maps,), torch.ones(2), grid=GRID, config=DecodeConfig(nms=ONE_TASK_NMS))
    assert [item.boxes.shape for item in found] == [(0, 9), (0, 9)]


def test_sizes_that_overflow_are_dropped():
    maps = {name: torch.zeros(1, width, 64, 64) for name, width in BRANCHES.items()}
    maps["heatmap"] = torch.full((1, 10, 64, 64), -9.0)
    maps["heatmap"][0, 0, 32, [10, 32]] = torch.tensor([2.0, 1.0])
    maps["dim"][0, :, 32, 10] = 200.0
    (found,) = decode((maps,), torch.ones(1), grid=GRID, config=DecodeConfig(nms=ONE_TASK_NMS))
    assert len(found) == 1 and found.boxes.isfinite().all()


def test_boxes_without_a_size_are_no_targets():
    boxes = torch.ones(4, 9)
    boxes[range(3), range(3, 6)] = 0.0
    (target,) = make_targets(
        boxes=[boxes],
        labels=[torch.arange(4)],
        dt=torch.ones(1),
        grid=GRID,
        tasks=ONE_TASK,
    )
    assert len(target.cell) == 1 and target.codes.isfinite().all()


def test_factors_act_by_class_only_on_the_overlap():
    maps = {name: torch.zeros(1, width, 64, 64) for name, width in BRANCHES.items()}
    maps["heatmap"] = torch.full((1, 10, 64, 64), -9.0)
    maps["heatmap"][0, 9, 32, [30, 32]] = torch.tensor([2.0, 1.0])
    sized = DecodeConfig(nms=(NMSConfig(threshold=0.2, factors=(1.0,) * 9 + (9.0,), keep=9),))
    plain = DecodeConfig(nms=(NMSConfig(threshold=0.2, factors=(1.0,) * 10, keep=9),))
    (one,) = decode((maps,), torch.ones(1), grid=GRID, config=sized)
    (two,) = decode((maps,), torch.ones(1), grid=GRID, config=plain)
    assert len(one) == 1 and len(two) == 2
    torch.testing.assert_close(one.boxes[:, 3:6], torch.ones(1, 3))


def test_objects_are_ordered_by_class_and_capped_within_a_task():
    boxes = torch.zeros(700, 9)
    boxes[:, 3:6] = 1.0
    boxes[:, 0] = torch.linspace(-51, 51, 700)
    labels = torch.zeros(700, dtype=torch.long)
    labels[:100] = 1
    (target,) = make_targets(
        boxes=[boxes], labels=[labels], dt=torch.ones(1), grid=GRID, tasks=ONE_TASK
    )
    assert len(target.cell) == 500
    columns = ((boxes[100:600, 0] + 51.2) / 1.6).long()
    assert target.cell.tolist() == (32 * 64 + columns).tolist()
    assert not target.heatmap[:, 1].any()


def zero_maps(tasks, frames=2):
    made = []
    for names in tasks:
        widths = {**BRANCHES, "heatmap": len(names)}
        made.append({n: torch.zeros(frames, c, 64, 64).requires_grad_() for n, c in widths.items()})
    return tuple(made)


@pytest.mark.parametrize("tasks", [SIX_TASKS, ONE_TASK], ids=["six", "one"])
def test_losses_without_a_box_are_finite_and_have_gradients(tasks):
    empty = torch.zeros(0, 9), torch.zeros(0, dtype=torch.long)
    targets = make_targets(
        boxes=[empty[0]] * 2, labels=[empty[1]] * 2, dt=torch.ones(2), grid=GRID, tasks=tasks
    )
    maps = zero_maps(tasks)
    terms = head_losses(maps, targets, LossConfig())
    assert len(terms) == 6 * len(tasks)
    sum(terms.values()).backward()
    assert all(torch.isfinite(value.grad).all() for task in maps for value in task.values())
    assert all(value == 0 for name, value in terms.items() if not name.endswith("heatmap"))


def test_unknown_velocities_teach_nothing_or_zero_as_asked():
    boxes, labels = spread_boxes(3)
    boxes[::2, 7:] = float("nan")
    targets = make_targets(
        boxes=[boxes], labels=[labels], dt=torch.ones(1), grid=GRID, tasks=ONE_TASK
    )
    maps = zero_maps(ONE_TASK, frames=1)
    maps[0]["vel"].data += 100.0
    ignore = head_losses(maps, targets, LossConfig(nan_velocity="ignore"))
    zero = head_losses(maps, targets, LossConfig(nan_velocity="zero"))
    known = (100 - boxes[1::2, 7:]).abs().sum() * 0.25 / 30
    assert ignore["task0.vel"].item() == pytest.approx(known.item(), rel=1e-4)
    assert zero["task0.vel"].item() == pytest.approx(known.item() + 100 * 30 * 0.25 / 30, rel=1e-4)
    assert all(torch.isfinite(value) for value in ignore.values())


def test_heatmap_loss_prefers_the_truth():
    target = torch.zeros(1, 1, 8, 8)
    target[0, 0, 4, 4] = 1.0
    good = torch.full((1, 1, 8, 8), -6.0)
    bad = -good
    good[0, 0, 4, 4] = 6.0
    assert heatmap_loss(good, target) < 1e-3 < 1.0 < heatmap_loss(bad, target)
    # One missed peak: -log(p) (1 - p)^2.
    missed = heatmap_loss(torch.full((1, 1, 8, 8), -20.0), target)
    assert missed.item() == pytest.approx(-math.log(1e-4), rel=1e-2)


def test_depth_loss_is_the_mean_over_all_cells_of_the_seen_ones():
    image = ImageSpec(height=32, width=48, stride=16)
    torch.manual_seed(0)
    logits = torch.randn(2, 59, 2, 3)
    depth = torch.zeros(1, 2, 2, 3)
    depth[0, 0, 1, 2], depth[0, 1, 0, 0], depth[0, 1, 1, 1] = 1.0, 17.6, 59.99
    expected = 0.0
    for view, row, column, wanted in ((0, 1, 2, 0), (1, 0, 0, 16), (1, 1, 1, 58)):
        one_hot = torch.zeros(59)
        one_hot[wanted] = 1
        expected += torch.nn.functional.binary_cross_entropy(
            logits[view, :, row, column].sigmoid(), one_hot, reduction="sum"
        )
    expected = expected / logits.numel()
    torch.testing.assert_close(depth_loss(logits, depth, image), expected)
    assert depth_loss(logits, torch.zeros_like(depth), image) == 0


def test_the_softmax_depth_loss_is_the_mean_over_the_seen_cells():
    image = ImageSpec(height=32, width=48, stride=16)
    logits = torch.randn(1, 59, 2, 3, generator=torch.Generator().manual_seed(0))
    depth = torch.zeros(1, 1, 2, 3)
    depth[0, 0, 0, 1], depth[0, 0, 1, 2] = 5.5, 30.0
    chances = logits[0].softmax(dim=0)
    expected = -(chances[4, 0, 1].log() + chances[29, 1, 2].log()) / 2
    torch.testing.assert_close(depth_loss(logits, depth, image, "ce"), expected)
    assert depth_loss(logits, torch.zeros_like(depth), image, "ce") == 0
