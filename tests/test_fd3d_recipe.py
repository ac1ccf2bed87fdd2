"""FD3D as a user trains with it: live and cached, with a head of its own or a trained one, one
cache for several apprentices, and on several processes of which one sees no box."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch

from cache_tools import lease
from cache_tools.cli import main as cache_cli
from cache_tools.parts import Part
from fd3d import models
from fd3d.data.batch import collate
from fd3d.data.frames import FrameDataset
from fd3d.data.index import FrameIndex
from fd3d.distill.head_file import load_head
from fd3d.distill.signals import LiveExpert
from fd3d.distill.trainee import Trainee
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid
from fd3d.models import checkpoints
from fd3d.models.bevdepth.config import BEVDepthConfig
from recipes import distill_bevdepth, train_head
from recipes.distillers import NAMES, weights_of

EXPERT, APPRENTICE = "bevdepth-tiny-h", "bevdepth-tiny-l"
ALL = "gen_bev,gen_pv,focal"


@pytest.fixture(scope="module")
def made(synthetic, tmp_path_factory):
    """An expert's checkpoint, and its lossless cache of the training split."""
    folder = tmp_path_factory.mktemp("fd3d")
    torch.manual_seed(6)
    checkpoints.save(folder / "expert.safetensors", models.build(EXPERT), {})
    words = f"build --expert {EXPERT} --version {synthetic.version} --workers 0 --split train "
    words += "--signals bev,detections,heatmap,pv --preset lossless --batch 2"
    paths = {"checkpoint": folder / "expert.safetensors", "dataroot": synthetic.dataroot}
    paths["out"] = folder / "cache.zarr"
    flags = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    assert cache_cli([*words.split(), *flags]) == 0
    return folder


def common(synthetic, out, steps=3):
    words = f"--version {synthetic.version} --batch 2 --workers 0 --cpu --lr 1e-3 --log-steps 1 "
    words += f"--warmup 2 --steps {steps}"
    return [*words.split(), "--dataroot", str(synthetic.dataroot), "--out", str(out)]


def distil(synthetic, out, *more, model=APPRENTICE, steps=3):
    words = ["--model", model, "--distiller", "fd3d", *common(synthetic, out, steps), *more]
    distill_bevdepth.main(distill_bevdepth.parse(words))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def live_and_cached(made, synthetic, folder, steps, *more):
    """The logs of two runs that differ in their source alone."""
    live = ["--source", "live", "--expert", EXPERT, "--expert-checkpoint"]
    return (
        distil(
            synthetic,
            folder / "live",
            *more,
            *live,
            str(made / "expert.safetensors"),
            steps=steps,
        ),
        distil(
            synthetic, folder / "cached", *more, "--cache", str(made / "cache.zarr"), steps=steps
        ),
    )


def apart(one: list[dict], other: list[dict]) -> float:
    """The largest relative difference of any term at any step."""
    assert len(one) == len(other)
    names = set(one[0]) - {"seconds", "wait"}
    return max(
        abs(mine[name] - theirs[name]) / max(abs(theirs[name]), 1e-3)
        for mine, theirs in zip(one, other, strict=True)
        for name in names
    )


@pytest.mark.parametrize("areas", ["head", "expert"])
def test_live_and_cached_runs_begin_alike(made, synthetic, tmp_path, areas):
    """Two runs of the recipe. Later steps cannot be compared so: sums in another order, which the
    libraries below torch choose by where memory lies, grow a hundredfold in each step."""
    words = ["--terms", ALL, "--areas", areas, "--min-score", "0"]
    runs = live_and_cached(made, synthetic, tmp_path, 3, *words)
    assert {"gen_bev", "gen_pv", "focal", "head.class", "head.box"} <= set(runs[0][0])
    assert all(line["gen_bev"] > 0 < line["gen_pv"] for line in runs[0])
    assert len(runs[0]) == 3 and apart(*runs) < 1e-3


