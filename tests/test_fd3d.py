"""FD3D's head, areas and losses, against few-line references, and where their gradients go."""

from dataclasses import replace

import pytest
import torch
from made_fd3d import ALL, APPRENTICE, GRID, make_loss, make_pair

from fd3d import models
from fd3d.distill.areas import bev_areas, image_areas
from fd3d.distill.head_config import HeadConfig
from fd3d.distill.losses.fd3d import FD3D, Settings
from fd3d.distill.pv import pv_signals
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
