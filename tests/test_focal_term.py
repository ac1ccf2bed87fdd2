"""FD3D's focal term, against loops, and which queries count in it."""

from dataclasses import replace

import pytest
import torch
from made_fd3d import make_loss, make_pair

from fd3d.distill import focal


@pytest.fixture(scope="module")
def pair(synthetic):
    return make_pair(synthetic)


def looked_up(bev, place, heads, head):
    """What one head reads of a projected map (width, Y, X) at a place (x, y) in fractions."""
    part = bev.unflatten(0, (heads, -1))[head]
    column, row = float(place[0]) * bev.shape[2] - 0.5, float(place[1]) * bev.shape[1] - 0.5
    left, low = int(column // 1), int(row // 1)
    total = torch.zeros(len(part))
    for r in (low, low + 1):
        for c in (left, left + 1):
            if 0 <= r < bev.shape[1] and 0 <= c < bev.shape[2]:
                total += part[:, r, c] * (1 - abs(row - r)) * (1 - abs(column - c))
    return total


@pytest.mark.parametrize("trained", [True, False])
def test_focal_against_a_reference(pair, trained):
    """Also where the head's batch norm is in training and takes the batch's statistics."""
    _, apprentice, batch, signals = pair
    loss = make_loss(pair, terms=("focal",), areas="gt", trained=trained).train()
    torch.nn.init.normal_(loss.head.norm.weight, mean=1.0, std=0.3)
    torch.nn.init.normal_(loss.head.norm.bias, std=0.3)
    loss.head.norm.running_mean.normal_(std=0.1)
    target = signals["bev"]
    with torch.no_grad():
        outputs = apprentice.eval()(batch)
        said = loss.head(target)
        running = {name: value.clone() for name, value in loss.head.state_dict().items()}
        value = loss(outputs, signals, batch)["focal"]
        aligned = loss.align(outputs.bev)
    norm = loss.head.norm
    mean, var = running["norm.running_mean"], running["norm.running_var"]
    if trained:
        mean, var = target.mean((0, 2, 3)), target.var((0, 2, 3), correction=0)

    def projected(bev, layer):
        bev = bev.movedim(1, -1)
        bev = (bev - mean) / (var + norm.eps).sqrt() * norm.weight.detach() + norm.bias.detach()
        return layer.look.value(bev).detach().movedim(-1, 1)

    total, count = 0.0, 0.0
    for layer, logits, seen in zip(loss.head.layers, said.logits, said.sampled, strict=True):
        read = {}
        for name, bev in (("mine", aligned), ("theirs", target)):
            maps = projected(bev, layer)
            read[name] = torch.stack([
                torch.cat([
                    sum(
                        seen.weights[b, q, h, p] * looked_up(maps[b], seen.places[b, q, h, p], 4, h)
                        for p in range(2)
                    )
                    for h in range(4)
                ])
                for b in range(2)
                for q in range(12)
            ])  # fmt: skip
        scale = read["theirs"].std(dim=0)
        error = (((read["mine"] - read["theirs"]) / scale) ** 2).mean(dim=1)
        score = logits.sigmoid().amax(dim=-1).flatten()
        total, count = total + float((error * score).sum()), count + float(score.sum())
    assert count > 1
    assert float(value) == pytest.approx(total / count, rel=1e-3)


def test_focal_is_zero_for_an_apprentice_that_says_the_expert_s_map(pair):
    _, apprentice, batch, signals = pair
    loss = make_loss(pair, terms=("focal",), trained=False).train()
    loss.align = torch.nn.Identity()
    with torch.no_grad():
        outputs = replace(apprentice.eval()(batch), bev=signals["bev"])
        assert float(loss(outputs, signals, batch)["focal"]) < 1e-6
        worse = replace(outputs, bev=signals["bev"] + torch.randn_like(signals["bev"]))
        assert float(loss(worse, signals, batch)["focal"]) > 1e-2


def test_queries_that_look_where_nothing_was_seen_do_not_count(pair):
    """The head sees the whole map, so its own places stand; what they read there must not."""
    _, apprentice, batch, signals = pair
    loss = make_loss(pair, terms=("focal",), trained=False).eval()
    valid = torch.ones(2, 1, 64, 64, dtype=torch.bool)
    valid[..., 40:] = False
    with torch.no_grad():
        outputs = apprentice.eval()(batch)
        said = loss.head(signals["bev"])
        wanted = []
        for seen in said.sampled:
            # Columns of the map; the last seen one is 39, and places read from both neighbours.
            columns = seen.places[..., 0].flatten(2) * 64 - 0.5
            outside = (columns > 64) | (
                seen.places[..., 1].flatten(2).sub(0.5).abs() > 0.5 + 1 / 64
            )
            wanted.append(((columns <= 39) | outside).all(dim=2))
        found = [focal._known(valid, seen) for seen in said.sampled]
        assert any(one.any() and not one.all() for one in wanted)
        for one, other in zip(found, wanted, strict=True):
            assert (one == other).float().mean() > 0.99
        nothing = loss(outputs, {**signals, "valid": torch.zeros_like(valid)}, batch)["focal"]
        some = loss(outputs, {**signals, "valid": valid}, batch)["focal"]
    assert float(nothing) == 0.0 < float(some)


def test_doubtful_queries_count_less(pair):
    _, apprentice, batch, signals = pair
    with torch.no_grad():
        outputs = apprentice.eval()(batch)

    def value(doubt, tables):
        loss = make_loss(pair, terms=("focal",), trained=False, doubt=doubt).eval()
        with torch.no_grad():
            said = loss.head(signals["bev"])
            found = {**signals, "detections": tables}
            agreed = loss._agreed(found, batch) if doubt < 1 else None
            trust = loss._trust(said, agreed)
            return float(loss(outputs, found, batch)["focal"]), torch.stack(list(trust))

    nothing = [table[:0] for table in signals["detections"]]
    plain, trust = value(1.0, nothing)
    assert plain > 0 and (trust == 1).all()
    assert value(0.0, nothing)[0] == 0.0
    # All weights alike leave a weighted mean as it is, as long as they sum to more than one.
    assert value(0.5, nothing)[0] == pytest.approx(plain, rel=1e-5)
    some, trust = value(0.25, signals["detections"])
    assert set(trust.unique().tolist()) == {0.25, 1.0}
    assert some != plain
