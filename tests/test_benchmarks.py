"""Benchmarks run to their end and check what they time; how long it took is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import made_cache

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


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
    names = {name for name in found["bytes_a_frame"] if "HDF5" not in name and "LMDB" not in name}
    assert len(names) == 12 and found["bytes_a_frame"]["cache balanced"] < 6 * 40 * 40 * 2
    for target in found["targets"].values():
        assert names <= set(target["times"]["warm"]) and names <= set(target["times"]["cold"])
        assert target["difference"]["cache lossless"] == 0 < target["difference"]["cache balanced"]
    assert not list((tmp_path / "work").iterdir()), "the stores were left behind"
