"""Modes replay and regate: the expert sees the world as the apprentice's augmentation moves it."""

import json

import numpy as np
import pytest
import torch

from cache_tools.cli import main as cache_cli
from cache_tools.codecs import error_of
from cache_tools.reader import CacheReader
from cache_tools.source import CachedExpert
from fd3d import models
from fd3d.augment import replayed
from fd3d.data.batch import collate
from fd3d.data.frames import FrameDataset
from fd3d.distill import replay
from fd3d.distill.handover import Handover, PairedFrames, collate_pairs
from fd3d.distill.live import LiveSource
from fd3d.distill.signals import LiveExpert, signals_of
from fd3d.errors import UsageError
from fd3d.models import checkpoints
from recipes import distill_bevdepth

EXPERT, SEED, DRAWS = "bevdepth-tiny-h", 6, 3


@pytest.fixture(scope="module")
def expert():
    torch.manual_seed(SEED)
    return models.build(EXPERT).eval()


@pytest.fixture(scope="module")
def cache(synthetic, tmp_path_factory):
    out = tmp_path_factory.mktemp("replay") / "cache.zarr"
    assert build(synthetic, out, "--signals", "bev,replay", "--replays", str(DRAWS)) == 0
    return out


def build(synthetic, out, *more):
    words = f"build --expert {EXPERT} --init-seed {SEED} --version {synthetic.version} "
    words += "--workers 0 --split val --batch 2"
    paths = ["--dataroot", str(synthetic.dataroot), "--out", str(out)]
    return cache_cli([*words.split(), *paths, *more])


def dataset(synthetic, image, **options):
    index = synthetic.open()
    return FrameDataset(
        index=index, positions=index.split("val"), image=image, truth=False, **options
    )


@pytest.fixture(scope="module")
def apprentice_frames(synthetic):
    image = models.build("bevdepth-tiny-l").image
    frames = dataset(synthetic, image, bev_augment=True, pictures=False)
    frames.replays = DRAWS
    return frames


def test_the_cache_holds_what_the_expert_says_of_each_augmented_frame(
    cache, expert, synthetic, apprentice_frames
):
    """Against the network on a data set that augments by itself, not through `augmented`."""
    source = CachedExpert(cache, mode="replay")
    assert source.replays == DRAWS and source.specs["bev"].shape == (64, 64, 64)
    views = dataset(synthetic, expert.image, bev_augment=True)
    views.replays = DRAWS
    met = set()
    for epoch in range(4):
        apprentice_frames.set_epoch(epoch)
        views.set_epoch(epoch)
        for row, token in enumerate(views.tokens[:2]):
            frame = apprentice_frames[row]
            with torch.no_grad():
                wanted = expert(views[row]).bev[0].numpy()
            found = source.load(token, frame)["bev"].astype(np.float32)
            # Points on a cell's edge fall to either side by how a matrix was rounded.
            assert error_of(wanted, found).frame < 0.01
            stored = source.reader.read(token, (replay.AUGMENT,))[replay.AUGMENT]
            met.add(replay.number_of(stored, frame))
    assert met == set(range(DRAWS))


def test_augmentations_are_the_frames_own_and_the_same_in_every_process(apprentice_frames):
    one, other = apprentice_frames.tokens[:2]
    draws = [replayed(token, number) for token in (one, other) for number in range(DRAWS)]
    assert len(set(draws)) == 2 * DRAWS and draws[1] == replayed(one, 1)
    # Pinned: a cache that was built yesterday must still fit.
    assert replayed("a-frame", 0).rotate == pytest.approx(0.231055, abs=1e-6)


def test_an_augmentation_that_the_cache_does_not_have_is_refused(cache, apprentice_frames):
    source = CachedExpert(cache, mode="replay")
    foreign = dataset_with_any_augmentation(apprentice_frames)
    with pytest.raises(UsageError, match="does not replay"):
        source.load(foreign.tokens[0], foreign[0])
    with pytest.raises(UsageError, match="view of a frame"):
        source.load(foreign.tokens[0])


def dataset_with_any_augmentation(frames):
    return FrameDataset(
        index=frames.index,
        positions=frames.positions,
        image=frames.image,
        truth=False,
        bev_augment=True,
        pictures=False,
    )


def test_signals_that_stay_behind_are_refused(cache, expert):
    for mode in ("replay", "regate"):
        with pytest.raises(UsageError, match="do not follow"):
            LiveExpert(model=expert, names=("bev", "heatmap"), mode=mode)
    with pytest.raises(UsageError, match="do not follow"):
        CachedExpert(cache, names=("bev", "detections"), mode="replay")
    with pytest.raises(UsageError, match="do not follow"):
        LiveExpert(model=expert, names=("lift", "heatmap"), mode="relift")
    with pytest.raises(UsageError, match="no cache can hold"):
        CachedExpert(cache, mode="regate")


def test_a_cache_without_the_signal_is_refused(synthetic, tmp_path):
    assert build(synthetic, tmp_path / "c.zarr", "--signals", "bev") == 0
    with pytest.raises(UsageError, match="replay"):
        CachedExpert(tmp_path / "c.zarr", mode="replay")


@pytest.mark.parametrize(
    "words",
    [
        ("--signals", "bev,replay"),
        ("--signals", "bev", "--replays", "2"),
        ("--signals", "replay", "--replays", "1000"),
        ("--signals", "replay", "--replays", "2", "--preset", "focal"),
    ],
)
def test_builds_that_make_no_sense_are_refused(synthetic, tmp_path, words, capsys):
    assert build(synthetic, tmp_path / "c.zarr", *words) == 2
    assert "error:" in capsys.readouterr().err and not (tmp_path / "c.zarr").exists()


