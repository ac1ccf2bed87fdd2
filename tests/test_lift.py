"""The signal `lift` and the mode `relift`: exact under any BEV augmentation, live or cached."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from cache_tools.cli import main
from cache_tools.export import export
from cache_tools.reader import CacheReader
from cache_tools.score import head_of
from cache_tools.source import CachedExpert
from fd3d import models
from fd3d.augment import BEVAugmentation
from fd3d.data.batch import collate
from fd3d.data.frames import FrameDataset
from fd3d.distill import bev_part
from fd3d.distill.relift import Relift
from fd3d.distill.signals import LIFT, LiveExpert
from fd3d.errors import CheckFailed, UsageError
from fd3d.models import checkpoints
from recipes.distill_bevdepth import main as distill
from recipes.distill_bevdepth import parse

SEED = 4
FLIP = BEVAugmentation(flip_y=True)
TURN = BEVAugmentation(rotate=0.3, scale=1.05)
BOTH = BEVAugmentation(rotate=-0.2, scale=0.95, flip_x=True)


@pytest.fixture(scope="module")
def caches(synthetic, tmp_path_factory):
    """Preset -> a cache of a tiny expert with `bev` and `lift`."""
    folder = tmp_path_factory.mktemp("lift")
    found = {}
    for preset in ("lossless", "balanced"):
        found[preset] = folder / f"{preset}.zarr"
        words = f"--expert bevdepth-tiny-h --init-seed {SEED} --version {synthetic.version} "
        words += f"--split val --signals bev,lift --preset {preset} --workers 0 --batch 5"
        paths = ["--dataroot", str(synthetic.dataroot), "--out", str(found[preset])]
        assert main(["build", *words.split(), *paths]) == 0
    return found


@pytest.fixture(scope="module")
def expert():
    torch.manual_seed(SEED)
    return models.build("bevdepth-tiny-h").eval()


@pytest.fixture(scope="module")
def batch(synthetic, expert):
    index = synthetic.open()
    frames = FrameDataset(
        index=index, positions=index.split("val"), image=expert.image, truth=False
    )
    return collate(list(frames))


def augmented(batch, augmentation):
    """The batch as a data set with this BEV augmentation would give it."""
    matrix = torch.from_numpy(augmentation.matrix()[:3, :3])
    return replace(
        batch,
        rots=(matrix @ batch.rots.double()).float(),
        trans=(matrix @ batch.trans.double()[..., None])[..., 0].float(),
        bev_augment=matrix.float().expand(len(batch), 3, 3),
    )


def relifted_live(expert, batch, augmentation):
    """The definition of the mode: seen un-augmented, splatted augmented."""
    with torch.no_grad():
        seen = expert.see(batch)
        factors = [(one.depth_logits.softmax(dim=1), one.context) for one in seen]
        return expert.assemble(factors, augmented(batch, augmentation))


def apart(one, other):
    return float((one - other).norm() / other.norm())


def cached(path, batch, augmentation=None):
    source = CachedExpert(path, names=("lift",), mode="relift")
    found = source.signals([source.load(token) for token in batch.tokens])
    relift = Relift(head_of(source.reader))
    return relift(found, augmented(batch, augmentation) if augmentation else None)


@pytest.mark.parametrize("augmentation", [FLIP, TURN, BOTH])
def test_the_cache_gives_what_the_live_expert_gives(caches, expert, batch, augmentation):
    live = relifted_live(expert, batch, augmentation)
    found = cached(caches["lossless"], batch, augmentation)
    assert apart(found, live) < 1e-3
    assert cosine_similarity(found.flatten(), live.flatten(), dim=0) > 0.99999
    moved_too = apart(found, cached(caches["lossless"], batch))
    assert moved_too > 0.01


def test_without_augmentation_it_is_the_experts_map(caches, expert, batch):
    with torch.no_grad():
        bev = expert(batch).bev
    assert apart(cached(caches["lossless"], batch), bev) < 1e-3
    centred = bev - bev.mean(dim=(2, 3), keepdim=True)
    found = cached(caches["balanced"], batch)
    assert (found - bev).norm() < 0.01 * centred.norm()


def test_lift_from_the_live_expert_is_the_same_signal(caches, expert, batch):
    said = LiveExpert(model=expert, names=("lift",), mode="relift").signals(batch)
    assert set(said) == set(LIFT)
    reader = CacheReader(caches["lossless"])
    for row, token in enumerate(batch.tokens):
        for name in LIFT:
            found = reader.read(token, [name])[name].astype(np.float32)
            torch.testing.assert_close(
                torch.from_numpy(found), said[name][row], rtol=1e-3, atol=1e-3
            )


def test_another_adjacent_frame_is_refused(caches, batch):
    source = CachedExpert(caches["lossless"], names=("lift",), mode="relift")
    found = source.signals([source.load(token) for token in batch.tokens])
    relift = Relift(head_of(source.reader))
    with pytest.raises(UsageError, match="adjacent frame lies 0.500 s from the expert's"):
        relift(found, replace(batch, dt=batch.dt + 0.5))


def test_a_cache_without_lift_is_refused(caches):
    with pytest.raises(UsageError, match="holds the signals bev, lift, not heatmap"):
        CachedExpert(caches["lossless"], names=("heatmap",))


def test_the_weights_beside_the_arrays_are_checked(caches, expert, tmp_path):
    reader = CacheReader(caches["lossless"])
    part = bev_part.unpack(reader.bev_part())
    assert part.img_backbone is None and not part.training
    own, theirs = part.state_dict(), expert.state_dict()
    assert own and all(torch.equal(own[name], theirs[name]) for name in own)
    assert bev_part.pack(expert) == reader.bev_part().read_bytes()
    path = reader.bev_part()
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CheckFailed, match="bev_part.safetensors is damaged: run the build"):
            reader.bev_part()
        assert main(["verify", str(reader.path)]) == 1
    finally:
        path.write_bytes(whole)
    assert main(["verify", str(reader.path)]) == 0


def test_a_build_puts_lost_weights_back(caches, synthetic):
    path = caches["balanced"] / "bev_part.safetensors"
    whole = path.read_bytes()
    path.unlink()
    words = f"--expert bevdepth-tiny-h --init-seed {SEED} --version {synthetic.version} --split val"
    words += " --signals bev,lift --preset balanced --workers 0 --batch 5"
    paths = ["--dataroot", str(synthetic.dataroot), "--out", str(caches["balanced"])]
    assert main(["build", *words.split(), *paths]) == 0
    assert path.read_bytes() == whole


def flags(synthetic, out, *more):
    words = f"--model bevdepth-tiny-l --version {synthetic.version} --split val --batch 2 "
    words += "--steps 2 --workers 0 --distiller l2 --cpu"
    paths = ["--dataroot", str(synthetic.dataroot), "--out", str(out)]
    return parse([*words.split(), *paths, *more])


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_apprentice_trains_under_bev_augmentation(caches, synthetic, tmp_path, workers):
    more = ["--mode", "relift", "--bev-augment", "--cache", str(caches["lossless"])]
    distill(flags(synthetic, tmp_path / "run", *more, "--workers", workers))
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_augmentation_without_the_mode_is_refused(caches, synthetic, tmp_path):
    with pytest.raises(UsageError, match="--mode relift"):
        distill(
            flags(synthetic, tmp_path / "x", "--bev-augment", "--cache", str(caches["lossless"]))
        )


def test_an_unfinished_cache_teaches_with_what_it_has(caches, synthetic, tmp_path):
    """One shard's record is taken away, as if its build had not come so far."""
    cache = shutil.copytree(caches["lossless"], tmp_path / "c.zarr")
    export(cache, tmp_path / "two.zarr", preset="lossless", shard_frames=2, quiet=True)
    cache = tmp_path / "two.zarr"
    lost = CacheReader(cache).tokens[2:4]
    (cache / "commits" / "00001.json").unlink()
    more = ["--cache", str(cache)]
    with pytest.raises(UsageError, match="not finished"):
        distill(flags(synthetic, tmp_path / "no", *more))
    distill(flags(synthetic, tmp_path / "run", *more, "--partial"))
    assert (tmp_path / "run" / "missing_frames.txt").read_text().split() == list(lost)
    source = CachedExpert(cache, partial=True)
    assert set(source.present) == set(source.reader.tokens) - set(lost)
    assert source.ids["frames"] in (tmp_path / "run" / "run.json").read_text()
    assert "frames" not in CachedExpert(caches["lossless"]).ids


def test_live_and_cached_give_the_same_losses(caches, expert, synthetic, tmp_path):
    checkpoints.save(tmp_path / "expert.safetensors", expert, {})
    same = ["--mode", "relift", "--bev-augment", "--log-steps", "1"]
    live = ["--source", "live", "--expert", "bevdepth-tiny-h", "--expert-checkpoint"]
    distill(flags(synthetic, tmp_path / "live", *same, *live, str(tmp_path / "expert.safetensors")))
    distill(flags(synthetic, tmp_path / "cached", *same, "--cache", str(caches["lossless"])))
    one, other = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("live", "cached")
    )
    assert len(one) == len(other) == 2
    for mine, theirs in zip(one, other, strict=True):
        assert mine["l2"] == pytest.approx(theirs["l2"], rel=1e-3)
