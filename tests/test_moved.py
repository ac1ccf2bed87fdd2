"""The mode `moved`: a map goes where the apprentice's augmentation puts its ground."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from cache_tools.cli import main
from cache_tools.source import CachedExpert
from fd3d import models
from fd3d.augment import BEVAugmentation
from fd3d.data.batch import collate
from fd3d.data.frames import FrameDataset
from fd3d.distill.handover import Handover
from fd3d.distill.signals import LiveExpert
from fd3d.errors import UsageError
from fd3d.models import checkpoints
from recipes import distill_bevdepth

SEED = 8


@pytest.fixture(scope="module")
def cache(synthetic, tmp_path_factory):
    out = tmp_path_factory.mktemp("moved") / "c.zarr"
    words = f"build --expert bevdepth-tiny-h --init-seed {SEED} --version {synthetic.version} "
    words += "--split val --signals bev,detections --workers 0"
    paths = ["--dataroot", str(synthetic.dataroot), "--out", str(out)]
    assert main([*words.split(), *paths]) == 0
    return out


@pytest.fixture(scope="module")
def batch(synthetic):
    image = models.build("bevdepth-tiny-l").image
    index = synthetic.open()
    frames = FrameDataset(index=index, positions=index.split("val")[:2], image=image, truth=True)
    return collate(list(frames))


class Ramp:
    """A source whose map holds each cell's own x and y in metres."""

    mode, ids = "moved", {}

    def __init__(self, source: CachedExpert) -> None:
        self.specs = {"bev": replace(source.specs["bev"], shape=(2, *source.grid.shape))}
        self.grid = source.grid

    def load(self, token: str, frame: object = None) -> dict[str, np.ndarray]:
        steps = [(np.arange(self.grid.nx) + 0.5) * self.grid.cell_x + self.grid.x_min] * 2
        x, y = np.meshgrid(*steps)
        return {"bev": np.stack([x, y]).astype(np.float16)}

    def signals(self, loaded, device):
        maps = [torch.from_numpy(frame["bev"]).float() for frame in loaded]
        return {"bev": torch.stack(maps).to(device)}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("live", [False, True])
def test_ground_goes_where_the_augmentation_puts_it(cache, batch, flip, live):
    """What a cell says after the move is the un-augmented place of what is now there."""
    augmentation = BEVAugmentation(rotate=0.3, scale=1.04, flip_x=flip)
    matrix = torch.from_numpy(augmentation.matrix()[:3, :3]).float()
    moved = replace(batch, bev_augment=matrix.expand(2, 3, 3))
    source = Ramp(CachedExpert(cache))
    handover = Handover(source=source, frames=2, workers=0, follow=True, live=live)
    frames = [replace(moved, **one(moved, row)) for row in range(2)]
    loaded = handover.load(batch.tokens, frames) if not live else [source.load("")] * 2
    found = handover.signals(loaded, moved)
    back = torch.linalg.inv(matrix)[:2, :2]
    places = torch.from_numpy(source.load("")["bev"]).float()
    expected = torch.einsum("ij,jyx->iyx", back, places)
    valid = found["valid"][0, 0]
    assert 0.8 < float(valid.float().mean()) < 1
    # The outermost cells have no neighbour to interpolate with.
    inner = valid & (expected.abs() < source.grid.x_max - source.grid.cell_x).all(dim=0)
    assert (found["bev"][0] - expected)[:, inner].abs().max() < 0.05
    outside = (expected.abs() > source.grid.x_max + source.grid.cell_x).any(dim=0)
    assert outside.any() and not valid[outside].any()


def one(batch, row):
    """The fields of a batch of one frame that a move looks at."""
    return {
        "tokens": batch.tokens[row : row + 1],
        "bev_augment": batch.bev_augment[row : row + 1],
        "ego2lidar": batch.ego2lidar[row : row + 1],
    }


def flags(synthetic, out, *more):
    words = f"--model bevdepth-tiny-l --version {synthetic.version} --split val --batch 2 "
    words += "--steps 2 --distiller l2 --cpu --log-steps 1 --mode moved --bev-augment"
    paths = ["--dataroot", str(synthetic.dataroot), "--out", str(out)]
    return distill_bevdepth.parse([*words.split(), *paths, *more])


@pytest.mark.parametrize("workers", ["0", "1"])
def test_live_and_cached_agree(cache, synthetic, tmp_path, workers):
    torch.manual_seed(SEED)
    checkpoints.save(tmp_path / "e.safetensors", models.build("bevdepth-tiny-h"), {})
    live = ["--source", "live", "--expert", "bevdepth-tiny-h", "--expert-checkpoint"]
    rest = ["--workers", workers, "--moved-flips"]
    runs = {
        "live": [*live, str(tmp_path / "e.safetensors"), *rest],
        "cached": ["--cache", str(cache), *rest],
    }
    logs = {}
    for name, words in runs.items():
        distill_bevdepth.main(flags(synthetic, tmp_path / name, *words))
        text = (tmp_path / name / "log.jsonl").read_text()
        logs[name] = [json.loads(line)["l2"] for line in text.splitlines()]
    assert logs["live"] == pytest.approx(logs["cached"], rel=1e-3)


def test_mirror_images_come_only_where_they_are_asked_for(synthetic):
    index = synthetic.open()
    image = models.build("bevdepth-tiny-l").image
    for flips in (False, True):
        frames = FrameDataset(
            index=index,
            positions=index.split("train"),
            image=image,
            truth=False,
            bev_augment=True,
            bev_flips=flips,
            pictures=False,
        )
        signs = [float(torch.linalg.det(item.bev_augment[0, :2, :2])) for item in frames]
        assert (min(signs) < 0) == flips


def test_the_flag_belongs_to_the_mode(cache, synthetic, tmp_path):
    args = flags(synthetic, tmp_path / "x", "--moved-flips", "--cache", str(cache))
    args.mode, args.bev_augment = "clean", False
    with pytest.raises(UsageError, match="--mode moved"):
        distill_bevdepth.main(args)


def test_the_mode_is_known_to_sources(cache):
    assert CachedExpert(cache, mode="moved").ids["mode"] == "moved"
    model = models.build("bevdepth-tiny-h")
    assert LiveExpert(model=model, mode="moved").mode == "moved"