def test_the_signal_has_one_name(cache, synthetic, capsys):
    reader = CacheReader(cache)
    assert signals_of(reader.specs) == ("bev", "replay")
    assert replay.count_of(reader.specs) == DRAWS
    words = ["verify", str(cache), "--rerun", "2", "--init-seed", str(SEED)]
    assert cache_cli([*words, "--dataroot", str(synthetic.dataroot)]) == 0


def test_an_export_keeps_every_augmentation(cache, tmp_path, capsys):
    small = tmp_path / "small.zarr"
    assert cache_cli(["export", str(cache), str(small), "--signals", "replay"]) == 0
    one, other = CacheReader(cache), CacheReader(small)
    assert replay.count_of(other.specs) == DRAWS and "bev" not in other.specs
    token = one.tokens[1]
    names = tuple(other.specs)
    for name, value in other.read(token, names).items():
        assert np.array_equal(value, one.read(token, (name,))[name]), name
    both = CachedExpert(cache, names=("bev", "replay"))
    assert set(both.specs) == set(one.specs)
    capsys.readouterr()
    assert cache_cli(["info", str(small)]) == 0
    assert "--mode replay --bev-augment" in capsys.readouterr().out


def distil(synthetic, out, *more):
    words = f"--model bevdepth-tiny-l --version {synthetic.version} --split val --batch 2 --cpu "
    words += "--steps 4 --distiller l2 --log-steps 1 --bev-augment --workers 0"
    paths = ["--dataroot", str(synthetic.dataroot), "--out", str(out)]
    distill_bevdepth.main(distill_bevdepth.parse([*words.split(), *paths, *more]))
    return [json.loads(line)["l2"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def live(expert, tmp_path_factory):
    path = tmp_path_factory.mktemp("expert") / "e.safetensors"
    checkpoints.save(path, expert, {})
    return ["--source", "live", "--expert", EXPERT, "--expert-checkpoint", str(path)]


def test_live_and_cached_agree(cache, live, synthetic, tmp_path):
    words = ["--mode", "replay"]
    cached = distil(synthetic, tmp_path / "cached", *words, "--cache", str(cache))
    running = distil(synthetic, tmp_path / "live", *words, *live, "--replays", str(DRAWS))
    assert cached[:2] == pytest.approx(running[:2], rel=1e-3)
    told = json.loads((tmp_path / "cached" / "run.json").read_text())["identity"]
    assert told["mode"] == "replay" and told["replays"] == DRAWS


def test_a_live_expert_sees_the_world_as_the_apprentice_s_augmentation_moves_it(expert, synthetic):
    """Against the network on a data set that augments by itself."""
    image = models.build("bevdepth-tiny-l").image
    frames = dataset(synthetic, image, bev_augment=True, pictures=False)
    views = dataset(synthetic, expert.image, bev_augment=True)
    source = LiveSource(
        expert=LiveExpert(model=expert, mode="regate"),
        frames=dataset(synthetic, expert.image),
        ids={},
    )
    token = frames.tokens[0]
    found = source.signals([source.load(token, frames[0])], "cpu")["bev"][0].numpy()
    with torch.no_grad():
        wanted = expert(views[0]).bev[0].numpy()
        clean = expert(dataset(synthetic, expert.image)[0]).bev[0].numpy()
    assert error_of(wanted, found).frame < 0.01 < 0.1 < error_of(clean, found).frame
    with pytest.raises(UsageError, match="apprentice's view"):
        source.load(token)


def test_an_apprentice_in_the_ego_frame_is_refused(cache, live, synthetic, tmp_path):
    """Its augmentation moves another frame than the expert's."""
    with pytest.raises(UsageError, match="augmented in the ego frame"):
        distil(synthetic, tmp_path / "a", "--mode", "regate", *live, "--model", "bevdet-r50")


def test_a_live_expert_regates_any_augmentation(live, synthetic, tmp_path):
    losses = distil(synthetic, tmp_path / "run", "--mode", "regate", *live)
    assert len(losses) == 4 and np.isfinite(losses).all()


def test_flags_that_contradict_the_mode_are_refused(cache, live, synthetic, tmp_path):
    with pytest.raises(UsageError, match="no cache can hold"):
        distil(synthetic, tmp_path / "a", "--mode", "regate", "--cache", str(cache))
    with pytest.raises(UsageError, match="--replays"):
        distil(synthetic, tmp_path / "b", "--mode", "regate", *live, "--replays", "2")
    with pytest.raises(UsageError, match="--replays"):
        distil(synthetic, tmp_path / "c", "--mode", "replay", *live)


def test_batches_travel_through_workers(cache, apprentice_frames):
    source = CachedExpert(cache, mode="replay")
    handover = Handover(source=source, frames=2, workers=1)
    loader = torch.utils.data.DataLoader(
        PairedFrames(frames=apprentice_frames, load=handover.load),
        batch_size=2,
        num_workers=1,
        collate_fn=collate_pairs,
    )
    apprentice_frames.set_epoch(0)
    for batch, loaded in loader:
        found = handover.signals(loaded, batch)["bev"]
        wanted = [
            source.load(token, collate([one]))["bev"]
            for token, one in zip(
                batch.tokens,
                [apprentice_frames[apprentice_frames.tokens.index(t)] for t in batch.tokens],
                strict=True,
            )
        ]
        assert np.array_equal(found.numpy(), np.stack(wanted).astype(np.float32))
