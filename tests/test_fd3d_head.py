"""FD3D's distillation head: its boxes, what it samples, and its own training."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_fd3d import GRID, SMALL, make_loss, make_pair

from fd3d.distill.align import seen_cells
from fd3d.distill.head import DistillationHead, decode, encode, sample
from fd3d.distill.matching import code_weights, focal_loss, head_losses, match


@pytest.fixture(scope="module")
def pair(synthetic):
    return make_pair(synthetic)


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
