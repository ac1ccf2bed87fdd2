"""Published distillers, each against its formula written out, and what they all must do."""

import math
from dataclasses import replace

import pytest
import torch
from made_maps import CAR, FAR, LARGE, SMALL, batch_with, maps, seen
from test_response import response, tiny_case
from torch.nn.functional import interpolate

from fd3d.distill.areas import footprints
from fd3d.distill.losses.bevdistill import BEVDistill
from fd3d.distill.losses.cwd import CWD
from fd3d.distill.losses.distillbev import DistillBEV
from fd3d.distill.losses.fgd import FGD, area_weights
from fd3d.distill.losses.mgd import MGD
from fd3d.distill.losses.unidistill import UniDistill
from fd3d.distill.points import nine_points, values_at
from fd3d.heatmap import box_heatmap
from fd3d.models.bevdepth.head import BRANCHES

OTHER = [-20.0, 5.0, 0.0, 2.5, 8.0, 3.0, 1.2, 0.5, -0.5]
MAPS = {"channels": 4, "grid": SMALL, "expert_channels": 6, "expert_grid": LARGE}
FEATURE = (CWD, MGD, FGD, BEVDistill, DistillBEV, UniDistill)


def signals(frames, tables=None, seed=0):
    """Apprentice outputs with one task of ten classes, and every signal that a rival takes."""
    apprentice, expert = maps(frames, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    tasks = {
        name: torch.randn(frames, count, 16, 16, generator=generator).requires_grad_()
        for name, count in {**BRANCHES, "heatmap": 10}.items()
    }
    expert["heatmap"] = torch.rand(frames, 10, 32, 32, generator=generator) ** 8
    rows = [CAR + [0.9, 0.0], OTHER + [0.6, 0.0]]
    expert["detections"] = tables or [torch.tensor(rows) for _ in range(frames)]
    return apprentice, seen(apprentice, (tasks,)), expert


def make(distiller):
    torch.manual_seed(0)
    return distiller(**MAPS)


def heats(batch, **size) -> torch.Tensor:
    return torch.stack(
        [
            box_heatmap(boxes, labels, grid=LARGE, classes=1, **size)
            for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
        ]
    )


@pytest.mark.parametrize("entropy", [True, False])
def test_cwd(entropy):
    torch.manual_seed(0)
    loss = CWD(tau=2.0, entropy=entropy, **MAPS)
    apprentice, expert = maps(2)
    value = loss(seen(apprentice), expert, batch_with([[], []]))["cwd"]
    mine = loss.align(apprentice)
    total = 0.0
    for b in range(2):
        for c in range(6):
            p = (expert["bev"][b, c].flatten() / 2).softmax(0)
            q = (mine[b, c].flatten() / 2).softmax(0)
            total += float((p * ((p.log() if entropy else 0) - q.log())).sum())
    assert float(value.detach()) == pytest.approx(total * 4 / 12, rel=1e-4)


def test_cwd_leaves_out_cells_that_do_not_count():
    loss = make(CWD)
    apprentice, expert = maps(1)
    valid = torch.rand(1, 1, 32, 32) > 0.3
    rubbish = torch.where(valid, expert["bev"], torch.tensor(50.0))
    batch = batch_with([[]])
    one = loss(seen(apprentice), {**expert, "valid": valid}, batch)["cwd"]
    two = loss(seen(apprentice), {"bev": rubbish, "valid": valid}, batch)["cwd"]
    torch.testing.assert_close(one, two)


def test_mgd():
    loss = make(MGD)
    apprentice, expert = maps(2)
    torch.manual_seed(7)
    value = loss(seen(apprentice), expert, batch_with([[], []]))["mgd"]
    torch.manual_seed(7)
    kept = (torch.rand(2, 1, 32, 32) >= 0.65).float()
    assert 0.25 < float(kept.mean()) < 0.45
    first, _, last = loss.generate
    made = last(first(loss.align(apprentice) * kept).relu())
    reference = ((made - expert["bev"]) ** 2).sum() / 2
    torch.testing.assert_close(value, reference)


def test_fgd():
    loss = make(FGD)
    apprentice, expert = maps(2)
    batch = batch_with([[CAR, OTHER], [FAR]])
    found = loss(seen(apprentice), expert, batch)
    mine, theirs = loss.align(apprentice), expert["bev"]
    fg = bg = attention = 0.0
    for b in range(2):
        areas = [footprints(box[None], grid=LARGE) for box in batch.boxes[b]]
        weight = torch.zeros(32, 32)
        for area in areas:
            if area.any():
                weight = torch.maximum(weight, area / area.sum())
        empty = (weight == 0).float()

        def spatial(x):
            return 1024 * (x.abs().mean(0).flatten() / 0.5).softmax(0).view(32, 32)

        def channel(x):
            return 6 * (x.abs().mean((1, 2)) / 0.5).softmax(0)

        error = (mine[b] - theirs[b]) ** 2 * spatial(theirs[b]) * channel(theirs[b])[:, None, None]
        fg += float((error * weight).sum())
        bg += float((error * empty / empty.sum()).sum())
        attention += float((spatial(mine[b]) - spatial(theirs[b])).abs().sum())
        attention += float((channel(mine[b]) - channel(theirs[b])).abs().sum())
    assert float(found["fgd.fg"]) == pytest.approx(fg / 2, rel=1e-4)
    assert float(found["fgd.bg"]) == pytest.approx(bg / 2, rel=1e-4)
    assert float(found["fgd.attention"]) == pytest.approx(attention / 2, rel=1e-4)
    apart = loss.context(mine) - loss.expert_context(theirs)
    assert float(found["fgd.global"]) == pytest.approx(float((apart**2).sum()) / 2, rel=1e-4)


def test_boxes_count_alike_whatever_their_size():
    batch = batch_with([[CAR, OTHER], []])
    fg, bg = area_weights(batch.boxes, LARGE, torch.ones(2, 1, 32, 32, dtype=torch.bool))
    assert float(fg[0].sum()) == pytest.approx(2.0) and float(fg[1].sum()) == 0.0
    torch.testing.assert_close(bg.sum(dim=(1, 2, 3)), torch.ones(2))


def test_bevdistill():
    loss = make(BEVDistill)
    apprentice, outputs, expert = signals(2)
    batch = batch_with([[CAR, OTHER], []])
    found = loss(outputs, expert, batch)
    mine, theirs = loss.align(apprentice), expert["bev"]
    mask = heats(batch, min_radius=1)
    dense = (((mine - theirs) ** 2).sum(1, keepdim=True) * mask).sum() / mask.sum()
    assert float(found["bevdistill.dense"]) == pytest.approx(float(dense), rel=1e-4)
    centres = [table[:, :2].tolist() for table in expert["detections"]]
    one = torch.stack([at(mine[b], x, y) for b in range(2) for x, y in centres[b]])
    other = torch.stack([at(theirs[b], x, y) for b in range(2) for x, y in centres[b]])
    one, other = loss.project(one), loss.expert_project(other)
    total = 0.0
    for i in range(4):
        frame = (0, 1) if i < 2 else (2, 3)
        alike = [torch.cosine_similarity(other[i], one[j], dim=0) / 0.07 for j in frame]
        total += math.log(sum(math.exp(a) for a in alike)) - float(alike[i % 2])
    assert float(found["bevdistill.sparse"]) == pytest.approx(total / 4, rel=1e-3)


def at(bev: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Bilinear value of a (C, 32, 32) map of LARGE, by hand; columns are x."""
    column, row = (x + 51.2) / 3.2 - 0.5, (y + 51.2) / 3.2 - 0.5
    left, low = math.floor(column), math.floor(row)
    total = torch.zeros(len(bev))
    for r in (low, low + 1):
        for c in (left, left + 1):
            share = (1 - abs(row - r)) * (1 - abs(column - c))
            if 0 <= r < 32 and 0 <= c < 32:
                total = total + share * bev[:, r, c]
    return total


def test_distillbev():
    loss = make(DistillBEV)
    apprentice, outputs, expert = signals(2)
    batch = batch_with([[CAR, OTHER], []])
    found = loss(outputs, expert, batch)
    mine, theirs = loss.align(apprentice), expert["bev"]
    sums = dict.fromkeys(("foreground", "false_positive", "background", "channel", "spatial"), 0.0)
    for b in range(2):
        spatial = 1024 * (theirs[b].abs().mean(0).flatten() / 0.5).softmax(0).view(32, 32)
        channel = 6 * (theirs[b].abs().mean((1, 2)) / 0.5).softmax(0)
        error = ((mine[b] - theirs[b]) ** 2 * channel[:, None, None]).sum(0) * spatial
        weight = torch.zeros(32, 32)
        for box in batch.boxes[b]:
            area = footprints(box[None], grid=LARGE)
            weight = torch.maximum(weight, area / area.sum() ** 0.5)
        said = expert["heatmap"][b].amax(0) >= 0.1
        wrong, rest = said & (weight == 0), ~said & (weight == 0)
        sums["foreground"] += float((error * weight).sum())
        sums["false_positive"] += float(error[wrong].mean())
        sums["background"] += float(error[rest].mean())
        for c in range(6):
            sums["channel"] += abs(float(mine[b, c].mean() - theirs[b, c].mean()))
        flat = loss.align_spatial(mine[b].mean(0)[None])[0]
        sums["spatial"] += float((flat - theirs[b].mean(0)).abs().sum())
    for name, value in sums.items():
        assert float(found[f"distillbev.{name}"]) == pytest.approx(value / 2, rel=1e-4), name


def test_unidistill():
    loss = make(UniDistill)
    apprentice, outputs, expert = signals(2)
    batch = batch_with([[CAR, OTHER], [FAR]])
    found = loss(outputs, expert, batch)
    mine, theirs = loss.align(apprentice), expert["bev"]
    feature = relation = 0.0
    for box in batch.boxes[0]:
        cos, sin = math.cos(box[6]), math.sin(box[6])
        points = []
        for a in (0.5, 0, -0.5):
            for s in (0.5, 0, -0.5):
                along, aside = a * float(box[4]), s * float(box[3])
                x = float(box[0]) + cos * along - sin * aside
                points.append((x, float(box[1]) + sin * along + cos * aside))
        one = torch.stack([at(mine[0], *point) for point in points])
        other = torch.stack([at(theirs[0], *point) for point in points])
        feature += float((one - other).abs().mean())
        table = torch.tensor(
            [
                [
                    float(torch.cosine_similarity(one[i], one[j], dim=0))
                    - float(torch.cosine_similarity(other[i], other[j], dim=0))
                    for j in range(9)
                ]
                for i in range(9)
            ]
        )
        relation += float(table.abs().mean())
    assert float(found["unidistill.feature"]) == pytest.approx(feature / 2, rel=1e-3)
    assert float(found["unidistill.relation"]) == pytest.approx(relation / 2, rel=1e-3)
    scores = interpolate(outputs.tasks[0]["heatmap"].sigmoid(), scale_factor=2, mode="bilinear")
    error = (scores.amax(1, keepdim=True) - expert["heatmap"].amax(1, keepdim=True)).abs()
    mask = heats(batch, min_overlap=0.7, min_radius=0)
    expected = float((error * mask).sum() / mask.sum())
    assert float(found["unidistill.response"]) == pytest.approx(expected, rel=1e-4)


def test_nine_points_and_x_in_columns():
    box = torch.tensor([[10.0, -20.0, 0.0, 2.0, 6.0, 1.0, 0.0, 0.0, 0.0]])
    points = nine_points(box)[0]
    assert points.tolist()[0] == [13.0, -19.0] and points.tolist()[4] == [10.0, -20.0]
    bev = torch.zeros(1, 32, 32)
    column, row = int((10 + 51.2) / 3.2), int((-20 + 51.2) / 3.2)
    bev[0, row, column] = 1.0
    centre = torch.tensor([(column + 0.5) * 3.2 - 51.2, (row + 0.5) * 3.2 - 51.2])
    assert float(values_at(bev, centre, LARGE)) == pytest.approx(1.0)
    assert float(values_at(bev, centre.flip(0), LARGE)) == 0.0


@pytest.mark.parametrize("distiller", FEATURE)
def test_cells_that_the_expert_did_not_see_change_nothing(distiller):
    """Rubbish there, in the map and in the scores: with an unseen strip, and none, at the boxes."""
    loss = make(distiller)
    valid = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    valid[..., 17:20] = False  # CAR lies there, OTHER does not
    _, outputs, expert = signals(1)
    rubbish = {name: torch.where(valid, expert[name], 50.0) for name in ("bev", "heatmap")}
    found = []
    for given in (expert, {**expert, **rubbish}):
        torch.manual_seed(2)
        found.append(loss(outputs, {**given, "valid": valid}, batch_with([[CAR, OTHER]])))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], msg=name)
    torch.manual_seed(2)
    whole = loss(outputs, expert, batch_with([[CAR, OTHER]]))
    assert any(float(whole[name]) != float(found[0][name]) for name in whole)


@pytest.mark.parametrize("distiller", [*FEATURE, "response"])
def test_terms_hold_under_mixed_precision(distiller):
    """The trainer's autocast is on while a distiller runs; boxes must keep their digits."""
    boxes = [[CAR, OTHER]]
    if distiller == "response":
        loss, (outputs, expert) = response(), tiny_case([CAR])
    else:
        loss = make(distiller)
        _, outputs, expert = signals(1)
    turned = torch.diag(torch.tensor([1.0, -1.0, 1.0]))[None]
    batch = replace(batch_with(boxes), bev_augment=turned)
    torch.manual_seed(2)
    plain = loss(outputs, expert, batch)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(2)
        mixed = loss(outputs, expert, batch)
    for name, value in plain.items():
        assert float(mixed[name]) == pytest.approx(float(value), rel=0.05, abs=1e-3), name


@pytest.mark.parametrize("distiller", FEATURE)
@pytest.mark.parametrize("boxes", [[[], []], [[CAR], []], [[FAR], [CAR, OTHER]]])
def test_terms_are_finite_and_every_parameter_is_in_the_graph(distiller, boxes):
    loss = make(distiller)
    tables = [torch.tensor([box + [0.9, 0.0] for box in frame]).reshape(-1, 11) for frame in boxes]
    apprentice, outputs, expert = signals(2, tables)
    expert["bev"].requires_grad_()
    terms = loss(outputs, expert, batch_with(boxes))
    assert all(torch.isfinite(term) and term.dim() == 0 for term in terms.values())
    sum(terms.values()).backward()
    for name, parameter in loss.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert torch.isfinite(apprentice.grad).all()
    assert expert["bev"].grad is None
    if boxes[1] and boxes[1] != [CAR]:
        assert float(apprentice.grad.abs().sum()) > 0


@pytest.mark.parametrize("distiller", FEATURE)
def test_a_batch_of_copies_says_what_one_says(distiller):
    """Terms are means over frames, not sums: the weight does not depend on the batch."""
    if distiller is MGD:
        pytest.skip("its random mask differs between frames")
    loss = make(distiller)
    apprentice, outputs, expert = signals(1)
    one = loss(outputs, expert, batch_with([[CAR, OTHER]]))
    twice = {
        name: value * 2 if isinstance(value, list) else value.repeat(2, 1, 1, 1)
        for name, value in expert.items()
    }
    tasks = ({name: value.repeat(2, 1, 1, 1) for name, value in outputs.tasks[0].items()},)
    two = loss(seen(apprentice.repeat(2, 1, 1, 1), tasks), twice, batch_with([[CAR, OTHER]] * 2))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-5)
