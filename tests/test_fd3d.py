"""FD3D's head, areas and losses, against few-line references, and where their gradients go."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_fd3d import ALL, APPRENTICE, GRID, SMALL, make_loss, make_pair

from fd3d import models
from fd3d.boxes import corners
from fd3d.distill.align import seen_cells
from fd3d.distill.areas import bev_areas, cached_boxes, image_areas
from fd3d.distill.head import DistillationHead, decode, encode, sample
from fd3d.distill.head_config import HeadConfig
from fd3d.distill.losses.fd3d import FD3D, Settings
from fd3d.distill.matching import code_weights, focal_loss, head_losses, match
from fd3d.distill.pv import cell_pixels, pv_signals
from fd3d.errors import UsageError


@pytest.fixture(scope="module")
def pair(synthetic):
    return make_pair(synthetic)


def empty(batch):
    return replace(
        batch,
        boxes=tuple(torch.zeros(0, 9) for _ in batch.boxes),
        labels=tuple(torch.zeros(0, dtype=torch.int64) for _ in batch.labels),
    )


def test_boxes_survive_their_codes():
    rng = np.random.default_rng(0)
    boxes = torch.from_numpy(rng.uniform(-20, 20, (30, 9))).float()
    boxes[:, 2] = boxes[:, 2] / 10
    boxes[:, 3:6] = boxes[:, 3:6].abs() + 0.2
    boxes[:, 6] = boxes[:, 6] / 7
    again = decode(encode(boxes, GRID), GRID)
    torch.testing.assert_close(again, boxes, rtol=1e-4, atol=1e-4)


def test_sampling_is_a_weighted_sum_of_projected_cells():
    """At cell centres, against loops."""
    generator = torch.Generator().manual_seed(0)
    bev = torch.randn(2, 5, 6, 8, generator=generator)
    cells = torch.randint(0, 6, (2, 3, 2, 4, 2), generator=generator)  # x below 6 < 8
    places = (cells + 0.5) / torch.tensor([8.0, 6.0])
    weights = torch.rand(2, 3, 2, 4, generator=generator)
    matrix, bias = torch.randn(8, 5, generator=generator), torch.randn(8, generator=generator)
    found = sample(bev, places, weights, matrix, bias)
    expected = torch.zeros(2, 3, 8)
    for b in range(2):
        for q in range(3):
            for h in range(2):
                for p in range(4):
                    x, y = cells[b, q, h, p]
                    value = matrix @ bev[b, :, y, x] + bias
                    part = slice(4 * h, 4 * h + 4)
                    expected[b, q, part] += weights[b, q, h, p] * value[part]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_image_areas_are_the_hull_of_the_corners(pair):
    """A cell well inside the projected corners' bounds' middle is in; one outside of them by more
    than the growth is out."""
    _, apprentice, batch, _ = pair
    image, shape = apprentice.image, apprentice.image.depth_shape
    pixels = cell_pixels(image, shape, "cpu").view(-1, 2)
    inside = outside = 0
    for row in range(len(batch)):
        for box in batch.boxes[row]:
            one = tuple(box[None] if r == row else torch.zeros(0, 9) for r in range(len(batch)))
            area = image_areas(one, batch=batch, image=image, shape=shape)
            area = area.view(len(batch), 6, -1)
            assert not area[1 - row].any()
            points = torch.from_numpy(corners(box[None].numpy())[0]).float()
            for camera in range(6):
                seen = (points - batch.trans[row, 0, camera]) @ batch.rots[row, 0, camera]
                if (seen[:, 2] < 1).any():
                    assert not (area[row, camera].any() and (seen[:, 2] < -3).all())
                    continue
                flat = seen @ batch.intrins[row, 0, camera].T
                flat = torch.cat([flat[:, :2] / flat[:, 2:], torch.ones(8, 1)], dim=1)
                at = (flat @ batch.post_rots[row, 0, camera].T)[:, :2]
                at = at + batch.post_trans[row, 0, camera, :2]
                low, high = at.min(dim=0).values, at.max(dim=0).values
                far = ((pixels < low - 12) | (pixels > high + 12)).any(dim=1)
                assert not area[row, camera][far].any()
                outside += int(far.sum())
                middle = at.mean(dim=0)
                near = (pixels - middle).norm(dim=1) < (high - low).min() / 6
                assert area[row, camera][near].all()
                inside += int(near.sum())
    assert inside > 20 and outside > 1000


def test_bev_areas_put_x_in_columns():
    box = torch.tensor([[20.0, -10.0, 0.0, 2.0, 4.0, 1.5, 0.0, 0.0, 0.0]])
    area = bev_areas([box, torch.zeros(0, 9)], grid=GRID)
    rows, columns = area[0, 0].nonzero(as_tuple=True)
    assert abs(float(columns.float().mean()) * 0.8 - 25.6 + 0.4 - 20) < 0.5
    assert abs(float(rows.float().mean()) * 0.8 - 25.6 + 0.4 + 10) < 0.5
    assert not area[1].any()


def test_cached_boxes_follow_the_augmentation(pair):
    _, _, batch, signals = pair
    turn = torch.tensor([[0.0, -1.1, 0.0], [1.1, 0.0, 0.0], [0.0, 0.0, 1.1]])
    moved = replace(batch, bev_augment=turn.expand(2, 3, 3))
    for table, boxes in zip(
        signals["detections"], cached_boxes(signals["detections"], moved, grid=GRID), strict=True
    ):
        torch.testing.assert_close(boxes[:, :3], table[:, :3] @ turn.T)
        torch.testing.assert_close(boxes[:, 3:6], table[:, 3:6] * 1.1)
        apart = (boxes[:, 6] - table[:, 6] - torch.pi / 2 + torch.pi) % (2 * torch.pi)
        torch.testing.assert_close(apart, torch.full_like(apart, torch.pi), atol=1e-4, rtol=0)


def test_each_box_gets_the_query_that_says_it():
    true = encode(torch.tensor([[5.0, 5, 0, 2, 4, 1, 0, 0, 0], [-5, 9, 0, 1, 1, 1, 1, 0, 0]]), GRID)
    labels = torch.tensor([3, 7])
    codes = torch.cat([torch.rand(4, 10) * 0.1, true[1:], torch.rand(3, 10) * 0.1, true[:1]])
    logits = torch.full((9, 10), -4.0)
    logits[4, 7] = logits[8, 3] = 4.0
    query, box = match(logits, codes, true, labels, code_weights(codes, GRID))
    assert dict(zip(box.tolist(), query.tolist(), strict=True)) == {0: 8, 1: 4}


def test_focal_loss_is_the_published_formula():
    logits = torch.tensor([-2.0, 0.3, 3.0])
    p = logits.sigmoid()
    torch.testing.assert_close(
        focal_loss(logits, torch.ones(3)), -0.25 * (1 - p) ** 2 * p.log(), rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(
        focal_loss(logits, torch.zeros(3)), -0.75 * p**2 * (1 - p).log(), rtol=1e-5, atol=1e-7
    )


def test_a_head_learns_the_boxes_of_one_frame(pair):
    """The head's own training works: one frame's map, its boxes found after some steps."""
    expert, _, batch, signals = pair
    torch.manual_seed(0)
    config = replace(SMALL, width=32, queries=30)
    head = DistillationHead(channels=expert.bev_channels, grid=expert.grid, config=config)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    first = None
    for _ in range(200):
        terms = head_losses(head(signals["bev"]), batch, expert.grid, seen_cells(signals))
        loss = sum(terms.values())
        first = first if first is not None else float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first / 4
    found = head.eval()(signals["bev"])
    near = []
    for row, boxes in enumerate(batch.boxes):
        sure = found.logits[-1][row].sigmoid().amax(dim=1) > 0.3
        centres = decode(found.codes[-1][row], expert.grid)[sure][:, :2]
        boxes = boxes[(boxes[:, :2].abs() < GRID.x_max).all(dim=1)]
        near += (torch.cdist(boxes[:, :2], centres) < 2).any(dim=1).tolist() if sure.any() else [0]
    assert np.mean(near) > 0.6


def test_generation_inside_areas_against_a_reference(pair):
    _, apprentice, batch, signals = pair
    loss = make_loss(pair, terms=("gen_bev",), areas="gt", masked=0.0).eval()
    with torch.no_grad():
        outputs = apprentice.eval()(batch)
        value = loss(outputs, signals, batch)["gen_bev"]
        made = loss.generate(loss.align(outputs.bev))
    target = signals["bev"]
    area = bev_areas(batch.boxes, grid=GRID, margin=0.5)
    scale = target.std(dim=(0, 2, 3))
    total = sum(
        float((((made - target)[b, :, y, x] / scale) ** 2).mean())
        for b, _, y, x in area.nonzero().tolist()
    )
    assert float(value) == pytest.approx(total / int(area.sum()), rel=1e-3)


def test_generation_in_the_image_planes_against_a_reference(pair):
    expert, apprentice, batch, signals = pair
    loss = make_loss(pair, terms=("gen_pv",), areas="gt", masked=0.0).eval()
    with torch.no_grad():
        outputs = apprentice.eval()(batch)
        value = loss(outputs, signals, batch)["gen_pv"]
        aligned, target, known = loss.align_pv(outputs, signals, batch)
        made = loss.generate_pv(aligned)
    shape = expert.image.depth_shape
    area = image_areas(batch.boxes, batch=batch, image=apprentice.image, shape=shape) & known
    assert target.shape[-2:] == shape and 0 < area.float().mean() < 0.7
    scale = target.movedim(1, -1)[known[:, 0]].std(dim=0)
    total = sum(
        float((((made - target)[n, :, v, u] / scale) ** 2).mean())
        for n, _, v, u in area.nonzero().tolist()
    )
    assert float(value) == pytest.approx(total / int(area.sum()), rel=1e-3)


def test_boxes_that_the_expert_did_not_see_do_not_train_the_head(pair):
    expert, _, batch, signals = pair
    head = make_loss(pair, terms=("focal",)).head
    valid = seen_cells(signals).clone()
    valid[..., 32:] = False
    seen = [boxes[:, 0] < GRID.x_min + 31.5 * GRID.cell_x for boxes in batch.boxes]
    assert any(row.any() and not row.all() for row in seen)
    half = replace(
        batch,
        boxes=tuple(boxes[row] for boxes, row in zip(batch.boxes, seen, strict=True)),
        labels=tuple(labels[row] for labels, row in zip(batch.labels, seen, strict=True)),
    )
    with torch.no_grad():
        said = head(signals["bev"])
        one = head_losses(said, batch, GRID, valid)
        other = head_losses(said, half, GRID, seen_cells(signals))
    assert one == other


def test_only_cells_that_count_matter(pair):
    """Rubbish where the expert saw nothing changes no term."""
    _, apprentice, batch, signals = pair
    valid = torch.ones(2, 1, 64, 64, dtype=torch.bool)
    valid[:, :, :, 40:] = False
    rubbish = signals["bev"].clone()
    rubbish[..., 40:] = 1e3
    loss = make_loss(pair, terms=("gen_bev",), areas="gt", masked=0.0).eval()
    # The border's cells sample across it.
    with torch.no_grad():
        outputs = apprentice.eval()(batch)
        one = loss(outputs, {**signals, "valid": valid}, batch)["gen_bev"]
        two = loss(outputs, {**signals, "bev": rubbish, "valid": valid}, batch)["gen_bev"]
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("areas", ["head", "gt", "expert"])
@pytest.mark.parametrize("compare", ["expert", "apprentice"])
@pytest.mark.parametrize("frames", ["as they are", "empty"])
def test_every_parameter_gets_a_finite_gradient(pair, areas, compare, frames):
    """Also where no frame has a box: data-parallel training needs each parameter in the graph."""
    _, apprentice, batch, signals = pair
    batch = empty(batch) if frames == "empty" else batch
    if frames == "empty":
        signals = {**signals, "detections": [torch.zeros(0, 11)] * 2}
    loss = make_loss(pair, terms=ALL, areas=areas, compare=compare).train()
    outputs = apprentice.train()(batch)
    terms = loss(outputs, signals, batch)
    assert set(terms) == {*ALL, "head.class", "head.box"}
    if frames != "empty" or areas == "head":
        assert float(terms["gen_bev"].detach()) > 0 < float(terms["gen_pv"].detach())
    sum(terms.values()).backward()
    for name, parameter in loss.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    if frames == "empty" and areas != "head":
        assert float(terms["gen_bev"].detach()) == float(terms["gen_pv"].detach()) == 0.0
    apprentice.zero_grad()


@pytest.mark.parametrize("terms", [(term,) for term in ALL])
@pytest.mark.parametrize("areas", ["head", "gt"])
def test_nothing_is_built_that_a_choice_of_terms_does_not_train(pair, terms, areas):
    _, apprentice, batch, signals = pair
    loss = make_loss(pair, terms=terms, areas=areas).train()
    sum(loss(apprentice.train()(batch), signals, batch).values()).backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())
    apprentice.zero_grad()


# Term -> what its gradient reaches: parts of the apprentice and of the distiller.
REACHES = {
    "gen_bev": {"apprentice", "bev encoder", "align", "generate"},
    "gen_pv": {"apprentice", "align_pv", "generate_pv"},
    "focal": {"apprentice", "bev encoder", "align"},
    "head.class": {"head"},
    "head.box": {"head"},
}


@pytest.mark.parametrize("term", sorted(REACHES))
def test_a_term_s_gradient_reaches_what_it_should(pair, term):
    _, apprentice, batch, signals = pair
    expert_map = signals["bev"].clone().requires_grad_()
    expert_pv = signals["pv_map"].clone().requires_grad_()
    loss = make_loss(pair, terms=ALL, areas="gt").train()
    # Boxes change from their first value on only where their last layer is not zero.
    for branch in loss.head.boxes:
        torch.nn.init.normal_(branch[-1].weight, std=0.1)
    apprentice.train().zero_grad()
    found = loss(apprentice(batch), {**signals, "bev": expert_map, "pv_map": expert_pv}, batch)
    found[term].backward()
    parts = {
        "apprentice": apprentice.img_backbone,
        "bev encoder": apprentice.img_bev_encoder_neck,
        **dict(loss.named_children()),
    }
    reached = {
        name
        for name, part in parts.items()
        if any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in part.parameters())
    }
    assert reached == REACHES[term]
    assert expert_map.grad is None and expert_pv.grad is None
    apprentice.zero_grad()


def test_doubtful_areas_count_less(pair):
    """A true box that no detection agrees with has the weight of doubt; with all of them found
    doubt changes nothing."""
    _, apprentice, batch, signals = pair
    with torch.no_grad():
        outputs = apprentice.eval()(batch)

    def value(doubt, tables):
        loss = make_loss(pair, terms=("gen_bev",), areas="gt", masked=0.0, doubt=doubt).eval()
        with torch.no_grad():
            found = loss(outputs, {**signals, "detections": tables}, batch)["gen_bev"]
        return float(found), loss

    found = signals["detections"]
    nothing = [table[:0] for table in found]
    assert value(0.2, found)[0] == pytest.approx(value(1.0, found)[0], rel=1e-6)
    assert value(0.0, nothing)[0] == 0.0
    # All weights alike leave a weighted mean as it is, down to a sum of one.
    assert value(0.2, nothing)[0] == pytest.approx(value(1.0, found)[0], rel=1e-4)
    one = [found[0][:1], found[1][:0]]
    error, loss = value(0.0, one)
    near = bev_areas([found[0][:1, :9], found[1][:0, :9]], grid=GRID, margin=0.5)
    with torch.no_grad():
        made = loss.generate(loss.align(outputs.bev))
    target = signals["bev"]
    apart = (((made - target) / target.std(dim=(0, 2, 3))[:, None, None]) ** 2).mean(1)
    assert error == pytest.approx(float(apart[near[:, 0]].mean()), rel=0.1)


def test_a_head_that_is_used_as_it_is_stays_so(pair):
    _, apprentice, batch, signals = pair
    loss = make_loss(pair, trained=False)
    before = {name: value.clone() for name, value in loss.head.state_dict().items()}
    loss.train()
    terms = loss(apprentice.train()(batch), signals, batch)
    assert set(terms) == set(ALL)
    for name, value in loss.head.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_cannot_be_meant_is_refused(pair):
    with pytest.raises(UsageError, match="no term"):
        Settings(terms=("gen",))
    with pytest.raises(UsageError, match="areas"):
        Settings(areas="boxes")
    with pytest.raises(UsageError, match="share"):
        Settings(masked=1.0)
    with pytest.raises(UsageError, match="divide"):
        HeadConfig(width=10, heads=4)
    loss = make_loss(pair, terms=("gen_bev",), areas="gt")
    with pytest.raises(UsageError, match="image planes"):
        FD3D(
            channels=64,
            grid=GRID,
            expert_channels=64,
            expert_grid=GRID,
            settings=replace(loss.settings, terms=("gen_pv",)),
        )


def test_the_image_planes_come_from_the_cache_s_parts(pair):
    expert, _, batch, signals = pair
    assert set(pv_signals(batch, models.build(APPRENTICE).eval()(batch).pv)) <= set(signals)
