"""`response`: what the expert's head says, as soft truth."""

import math

import pytest
import torch
from made_maps import CAR, batch_with, seen

from fd3d import models
from fd3d.distill.losses.response import Response
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.head import BRANCHES

OTHER = [-20.0, 5.0, 0.0, 2.5, 8.0, 3.0, 1.2, 0.5, -0.5]


def response() -> Response:
    config = models.build("bevdepth-tiny-l").config
    return Response(config=config, expert_grid=BEVGrid.square(half_extent=25.6, cells=64))


def tiny_case(boxes):
    """A tiny apprentice's head maps and an expert's scores and boxes at twice the cells."""
    generator = torch.Generator().manual_seed(3)
    tasks = {
        name: torch.randn(1, count, 32, 32, generator=generator).requires_grad_()
        for name, count in {**BRANCHES, "heatmap": 10}.items()
    }
    rows = torch.tensor([box + [0.9, 2.0] for box in boxes]).reshape(-1, 11)
    expert = {
        "heatmap": torch.rand(1, 10, 64, 64, generator=generator) ** 4,
        "detections": [rows],
    }
    return seen(torch.zeros(1, 64, 32, 32), (tasks,)), expert


def test_response_heatmap_takes_scores_as_they_are():
    outputs, expert = tiny_case([CAR])
    value = response()(outputs, expert, batch_with([[]]))["response.heatmap"]
    wanted = expert["heatmap"].unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(4, 5))
    mine = outputs.tasks[0]["heatmap"].sigmoid()
    entropy = -(wanted * mine.log() + (1 - wanted) * (1 - mine).log())
    reference = (entropy * (mine - wanted) ** 2).sum() / wanted.sum()
    assert float(value.detach()) == pytest.approx(float(reference.detach()), rel=1e-4)


def test_response_boxes_are_those_of_the_expert():
    """A head that says the expert's box exactly has no error there."""
    box = [8.3, 12.2, *CAR[2:]]
    outputs, expert = tiny_case([box])
    loss = response()
    x, y, z, w, l, h, yaw, vx, vy = box  # noqa: E741
    column, row = (x + 25.6) / 1.6, (y + 25.6) / 1.6
    place = (0, slice(None), int(row), int(column))
    turn = -yaw - math.pi / 2
    with torch.no_grad():
        said = outputs.tasks[0]
        said["reg"][place] = torch.tensor([column % 1, row % 1])
        said["height"][place] = z
        said["dim"][place] = torch.tensor([w, l, h]).log()
        said["rot"][place] = torch.tensor([math.sin(turn), math.cos(turn)])
        said["vel"][place] = torch.tensor([vx, vy])
    value = loss(outputs, expert, batch_with([[]]))["response.boxes"]
    assert float(value.detach()) < 1e-4
    low = expert | {"detections": [expert["detections"][0].clone()]}
    low["detections"][0][:, 9] = 0.2
    said["height"].data[place] += 5
    assert float(loss(outputs, expert, batch_with([[]]))["response.boxes"].detach()) > 4
    assert float(loss(outputs, low, batch_with([[]]))["response.boxes"].detach()) == 0.0


def test_the_response_is_not_taught_where_the_expert_did_not_see():
    outputs, expert = tiny_case([CAR])
    valid = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)) > 0.1
    rubbish = torch.where(valid, expert["heatmap"], 1.0)
    values = [
        response()(outputs, {**expert, "heatmap": heatmap, "valid": valid}, batch_with([[]]))
        for heatmap in (expert["heatmap"], rubbish)
    ]
    torch.testing.assert_close(values[0]["response.heatmap"], values[1]["response.heatmap"])


def test_the_response_is_finite_without_boxes():
    outputs, expert = tiny_case([])
    terms = response()(outputs, expert, batch_with([[]]))
    sum(terms.values()).backward()
    assert float(terms["response.boxes"].detach()) == 0.0
    assert all(torch.isfinite(value.grad).all() for value in outputs.tasks[0].values())
