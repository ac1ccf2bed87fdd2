"""The signal `pv`: what is stored, and its way into an apprentice's image planes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cache_tools.cli import main
from cache_tools.source import CachedExpert
from fd3d import models
from fd3d.data.batch import collate
from fd3d.data.frames import FrameDataset
from fd3d.distill.losses.heatmap import Heatmap
from fd3d.distill.pv import ImagePlanes, cell_pixels, move_pv, pv_signals, stored_pixels
from fd3d.distill.signals import LiveExpert
from fd3d.models.bevdepth.network import Outputs

EXPERT, APPRENTICE = "bevdepth-tiny-h", "bevdepth-tiny-l"


def view_of(synthetic, name: str, *, augment: bool = False, rows: int = 2):
    """A network and its view of the first validation frames."""
    torch.manual_seed(5)
    model = models.build(name).eval()
    index = synthetic.open()
    frames = FrameDataset(
        index=index,
        positions=index.split("val")[:rows],
        image=model.image,
        truth=False,
        image_augment=augment,
        seed=7,
    )
    return model, collate(list(frames))


def places(batch, model) -> torch.Tensor:
    """(B * N, 2, h, w) stored-picture coordinates of a network's cells, a map to be moved."""
    pixels = cell_pixels(model.image, model.image.depth_shape, "cpu")
    return stored_pixels(batch, pixels).flatten(0, 1).movedim(-1, 1)


def as_outputs(pv: torch.Tensor) -> Outputs:
    return Outputs(depth_logits=pv, bev=pv, shared=pv, tasks=(), pv=pv)


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("factor", [1, 2])
def test_a_moved_map_shows_what_lies_there(synthetic, augment, factor):
    """A map that holds its own place in the stored picture must still do so in the apprentice's
    view, at the apprentice's density and at twice it."""
    expert, clean = view_of(synthetic, EXPERT)
    apprentice, batch = view_of(synthetic, APPRENTICE, augment=augment)
    shape = tuple(factor * size for size in apprentice.image.depth_shape)
    found = pv_signals(clean, places(clean, expert))
    moved, valid = move_pv(
        found, batch, expert=expert.image, apprentice=apprentice.image, shape=shape
    )
    expected = stored_pixels(batch, cell_pixels(apprentice.image, shape, "cpu"))
    expected = expected.flatten(0, 1).movedim(-1, 1)
    assert moved.shape == expected.shape and valid.shape == (12, 1, *shape)
    assert 0.5 < valid.float().mean() <= 1
    error = ((moved - expected).abs() * valid).max()
    assert error < 2e-2, "stored pixels"
    if augment:
        assert not valid.all(), "an augmented view reaches beyond the expert's"


def test_a_network_seen_by_itself_stays_as_it_is(synthetic):
    expert, batch = view_of(synthetic, EXPERT)
    with torch.no_grad():
        outputs = expert(batch)
    shape = expert.image.depth_shape
    moved, valid = move_pv(
        pv_signals(batch, outputs.pv),
        batch,
        expert=expert.image,
        apprentice=expert.image,
        shape=shape,
    )
    assert valid.all()
    torch.testing.assert_close(moved, outputs.pv, rtol=1e-3, atol=1e-3)


