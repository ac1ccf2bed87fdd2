"""Asking an expert again: `probe`, the pilot before a build, `verify --rerun` and `--nds`."""

import json

import numpy as np
import pytest

from cache_tools import pilot
from cache_tools.cli import main
from cache_tools.expert import prepare
from cache_tools.pilot import check_pilot, pilot_frames, run_pilot
from cache_tools.probe import AUGMENTATIONS, MODES, probe
from fd3d.data.synthetic import generate
from fd3d.errors import CheckFailed, UsageError


def run(synthetic, expert="bevdepth-tiny-h", preset="lossless", signals=("bev",)):
    return prepare(
        expert=expert,
        checkpoint=None,
        init_seed=2,
        dataroot=synthetic.dataroot,
        version=synthetic.version,
        split="val",
        signals=signals,
        preset=preset,
        workers=0,
    )


def words(synthetic, *more):
    flags = f"--expert bevdepth-tiny-h --init-seed 2 --version {synthetic.version} --split val"
    return [*flags.split(), "--dataroot", str(synthetic.dataroot), "--workers", "0", *more]


@pytest.fixture(scope="module")
def cache(synthetic, tmp_path_factory):
    out = tmp_path_factory.mktemp("rerun") / "c.zarr"
    more = ["--signals", "bev,lift,heatmap", "--preset", "balanced", "--out", str(out)]
    assert main(["build", *words(synthetic, *more)]) == 0
    return out


def test_relift_is_nearer_than_moving_or_nothing(synthetic):
    found = probe(run(synthetic), count=2)
    assert set(found) == set(AUGMENTATIONS) and all(set(m) == set(MODES) for m in found.values())
    for mode, cost in found["none"].items():
        assert cost.error < (0.01 if "balanced" in mode else 1e-5), mode
        assert cost.cosine > 0.9999
    for name in ("flip y", "flip x", "rotation 22.5 deg", "all"):
        costs = found[name]
        assert costs["relift"].error < min(costs["moved"].error, costs["clean"].error)
        assert costs["relift, balanced"].error < costs["moved"].error


def test_probe_on_the_command_line(synthetic, capsys):
    assert main(["probe", *words(synthetic, "--frames", "1", "--json")]) == 0
    found = json.loads(capsys.readouterr().out)["augmentations"]
    assert found["none"]["clean"]["error"] == 0
    assert main(["probe", *words(synthetic, "--frames", "1")]) == 0
    assert "rotation 10 deg   relift" in capsys.readouterr().out
    assert main(["probe", *words(synthetic, "--frames", "99")]) == 2
    assert "--frames 99 is not possible: use 1 to 5" in capsys.readouterr().err


def test_an_expert_in_the_ego_frame_has_no_modes(synthetic):
    with pytest.raises(UsageError, match="works in the ego frame"):
        probe(run(synthetic, "bevdet-r50"), count=1)


def test_the_pilot_finds_frames_over_the_budget(synthetic, monkeypatch):
    expert = run(synthetic, preset="balanced", signals=("bev", "heatmap"))
    sound = run_pilot(expert, preset="balanced", count=3)
    assert sound.over_budget == {"bev": (), "heatmap": ()}
    check_pilot(sound)

    def spiky(batch):
        value = np.random.default_rng(0).normal(size=(64, 64, 64)).astype(np.float32)
        value[:, 9, 9] = 120
        return {"bev": [value], "heatmap": [np.zeros((10, 64, 64), np.float32)]}

    monkeypatch.setattr(type(expert), "compute", lambda self, batch: spiky(batch))
    found = run_pilot(expert, preset="balanced", count=3)
    assert len(found.over_budget["bev"]) == 3
    with pytest.raises(CheckFailed, match="3 of 3 frames of the pilot.*balanced in bev.*fast"):
        check_pilot(found)


def test_a_build_that_fails_its_pilot_writes_nothing(synthetic, tmp_path, monkeypatch, capsys):
    out = tmp_path / "c.zarr"
    monkeypatch.setattr(pilot, "encode", lambda value, **_: ({"exact": value}, None))
    more = ["--signals", "bev", "--preset", "tiny", "--out", str(out), "--pilot", "2"]
    assert main(["build", *words(synthetic, *more)]) == 1
    assert "2 of 2 frames of the pilot" in capsys.readouterr().err
    assert not out.exists()
    assert main(["build", *words(synthetic, *more[:-1], "0")]) == 0


