"""Distilling at the shared map inside the heads."""

import json

import pytest
import torch
from made_maps import CAR, LARGE, SMALL, batch_with, maps, seen

from cache_tools.cli import main as cache_cli
from fd3d import models
from fd3d.distill.losses.l2 import L2
from fd3d.distill.losses.mgd import MGD
from fd3d.distill.shared_map import AtSharedMap
from fd3d.efficiency import blank_batch
from fd3d.errors import UsageError
from fd3d.models import checkpoints
from fd3d.models.bevdepth.head import ConvNorm
from recipes import distill_bevdepth

BATCH = batch_with([[CAR], []])


def conv_with_statistics() -> ConvNorm:
    torch.manual_seed(1)
    conv = ConvNorm(6, 5)
    conv.bn.running_mean.uniform_(-1, 1)
    conv.bn.running_var.uniform_(0.5, 2)
    return conv


def test_terms_are_the_distillers_own_on_what_the_experts_head_makes():
    apprentice, expert = maps(2)
    conv = conv_with_statistics()
    torch.manual_seed(0)
    inside = L2(channels=4, grid=SMALL, expert_channels=5, expert_grid=LARGE)
    both = AtSharedMap(distiller=inside, expert_conv=conv).train()
    outputs = seen(torch.full_like(apprentice, torch.nan))
    found = both(type(outputs)(**{**vars(outputs), "shared": apprentice}), expert, BATCH)
    conv.eval()
    wanted = inside(seen(apprentice), {"bev": conv(expert["bev"])}, BATCH)
    assert found["l2"].item() == pytest.approx(wanted["l2"].item(), rel=1e-6)


def test_gradients_reach_the_apprentice_and_the_adaptor_not_the_experts_head():
    apprentice, expert = maps(2)
    conv = conv_with_statistics()
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    inside = MGD(channels=4, grid=SMALL, expert_channels=5, expert_grid=LARGE)
    both = AtSharedMap(distiller=inside, expert_conv=conv).train()
    target = expert["bev"].requires_grad_()
    sum(both(seen(apprentice), {"bev": target}, BATCH).values()).backward()
    assert apprentice.grad.abs().sum() > 0 and target.grad is None
    assert all(p.grad is not None for p in inside.parameters())
    assert all(p.grad is None for p in conv.parameters())
    assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())


def test_the_networks_outputs_have_the_map_that_the_branches_read():
    torch.manual_seed(0)
    model = models.build("bevdepth-tiny-l").eval()
    with torch.no_grad():
        outputs = model(blank_batch(model))
        tasks = model.head(outputs.bev)
        shared = model.pts_bbox_head.shared_conv(outputs.bev)
    assert torch.equal(outputs.shared, shared) and shared.shape[1] == model.config.head
    assert all(torch.equal(outputs.tasks[0][name], value) for name, value in tasks[0].items())


def test_a_channel_that_a_relu_has_closed_does_not_blow_up():
    """One cell of a thousandth: its deviation must not be what errors are measured in."""
    apprentice, expert = maps(2)
    expert["bev"][:, 2] = 0.0
    expert["bev"][0, 2, 3, 3] = 1e-3
    loss = L2(channels=4, grid=SMALL, expert_channels=6, expert_grid=LARGE)
    assert float(loss(seen(apprentice), expert, BATCH)["l2"].detach()) < 100


@pytest.fixture(scope="module")
def made(synthetic, tmp_path_factory):
    """An expert's checkpoint, and its lossless cache of the training split."""
    folder = tmp_path_factory.mktemp("shared-map")
    torch.manual_seed(6)
    checkpoints.save(folder / "expert.safetensors", models.build("bevdepth-tiny-h"), {})
    words = f"build --expert bevdepth-tiny-h --version {synthetic.version} --workers 0 "
    words += "--split train --signals bev,heatmap,lift --preset lossless"
    paths = {"checkpoint": folder / "expert.safetensors", "dataroot": synthetic.dataroot}
    paths["out"] = folder / "cache.zarr"
    flags = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    assert cache_cli([*words.split(), *flags]) == 0
    return folder


def distil(synthetic, out, *more):
    words = f"--model bevdepth-tiny-l --version {synthetic.version} --batch 2 --workers 0 --cpu "
    words += "--log-steps 1 --steps 2 --place shared"
    paths = ["--dataroot", str(synthetic.dataroot), "--out", str(out)]
    distill_bevdepth.main(distill_bevdepth.parse([*words.split(), *paths, *more]))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("distiller", ["l2", "heatmap", "distillbev"])
def test_live_and_cached_agree(made, synthetic, tmp_path, distiller):
    live = ["--source", "live", "--expert", "bevdepth-tiny-h", "--expert-checkpoint"]
    sources = {
        "live": [*live, str(made / "expert.safetensors")],
        "cached": ["--cache", str(made / "cache.zarr")],
    }
    logs = {
        name: distil(synthetic, tmp_path / name, "--distiller", distiller, *words)
        for name, words in sources.items()
    }
    terms = [name for name in logs["live"][0] if name.startswith(distiller)]
    assert len(terms) == (5 if distiller == "distillbev" else 1)
    for term in terms:
        assert logs["live"][0][term] == pytest.approx(logs["cached"][0][term], rel=1e-3)
    told = json.loads((tmp_path / "cached" / "run.json").read_text())["identity"]
    assert told[f"{distiller}.place"] == "shared"


def test_it_follows_relift(made, synthetic, tmp_path):
    words = ["--distiller", "l2", "--mode", "relift", "--bev-augment"]
    assert distil(synthetic, tmp_path / "run", *words, "--cache", str(made / "cache.zarr"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--distiller", "fd3d"], "fd3d"),
        (["--distiller", "l2", "--compare", "apprentice"], "--compare"),
        (["--distiller", "l2", "--mode", "moved", "--bev-augment"], "--mode relift"),
    ],
)
def test_what_the_experts_head_cannot_read_is_refused(made, synthetic, tmp_path, words, told):
    with pytest.raises(UsageError, match=told):
        distil(synthetic, tmp_path / "run", *words, "--cache", str(made / "cache.zarr"))
