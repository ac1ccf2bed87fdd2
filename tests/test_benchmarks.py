"""Benchmarks run to their end and check what they time; how long it took is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import made_cache
import pytest
import torch

from cache_tools.presets import PRESETS
from fd3d import models
from fd3d.models import checkpoints
from recipes.distillers import NAMES

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# Stores whose packages may not be installed.
OPTIONAL = ("HDF5", "LMDB", "WebDataset")


def test_reading_is_timed_for_every_store(tmp_path):
    made_cache.build(tmp_path / "c.zarr")
    command = [sys.executable, str(BENCHMARKS / "cache_read.py"), "--tiny", "c.zarr"]
    subprocess.run(
        [*command, "--rounds", "2", "--work", "work", "--out", "found.json"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    found = json.loads((tmp_path / "found.json").read_text())["sizes"]["tiny"]
    assert found["shape"] == [6, 40, 40] and set(found["targets"]) == {"20", "40"}
    names = {name for name in found["bytes_a_frame"] if name.split()[0] not in OPTIONAL}
    assert len(names) == 13 and found["bytes_a_frame"]["cache balanced"] < 6 * 40 * 40 * 2
    for target in found["targets"].values():
        assert names <= set(target["times"]["warm"]) and names <= set(target["times"]["cold"])
        assert target["difference"]["cache lossless"] == 0 < target["difference"]["cache balanced"]
    assert not list((tmp_path / "work").iterdir()), "the stores were left behind"


def test_bytes_are_counted_for_every_store(tmp_path):
    made_cache.build(tmp_path / "c.zarr", frames=20)
    command = [sys.executable, str(BENCHMARKS / "cache_size.py"), "--tiny", "c.zarr"]
    subprocess.run(
        [*command, "--work", "work", "--out", "found.json"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    found = json.loads((tmp_path / "found.json").read_text())["sizes"]["tiny"]
    assert (found["shape"], found["frames"]) == ([6, 40, 40], 20)
    rows = found["stores"]
    assert len([name for name in rows if name.split()[0].strip(",") not in OPTIONAL]) == 10
    assert {f"cache {preset}" for preset in PRESETS} < set(rows)
    for name, row in rows.items():
        lossy = name.startswith("cache") and name != "cache lossless"
        assert (row["error_mean"] > 0) == lossy, name
        assert (row["cells_kept"] < 1) == (name == "cache focal"), name
        assert row["train_gb"] == round(row["bytes_a_frame"] * 28130 / 1e9, 1)
    assert rows["cache tiny"]["of_raw"] < rows["cache lossless"]["of_raw"]
    assert not list((tmp_path / "work").iterdir()), "the stores were left behind"


def test_builds_are_timed_against_bare_inference(synthetic, tmp_path):
    command = [sys.executable, str(BENCHMARKS / "cache_build.py"), "--tiny", synthetic.dataroot]
    subprocess.run(
        [*command, "--frames", "3", "--rounds", "2", "--work", "work", "--out", "found.json"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    sizes = json.loads((tmp_path / "found.json").read_text())["sizes"]
    assert list(sizes) == ["tiny, all cores", "tiny, one core", "tiny, another device"]
    for found in sizes.values():
        assert list(found["times"]) == ["bare", *PRESETS, "balanced, in turn"]
        for name, row in found["times"].items():
            assert row["median_ms"] > 0 and row["stages_ms"]["expert"] > 0
            assert (row["stages_ms"]["encode"] > 0) == (name != "bare")
    assert not list((tmp_path / "work").iterdir()), "a cache was left behind"


def test_a_steps_cost_is_told_by_parts(synthetic, tmp_path):
    torch.manual_seed(0)
    checkpoints.save(tmp_path / "e.safetensors", models.build("bevdepth-tiny-h"), {})
    command = [sys.executable, str(BENCHMARKS / "cost.py"), "--dataroot", synthetic.dataroot]
    subprocess.run(
        [*command, "--checkpoint", "e.safetensors", "--rounds", "3", "--out", "found.json"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    found = json.loads((tmp_path / "found.json").read_text())
    steps = found["tiny"]["steps"]
    expert = {name: parts["expert"]["median_ms"] for name, parts in steps.items()}
    # A network's work against none: safe on any machine.
    assert expert["none"] < expert["live, l2"] and expert["bev, l2"] < expert["live, l2"]
    assert {len(parts) for parts in steps.values()} == {5}
    caches = found["tiny"]["caches"]
    assert all(
        row["bytes_a_frame"] > 1000 and row["build_ms_a_frame"] > 0 for row in caches.values()
    )
    saved = (expert["live, l2"] - expert["bev, l2"]) / 2
    wins = caches["bev"]["build_ms_a_frame"] / saved
    assert caches["bev"]["epochs_to_win"] == pytest.approx(wins, rel=0.02)
    counted = found["full"]["giga_multiply_adds"]
    # The forward passes are those of the paper's table, but for its way of counting norms.
    assert counted["apprentice"] / 3 == pytest.approx(322, rel=0.02)
    assert counted["expert, live"] == pytest.approx(1289, rel=0.02)
    assert all(counted[f"distiller, {name}"] > 0 for name in NAMES[1:] if name != "response")
    assert 0 == counted["expert, bev"] < counted["expert, lift"] < counted["expert, live"]