def test_how_many_frames_a_pilot_runs():
    assert pilot_frames(None, 28130) == 64
    assert pilot_frames(None, 120) == 6 and pilot_frames(None, 5) == 0
    assert pilot_frames(3, 5) == 3
    with pytest.raises(UsageError, match="--pilot 6 is not possible: use 0 to 5"):
        pilot_frames(6, 5)


def test_asking_the_expert_again(cache, synthetic, capsys):
    again = ["verify", str(cache), "--rerun", "2", "--dataroot", str(synthetic.dataroot), "--json"]
    assert main([*again, "--init-seed", "2"]) == 0
    found = json.loads(capsys.readouterr().out)["rerun"]
    assert found["ok"] and len(found["tokens"]) == 2
    assert 0.005 < found["worst"]["bev"] < 0.04
    assert main([*again, "--init-seed", "3"]) == 2
    assert "give those of the cache" in capsys.readouterr().err
    assert main(["verify", str(cache), "--rerun", "2", "--init-seed", "2"]) == 2
    assert "--dataroot" in capsys.readouterr().err


def test_float16_of_a_nearly_constant_channel_is_no_other_answer(synthetic, tmp_path, capsys):
    """A fresh expert's scores hardly vary: float16 is 1 to 2 % off, by the cache's own word."""
    out = tmp_path / "c.zarr"
    more = ["--signals", "bev,heatmap", "--preset", "lossless", "--out", str(out)]
    assert main(["build", *words(synthetic, *more)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["signals"]["heatmap"]["worst_error"] > 0.005
    again = ["verify", str(out), "--rerun", "2", "--dataroot", str(synthetic.dataroot)]
    assert main([*again, "--init-seed", "2"]) == 0


def test_what_cannot_be_asked_is_said_before_a_byte_is_read(
    cache, synthetic, tmp_path, monkeypatch, capsys
):
    def read(*_, **__):
        raise AssertionError("bytes were read first")

    monkeypatch.setattr("cache_tools.verbs.check.verify", read)
    other = tmp_path / "data"
    generate(out=other, scenes=1, val_scenes=1, frames=2, seed=9, width=64)
    verify = ["verify", str(cache), "--dataroot"]
    here = [*verify, str(synthetic.dataroot)]
    for flags, told in (
        ([*here, "--rerun", "1000", "--init-seed", "2"], "use 1 to"),
        ([*here, "--rerun", "1", "--init-seed", "3"], "those of the cache"),
        ([*verify, str(tmp_path / "no"), "--nds"], "no"),
        ([*verify, str(other), "--rerun", "1", "--init-seed", "2"], "has no frame"),
        ([*here, "--init-seed", "2"], "belong to --rerun"),
        (here, "belongs to --rerun and --nds"),
    ):
        assert main(flags) == 2, flags
        text = capsys.readouterr().err
        assert told in text and "Traceback" not in text


def test_few_frames_are_all_looked_at(synthetic, capsys):
    """The default of eight frames is more than the split has."""
    assert main(["plan", *words(synthetic, "--signals", "bev"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measured"]["frames"] == 5


def test_a_cache_that_is_not_what_the_expert_says_fails(cache, synthetic, monkeypatch, capsys):
    from cache_tools import rerun as module

    monkeypatch.setattr(module, "_SLACK", -0.04)
    flags = ["--rerun", "1", "--dataroot", str(synthetic.dataroot), "--init-seed", "2"]
    assert main(["verify", str(cache), *flags]) == 1
    assert "does not hold what its expert says now" in capsys.readouterr().err


def test_the_boxes_of_a_cache_are_scored(cache, synthetic, capsys):
    assert main(["verify", str(cache), "--nds", "--dataroot", str(synthetic.dataroot)]) == 0
    assert "boxes read from bev: NDS" in capsys.readouterr().out