@pytest.mark.parametrize("steps", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_live_and_cached_give_the_same_terms_at_every_step(made, synthetic, tmp_path, steps):
    """One training; at each step its terms from either source, with equal weights and masks."""
    words = ["--model", APPRENTICE, "--distiller", "fd3d", "--terms", ALL, "--min-score", "0"]
    words += common(synthetic, tmp_path, steps)
    live = ["--source", "live", "--expert", EXPERT, "--expert-checkpoint"]
    args = {
        "cached": distill_bevdepth.parse([*words, "--cache", str(made / "cache.zarr")]),
        "live": distill_bevdepth.parse([*words, *live, str(made / "expert.safetensors")]),
    }
    index = FrameIndex.open(dataroot=synthetic.dataroot, version=synthetic.version)
    sources = {name: distill_bevdepth.make_source(args[name], index) for name in ("live", "cached")}
    torch.manual_seed(0)
    model = models.build(APPRENTICE)
    cached = sources["cached"]
    planes = distill_bevdepth.image_planes(args["cached"], model, cached)
    distiller = distill_bevdepth.make_distiller(args["cached"], model, cached, cached, planes)
    trainee = Trainee(model, distiller)
    frames = FrameDataset(
        index=index, positions=index.split("train"), image=model.image, truth=True
    )
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=1e-3)
    items = [frames[row] for row in range(len(frames))]
    for step in range(steps):
        batch = collate([items[(2 * step + row) % len(items)] for row in range(2)])
        outputs = trainee.model(batch)
        terms = {}
        for name, source in sources.items():
            signals = source.signals([source.load(token) for token in batch.tokens], "cpu")
            torch.manual_seed(step)
            # A copy, as batch norms learn from being asked.
            asked = trainee.distiller if name == "cached" else copy.deepcopy(trainee.distiller)
            terms[name] = asked(outputs, signals, batch)
        for name, value in terms["cached"].items():
            other = float(terms["live"][name].detach())
            assert float(value.detach()) == pytest.approx(other, rel=1e-3), (step, name)
        loss = sum(model.loss(outputs, batch).values()) + sum(terms["cached"].values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_what_a_cache_lacks_comes_from_the_live_expert(made, synthetic, tmp_path):
    """With a third of the shards gone the steps are those of the whole cache."""
    torn = tmp_path / "torn.zarr"
    words = ["export", str(made / "cache.zarr"), str(torn), "--shard-frames", "1"]
    assert cache_cli(words) == 0
    records = sorted((torn / "commits").iterdir())
    for record in records[::3]:
        record.unlink()
    expert = ["--expert", EXPERT, "--expert-checkpoint", str(made / "expert.safetensors")]
    flags = ["--terms", ALL, "--areas", "expert"]
    mixed = distil(
        *(synthetic, tmp_path / "mixed", *flags, *expert, "--source", "hybrid"),
        *("--cache", str(torn)),
    )
    whole = distil(synthetic, tmp_path / "whole", *flags, "--cache", str(made / "cache.zarr"))
    assert len(mixed) == 3 and apart(mixed, whole) < 1e-3
    other = tmp_path / "other.safetensors"
    checkpoints.save(other, models.build(EXPERT), {})
    with pytest.raises(UsageError, match="checkpoint that the cache was built with"):
        distil(
            *(synthetic, tmp_path / "no", "--source", "hybrid", "--cache", str(torn)),
            *("--expert", EXPERT, "--expert-checkpoint", str(other)),
        )


def test_a_head_is_trained_once_and_serves_apprentices(made, synthetic, tmp_path, capsys):
    cache = str(made / "cache.zarr")
    words = ["--cache", cache, *common(synthetic, tmp_path / "head", 6)]
    train_head.main(train_head.parse(words))
    head = tmp_path / "head" / "model.safetensors"
    assert str(head) in capsys.readouterr().out
    log = distil(synthetic, tmp_path / "run", "--head", str(head), "--cache", cache)
    assert "gen_bev" in log[0] and "head.class" not in log[0]
    exported = checkpoints.read_weights(tmp_path / "run" / "model.safetensors")[1]
    assert set(exported) == set(models.build(APPRENTICE).state_dict()), "the apprentice alone"
    grid = models.build(EXPERT).grid
    with pytest.raises(UsageError, match="trained on signals"):
        load_head(head, channels=64, grid=grid, signals_id="0" * 32)
    with pytest.raises(UsageError, match="trained on expert"):
        load_head(head, channels=64, grid=grid, expert="another")
    other = tmp_path / "other.safetensors"
    checkpoints.save(other, models.build(EXPERT), {})
    live = ["--source", "live", "--expert", EXPERT, "--expert-checkpoint", str(other)]
    with pytest.raises(UsageError, match="trained on expert"):
        distil(synthetic, tmp_path / "live", "--head", str(head), *live)
    with pytest.raises(UsageError, match="reads maps of 64 channels"):
        load_head(head, channels=32, grid=grid)
    with pytest.raises(UsageError, match="no distillation head"):
        load_head(made / "expert.safetensors", channels=64, grid=grid)


def test_a_head_that_learns_along_is_kept_and_scored(made, synthetic, tmp_path, capsys):
    val = tmp_path / "val.zarr"
    words = f"build --expert {EXPERT} --version {synthetic.version} --workers 0 --split val "
    words += "--signals bev --preset lossless "
    words += f"--checkpoint {made / 'expert.safetensors'} --dataroot {synthetic.dataroot}"
    assert cache_cli([*words.split(), "--out", str(val)]) == 0
    words = ["--cache", str(made / "cache.zarr"), "--terms", "focal", "--val-cache", str(val)]
    distil(synthetic, tmp_path / "run", *words, steps=2)
    assert "the head's own boxes on val: NDS" in capsys.readouterr().out
    scores = json.loads((tmp_path / "run" / "head_scores.json").read_text())
    assert 0 <= scores["nds"] <= 1
    head = str(tmp_path / "run" / "head.safetensors")
    words = ["--cache", str(made / "cache.zarr"), "--terms", "focal", "--head", head]
    log = distil(synthetic, tmp_path / "next", *words, steps=2)
    assert "head.class" not in log[0]
    with pytest.raises(UsageError, match="--val-cache"):
        distil(synthetic, tmp_path / "no", *words, "--val-cache", str(val))


@pytest.mark.parametrize("name", ["ego", "odd-grid", "wide-grid"])
def test_apprentices_of_other_frames_and_squares(made, synthetic, tmp_path, monkeypatch, name):
    """The map is brought to theirs, for the head as for them; a head for others does not fit."""
    grid = {
        "ego": BEVGrid.square(half_extent=25.6, cells=32, frame="ego"),
        "odd-grid": BEVGrid.square(half_extent=24.0, cells=40),
        "wide-grid": BEVGrid.square(half_extent=28.0, cells=40),
    }[name]
    config = models.build(APPRENTICE).config
    image = replace(config.image, frame=grid.frame)
    config = replace(config, name=name, grid=grid, image=image)
    monkeypatch.setitem(models.PRESETS, name, lambda: config)
    cache = ["--cache", str(made / "cache.zarr")]
    words = [*cache, "--model", name, *common(synthetic, tmp_path / "head", 2)]
    train_head.main(train_head.parse(words))
    head = ["--head", str(tmp_path / "head" / "model.safetensors")]
    log = distil(synthetic, tmp_path / "run", *cache, *head, "--areas", "gt", model=name)
    assert log[-1]["gen_bev"] > 0 < log[-1]["focal"]
    with pytest.raises(UsageError, match="for this apprentice"):
        distil(synthetic, tmp_path / "no", *cache, *head)


def test_gradients_of_terms_are_logged_and_change_nothing(made, synthetic, tmp_path):
    words = ["--cache", str(made / "cache.zarr"), "--areas", "gt"]
    plain = distil(synthetic, tmp_path / "plain", *words)
    told = distil(synthetic, tmp_path / "told", *words, "--log-gradients")
    assert apart(plain, [{n: line[n] for n in plain[0]} for line in told]) < 1e-3
    for line in told:
        assert line["grad.gen_bev"] > 0 < line["grad.focal"]
        # The head's own training does not reach the apprentice.
        assert line["grad.head.class"] == 0 == line["grad.head.box"]


def test_one_cache_teaches_three_apprentices_without_an_expert(
    made, synthetic, tmp_path, monkeypatch
):
    """Another grid, and another width and backbone; no expert is run."""
    calls = []
    monkeypatch.setattr(LiveExpert, "signals", lambda *args: calls.append(1))
    for name, config in others().items():
        monkeypatch.setitem(models.PRESETS, name, lambda config=config: config)
        log = distil(
            synthetic,
            tmp_path / name,
            *("--terms", "gen_bev", "--areas", "gt", "--cache", str(made / "cache.zarr")),
            model=name,
            steps=2,
        )
        assert log[-1]["step"] == 2 and log[-1]["gen_bev"] > 0
    assert not calls


def others() -> dict[str, BEVDepthConfig]:
    """The apprentice, one on the expert's own grid, and one of another width and backbone."""
    config = models.build(APPRENTICE).config
    return {
        APPRENTICE: config,
        "same-grid": replace(
            config, name="same-grid", grid=BEVGrid.square(half_extent=25.6, cells=64)
        ),
        "wider": replace(
            config,
            name="wider",
            bev_channels=96,
            neck=64,
            backbone=replace(config.backbone, widths=(48, 64, 128), blocks=(1, 2, 1)),
        ),
    }


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--terms", "gen"], "gen_bev"),
        (["--terms", "gen_pv"], "pv"),
        (["--areas", "gt", "--terms", "gen_bev", "--head", "x"], "--head"),
        (["--masked", "1.5"], "share below 1"),
        (["--head", "nowhere.safetensors"], "nowhere"),
        (["--distiller", "l2", "--head", "x"], "--distiller fd3d"),
        (["--distiller", "l2", "--doubt", "0.5"], "--doubt belongs to --distiller fd3d"),
        (["--distiller", "cwd", "--compare", "apprentice"], "--compare belongs"),
        (["--doubt", "2"], "doubt 2.0"),
        (["--distiller", "l2", "--pv"], "--pv belongs to --distiller heatmap"),
        (["--mode", "replay", "--bev-augment"], "--terms gen_bev,focal"),
        (["--terms", "focal", "--masked", "0.2"], "--masked is of the generation terms"),
        (["--min-score", "7"], "min_score 7.0"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(made, synthetic, tmp_path, flags, said):
    cache = made / "cache.zarr"
    if said == "pv":
        cache = tmp_path / "bev.zarr"
        words = ["export", str(made / "cache.zarr"), str(cache), "--signals", "bev"]
        assert cache_cli(words) == 0
    with pytest.raises(UsageError, match=said):
        distil(synthetic, tmp_path / "run", "--cache", str(cache), *flags)


@pytest.mark.parametrize(
    "words",
    [[name] for name in NAMES if name not in ("none", "fd3d")] + [["heatmap", "--pv"]],
    ids=" ".join,
)
def test_every_other_distiller_trains_by_name(made, synthetic, tmp_path, words):
    words = ["--cache", str(made / "cache.zarr"), "--distiller", *words]
    log = distil(synthetic, tmp_path / "run", *words, steps=2)
    where = ["--model", APPRENTICE, *common(synthetic, tmp_path / "run", 2)]
    assert set(weights_of(distill_bevdepth.parse([*where, *words]))) <= set(log[0])


def test_a_run_goes_on_with_the_settings_that_it_began_with(made, synthetic, tmp_path):
    words = ["--cache", str(made / "cache.zarr"), "--terms", "gen_bev", "--areas", "gt"]
    distil(synthetic, tmp_path / "run", *words, "--max-steps", "1")
    with pytest.raises(UsageError, match="fd3d.masked 0.5.*fd3d.masked 0.25"):
        distil(synthetic, tmp_path / "run", *words, "--resume", "--masked", "0.25")
    # This process still holds the lock of the run.
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    log = distil(synthetic, tmp_path / "again", *words, "--resume")
    assert [line["step"] for line in log] == [1, 2, 3]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (["--distiller", "heatmap", "--standardise"], ["--distiller", "heatmap"]),
        (["--distiller", "l2"], ["--distiller", "l2", "--compare", "apprentice"]),
        (["--distiller", "l2"], ["--distiller", "l2", "--batch", "1"]),
        (["--distiller", "l2"], ["--distiller", "l2", "--lr", "1e-4"]),
        (["--distiller", "l2"], ["--distiller", "l2", "--seed", "1"]),
        (
            ["--mode", "moved", "--bev-augment"],
            ["--mode", "moved", "--bev-augment", "--moved-flips"],
        ),
    ],
)
def test_a_run_does_not_go_on_with_another_loss(made, synthetic, tmp_path, first, then):
    cache = ["--cache", str(made / "cache.zarr")]
    distil(synthetic, tmp_path / "run", *cache, *first, "--max-steps", "1")
    with pytest.raises(UsageError, match="resum"):
        distil(synthetic, tmp_path / "run", *cache, *then, "--resume")


def test_flags_of_networks_are_not_those_of_a_head(made, synthetic, tmp_path, capsys):
    words = ["--cache", str(made / "cache.zarr"), *common(synthetic, tmp_path / "head")]
    with pytest.raises(SystemExit):
        train_head.parse([*words, "--cbgs"])
    assert "--cbgs" in capsys.readouterr().err
    with pytest.raises(UsageError, match="--head-lr"):
        distil(
            synthetic,
            tmp_path / "run",
            *words[:2],
            *("--head", str(tmp_path / "head.safetensors"), "--head-lr", "1e-3"),
        )


def test_processes_do_not_take_frames_from_a_cache_that_grows(
    made, synthetic, tmp_path, monkeypatch
):
    cache = tmp_path / "c.zarr"
    shutil.copytree(made / "cache.zarr", cache)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        lease.held(cache, Part(number=1, of=2)),
        pytest.raises(UsageError, match="one process"),
    ):
        distil(synthetic, tmp_path / "run", "--cache", str(cache), "--partial")
