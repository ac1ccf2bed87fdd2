"""The writer for old environments: alone, interrupted, and as its documentation uses it."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import made_cache
import numpy as np
import pytest
import torch
from made_signals import FRAMES, about

from cache_tools import foreign_writer
from cache_tools.cli import main
from cache_tools.importing import import_signals
from cache_tools.reader import CacheReader
from fd3d.errors import UsageError

# As it is used: loaded by path in a Python that does not see this project.
LOOP = """
import importlib.util, json, sys, numpy as np
path, folder, until = sys.argv[1:]
spec = importlib.util.spec_from_file_location("foreign_writer", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert not {"fd3d", "cache_tools", "torch"} & set(sys.modules)
about = json.loads(sys.stdin.read())
writer = module.SignalsWriter(folder, about["identity"], about["signals"])
ran = 0
for number, key in enumerate(about["frames"]):
    if writer.has(key):
        continue
    if ran == int(until):
        sys.exit(3)
    draw = np.random.RandomState(number)
    writer.add(
        key,
        bev=draw.randn(6, 40, 40),
        heatmap=draw.rand(3, 40, 40),
        detections=draw.rand(number, 11),
    )
    ran += 1
writer.finish(about["frames"])
print(ran)
"""


def run_writer(folder: Path, until: int) -> subprocess.CompletedProcess:
    words = [sys.executable, "-I", "-c", LOOP, foreign_writer.__file__, str(folder), str(until)]
    return subprocess.run(words, input=json.dumps(about()), capture_output=True, text=True)


def test_the_writer_alone_and_its_signals(tmp_path):
    folder, out = tmp_path / "signals", tmp_path / "c.zarr"
    assert run_writer(folder, until=3).returncode == 3
    with pytest.raises(UsageError, match="a writer writes last"):
        import_signals(folder, out, quiet=True)
    done = run_writer(folder, until=99)
    assert done.stdout.strip() == str(FRAMES - 3), done.stderr
    report = import_signals(folder, out, quiet=True)
    reader = CacheReader(out)
    assert report.complete and reader.manifest.identity == made_cache.IDENTITY
    for number, token in enumerate(reader.tokens):
        draw = np.random.RandomState(number)
        found = reader.read(token)
        np.testing.assert_array_equal(found["bev"], draw.randn(6, 40, 40).astype(np.float16))
        draw.rand(3, 40, 40)
        np.testing.assert_array_equal(found["detections"], draw.rand(number, 11).astype("f4"))


def test_the_writer_is_short_and_old_fashioned():
    source = Path(foreign_writer.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 6))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert imported == {"json", "os", "numpy"} and len(source.splitlines()) <= 52
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))


def test_the_writer_refuses_what_the_import_would(tmp_path):
    described = about()
    make = foreign_writer.SignalsWriter
    writer = make(tmp_path / "s", described["identity"], described["signals"])
    good = made_cache.values(3)
    for changes in (
        {"bev": good["bev"][1:]},
        {"bev": good["bev"] * np.nan},
        {"bev": good["bev"] * 1e6},
        {"detections": np.zeros((21, 11))},
        {"detections": np.zeros((2, 10))},
    ):
        with np.errstate(all="ignore"), pytest.raises(ValueError, match="wrong shape"):
            writer.add("a", **{**good, **changes})
    for key in ("../a", "a/b", "a\\b", "", ".a", "a..b"):
        with pytest.raises(ValueError, match="frame keys name files"):
            writer.add(key, **good)
    assert not writer.has("a")
    with pytest.raises(ValueError, match="frames are missing"):
        writer.finish(["a"])
    other = {**described["identity"], "tensors": "of another training"}
    with pytest.raises(ValueError, match="another folder"):
        make(tmp_path / "s", other, described["signals"])


def test_a_write_that_fails_leaves_no_frame(tmp_path, monkeypatch):
    described = about()
    writer = foreign_writer.SignalsWriter(
        tmp_path / "s", described["identity"], described["signals"]
    )

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        writer.add("a", **made_cache.values(0))
    assert not writer.has("a") and not list((tmp_path / "s").glob("*.npy"))


def test_the_loop_in_the_documentation_runs(tmp_path, monkeypatch):
    """With what an mmdet3d test script has: a parallel wrapper, a head, infos and batches."""
    page = (Path(__file__).parents[1] / "docs" / "cache.md").read_text()
    section = page.partition("## Signals written elsewhere\n")[2]
    loop = section.partition("```python\n")[2].partition("```")[0]

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pts_bbox_head = torch.nn.Identity()

        def forward(self, *, return_loss, rescale, number):
            return self.pts_bbox_head([torch.full((1, 256, 128, 128), float(number))])

    (tmp_path / "weights.pth").write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "foreign_writer", foreign_writer)
    names = {
        "checkpoint": "weights.pth",
        "hashlib": hashlib,
        "torch": torch,
        "model": torch.nn.DataParallel(Network()),
        "dataset": SimpleNamespace(data_infos=[{"token": "one"}, {"token": "two"}]),
        "data_loader": [{"number": 1}, {"number": 2}],
    }
    exec(loop, names)
    assert main(["import", "signals", "train.zarr", "--preset", "balanced"]) == 0
    assert (CacheReader("train.zarr").read("two")["bev"] == 2).all()
