"""`fd3d-cache plan`: arithmetic on measured frames."""

import json
import math

import pytest

from cache_tools.cli import main
from cache_tools.plan import Measured, MeasuredPreset, cost, suggest
from cache_tools.presets import PRESETS


def preset(size, **changes):
    values = {
        "bytes": {"bev": size, "detections": 100.0},
        "arrays": 4,
        "encode_s": 0.2,
        "write_s": 0.1,
        "read_s": 0.05,
        "relift_s": None,
        "errors": {"bev": (0.01, 0.02)},
        "over_budget": 0,
    }
    return MeasuredPreset(**{**values, **changes})


def measured(**presets):
    return Measured(frames=8, load_s=0.1, expert_s=0.5, raw_bytes=5000, presets=presets)


def plan(found, name, **changes):
    return cost(found, name, **{"frames": 100, "shard_frames": 16, "epochs": 10, **changes})


def test_the_arithmetic():
    found = plan(measured(tiny=preset(900.0)), "tiny", free_bytes=100_000)
    assert found.bytes == 100_000 and found.fits
    assert found.files == 7 * 5 + 4 + 6
    assert found.build_hours == pytest.approx(100 * 0.6 / 3600)
    assert found.writer_bytes == 16_000 and found.worker_bytes == 7500
    assert found.epochs_to_win == pytest.approx(0.6 / 0.45)
    assert found.students_to_win == pytest.approx(0.6 / 4.5)
    assert plan(measured(tiny=preset(901.0)), "tiny", free_bytes=100_000).fits is False
    assert plan(measured(tiny=preset(900.0)), "tiny").fits is None


def test_encoding_that_is_slower_than_the_expert_is_what_a_build_takes():
    found = plan(measured(fast=preset(10.0, encode_s=0.9)), "fast")
    assert found.build_hours == pytest.approx(100 * 1.0 / 3600)


def test_lift_pays_for_the_splat_in_every_step():
    found = plan(measured(tiny=preset(900.0, relift_s=0.2)), "tiny")
    assert found.epochs_to_win == pytest.approx(0.6 / 0.25)
    assert plan(measured(tiny=preset(900.0, relift_s=0.5)), "tiny").epochs_to_win == math.inf


def test_the_smallest_that_keeps_its_budget_and_fits():
    found = measured(
        lossless=preset(4000.0),
        balanced=preset(1000.0),
        tiny=preset(500.0, over_budget=1),
        focal=preset(100.0),
    )
    costs = {name: plan(found, name) for name in found.presets}
    assert suggest(found, costs) == "balanced"
    assert suggest(found, {name: plan(found, name, free_bytes=1) for name in costs}) is None


@pytest.mark.parametrize("signals", ["bev,detections", "bev,lift"])
def test_a_plan_of_a_split(synthetic, tmp_path, capsys, signals):
    words = f"--expert bevdepth-tiny-h --init-seed 0 --version {synthetic.version} --split val "
    words += f"--workers 0 --frames 2 --signals {signals} --dataroot {synthetic.dataroot}"
    out = tmp_path / "c.zarr"
    assert main(["plan", *words.split(), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["costs"]) == set(PRESETS) and found["frames"] == 5
    sizes = {name: one["bytes"] for name, one in found["costs"].items()}
    assert sizes["tiny"] < sizes["balanced"] < sizes["fast"] < sizes["lossless"]
    assert found["suggested"] == "tiny" and not out.exists()
    relift = found["measured"]["presets"]["tiny"]["relift_s"]
    assert (relift is not None) == ("lift" in signals)
    assert main(["plan", *words.split()]) == 0
    assert "suggested: --preset tiny" in capsys.readouterr().out
    assert main(["plan", *words.split(), "--epochs", "0"]) == 2