def test_a_mirrored_apprentice_gets_a_mirrored_map(synthetic):
    expert, batch = view_of(synthetic, EXPERT)
    with torch.no_grad():
        outputs = expert(batch)
    found = pv_signals(batch, outputs.pv)
    mirror = torch.diag(torch.tensor([-1.0, 1.0, 1.0]))
    shift = torch.tensor([expert.image.width - 1.0, 0.0, 0.0])
    mirrored = replace(
        batch,
        post_rots=mirror @ batch.post_rots,
        post_trans=(mirror @ batch.post_trans[..., None])[..., 0] + shift,
    )
    shape = expert.image.depth_shape
    moved, _ = move_pv(found, mirrored, expert=expert.image, apprentice=expert.image, shape=shape)
    torch.testing.assert_close(moved, outputs.pv.flip(-1), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("preset", ["lossless", "balanced"])
def test_a_cache_gives_what_the_live_expert_says(synthetic, tmp_path, preset):
    out = tmp_path / "pv.zarr"
    words = f"--expert {EXPERT} --init-seed 5 --version {synthetic.version} --split val "
    words += f"--signals bev,pv --preset {preset} --workers 0"
    paths = ["--dataroot", str(synthetic.dataroot), "--out", str(out)]
    assert main(["build", *words.split(), *paths]) == 0
    model, batch = view_of(synthetic, EXPERT)
    live = LiveExpert(model=model, names=("bev", "pv")).signals(batch)
    source = CachedExpert(out, names=("bev", "pv"))
    cached = source.signals([source.load(token) for token in batch.tokens])
    assert set(cached) == {"bev", "pv_cameras", "pv_map"}
    torch.testing.assert_close(cached["pv_cameras"], live["pv_cameras"])
    error = (cached["pv_map"] - live["pv_map"]).norm() / live["pv_map"].norm()
    assert float(error) < (1e-3 if preset == "lossless" else 0.05)
    assert np.prod(source.specs["pv_map"].shape) == live["pv_map"][0].numel()


@pytest.mark.parametrize("signals", ["bev", "bev,pv"])
def test_info_names_a_distiller_that_the_cache_serves(synthetic, tmp_path, capsys, signals):
    words = f"--expert {EXPERT} --init-seed 5 --version {synthetic.version} --split val --workers 0"
    paths = ["--dataroot", str(synthetic.dataroot), "--out", str(tmp_path / "c.zarr")]
    assert main(["build", *words.split(), "--signals", signals, *paths]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "c.zarr")]) == 0
    said = capsys.readouterr().out
    assert "Distil:" in said and ("--distiller l2" in said) == (signals == "bev")


def test_the_baseline_s_term_in_the_image_planes(synthetic):
    """Soft cross-entropy of each channel over the cells that the expert saw, by loops."""
    expert, clean = view_of(synthetic, EXPERT, rows=1)
    apprentice, batch = view_of(synthetic, APPRENTICE, augment=True, rows=1)
    planes = ImagePlanes(
        apprentice=apprentice.image, expert=expert.image, channels=3, expert_channels=4
    )
    maps = {"channels": 3, "grid": apprentice.grid, "expert_channels": 4}
    loss = Heatmap(**maps, expert_grid=apprentice.grid, planes=planes)
    shapes = apprentice.image.depth_shape, expert.image.depth_shape
    mine, theirs = torch.randn(6, 3, *shapes[0]).requires_grad_(), torch.randn(6, 4, *shapes[1])
    said = pv_signals(clean, theirs)
    said["pv_map"].requires_grad_()
    outputs = replace(as_outputs(mine), bev=torch.zeros(1, 3, *apprentice.grid.shape))
    nothing = {"boxes": (torch.zeros(0, 9),), "labels": (torch.zeros(0, dtype=torch.int64),)}
    batch = replace(batch, **nothing)
    bev = torch.zeros(1, 4, *apprentice.grid.shape)
    term = loss(outputs, {**said, "bev": bev}, batch)["heatmap.pv"]

    target, known = move_pv(
        said, batch, expert=expert.image, apprentice=apprentice.image, shape=shapes[1]
    )
    assert 0 < known.float().mean() < 1
    grown = torch.nn.functional.interpolate(
        loss.align_pv.project(mine), size=shapes[1], mode="bilinear", align_corners=True
    )
    total = 0.0
    for camera in range(6):
        for channel in range(4):
            seen = known[camera, 0]
            wanted = (target[camera, channel][seen] / 2).softmax(0)
            total -= float((wanted * (grown[camera, channel][seen] / 2).log_softmax(0)).sum())
    assert float(term.detach()) == pytest.approx(total * 4 / (4 * 6), rel=1e-4)
    term.backward()
    assert float(mine.grad.abs().sum()) > 0 and said["pv_map"].grad is None
