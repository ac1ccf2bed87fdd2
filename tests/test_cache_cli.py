"""`fd3d-cache` as a user meets it: what it says, what it makes, how it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cache_tools.cli import main
from cache_tools.presets import PRESETS
from cache_tools.source import CachedExpert
from fd3d import models
from fd3d.data.batch import collate
from fd3d.data.frames import FrameDataset
from fd3d.distill.signals import LiveExpert
from fd3d.models import checkpoints

SEED = 3


@pytest.fixture(scope="module")
def data(synthetic):
    """A data set whose train and val splits have five frames each."""
    return synthetic


def flags(data, out, **changes):
    options = {
        "expert": "bevdepth-tiny-h",
        "init-seed": SEED,
        "dataroot": data.dataroot,
        "version": data.version,
        "split": "train",
        "out": out,
        "signals": "bev,detections,heatmap",
        "shard-frames": 3,
        "workers": 0,
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    pairs = [(f"--{name}", str(value)) for name, value in options.items() if value is not None]
    return ["build", *(word for pair in pairs for word in pair)]


@pytest.fixture(scope="module")
def cache(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "train.zarr"
    assert main(flags(data, out)) == 0
    return out


@pytest.fixture(scope="module")
def live(data):
    """(the expert that `--init-seed` makes, its view of the training frames)."""
    torch.manual_seed(SEED)
    model = models.build("bevdepth-tiny-h")
    index = data.open()
    frames = FrameDataset(
        index=index, positions=index.split("train"), image=model.image, truth=False
    )
    return LiveExpert(model=model, names=("bev", "detections", "heatmap")), frames


@pytest.mark.parametrize("preset", PRESETS)
def test_the_cache_holds_what_the_live_expert_says(data, live, tmp_path, preset):
    out = tmp_path / "c.zarr"
    assert main(flags(data, out, preset=preset, workers=1)) == 0
    expert, frames = live
    source = CachedExpert(out, names=("bev", "detections", "heatmap"), areas=True)
    assert source.reader.tokens == tuple(frames.tokens)
    for rows in ([0, 1], [2], [3, 4]):  # as the build batched them
        said = expert.signals(collate([frames[row] for row in rows]))
        found = source.signals([source.load(frames.tokens[row]) for row in rows])
        exact = found.pop("exact", torch.ones(len(rows), 1, *expert.grid.shape)) == 1
        assert exact.any() and set(found) == set(said)
        for name in ("bev", "heatmap"):
            assert found[name].dtype == said[name].dtype and found[name].shape == said[name].shape
            if preset == "lossless":
                torch.testing.assert_close(found[name], said[name].half().float())
            centred = said[name] - said[name].mean(dim=(2, 3), keepdim=True)
            where = exact if name == "bev" else torch.ones_like(exact)
            allowed = source.reader.manifest.codecs[name].budget or 0.04
            assert ((found[name] - said[name]) * where).norm() <= allowed * centred.norm()
        for mine, theirs in zip(found["detections"], said["detections"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_gives_the_ids_of_the_tensors_in_it(data, cache, live, tmp_path, capsys):
    checkpoints.save(tmp_path / "expert.safetensors", live[0].model, {})
    flag = {"init_seed": None, "checkpoint": tmp_path / "expert.safetensors"}
    assert main([*flags(data, cache, **flag), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["frames"] == 5 and report["built"] == 0


def test_a_dry_run_writes_nothing_and_knows_the_ids(data, cache, tmp_path, capsys):
    out = tmp_path / "dry.zarr"
    assert main([*flags(data, out), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert main(["info", str(cache), "--json"]) == 0
    assert plan["cache_id"] == json.loads(capsys.readouterr().out)["cache_id"]
    assert main([*flags(data, out), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(f"Would build {out}: 5 frames of split train")


def test_a_build_says_first_what_happens_and_last_what_to_do(data, tmp_path, capsys):
    out = tmp_path / "c.zarr"
    assert main(flags(data, out, split="val", signals="detections")) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"Building {out}: 5 frames of split val")
    assert "verify" in said[-1] and str(out) in said[-1]


def test_info_tells_a_person_and_a_machine(cache, capsys):
    assert main(["info", str(cache)]) == 0
    said = capsys.readouterr().out
    for word in ("ready", "bevdepth-tiny-h", "weights from seed 3", "split train", "clean"):
        assert word in said
    assert main(["info", str(cache), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ready"] and found["frames"] == found["expected_frames"] == 5
    assert found["bytes"] == sum(path.stat().st_size for path in cache.rglob("c.*"))


def test_verify_exits_with_1_and_names_the_damage(data, cache, tmp_path, capsys):
    assert main(["verify", str(cache)]) == 0
    capsys.readouterr()
    path = cache / "bev" / "c.1.0.0.0"
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    try:
        assert main(["verify", str(cache)]) == 1
        said = capsys.readouterr()
        assert "bev/c.1.0.0.0" in said.out and "to mend: fd3d-cache repair" in said.out
        assert "damaged" in said.err
        assert main(["verify", str(cache), "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["problems"][0]["file"] == "bev/c.1.0.0.0"
    finally:
        path.write_bytes(whole)


def test_a_cache_being_built_is_refused_and_a_killed_build_goes_on(data, tmp_path, capsys):
    out = tmp_path / "c.zarr"
    command = [sys.executable, "-m", "cache_tools.cli", *flags(data, out, shard_frames=1, batch=1)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    build = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(out.glob("commits/*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    build.send_signal(signal.SIGSTOP)
    assert main(["info", str(out)]) == 0
    assert f"being built by process {build.pid}" in capsys.readouterr().out
    assert main(flags(data, out, shard_frames=1, batch=1)) == 2
    assert f"being built by process {build.pid}" in capsys.readouterr().err
    build.kill()
    build.wait()
    assert main(["verify", str(out)]) == 1
    assert "not finished" in capsys.readouterr().err
    assert main(flags(data, out, shard_frames=1, batch=1)) == 0
    assert main(["verify", str(out)]) == 0


def test_two_parts_at_once_make_one_cache(data, cache, tmp_path, capsys):
    out = tmp_path / "c.zarr"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    builds = [
        subprocess.Popen(
            [sys.executable, "-m", "cache_tools.cli", *flags(data, out, part=part)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in ("1/2", "2/2")
    ]
    said = [build.communicate(timeout=120)[0] for build in builds]
    assert [build.returncode for build in builds] == [0, 0]
    assert "part 1/2: 1 of the shards" in said[0]
    assert main(["verify", str(out)]) == 0
    assert (out / "manifest.json").read_bytes() == (cache / "manifest.json").read_bytes()
    capsys.readouterr()
    assert main([*flags(data, out, part="2/2"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["part"] == "2/2" and report["complete"] and report["built"] == 0


def truncated(tmp_path, model):
    path = tmp_path / "half.safetensors"
    checkpoints.save(path, model, {})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def foreign(tmp_path, _):
    path = tmp_path / "low.safetensors"
    checkpoints.save(path, models.build("bevdepth-tiny-l"), {})
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dataroot": "/nowhere"}, "/nowhere"),
        ({"version": "v1.0-trainval"}, "v1.0-trainval"),
        ({"split": "mini_val"}, "mini_val"),
        ({"expert": "resnet"}, "bevdepth-tiny-h"),
        ({"signals": "bev,depth"}, "depth"),
        ({"signals": ","}, "bev, detections, heatmap"),
        ({"batch": 0}, "--batch 0"),
        ({"shard_frames": 0}, "--shard-frames 0"),
        ({"workers": -1}, "--workers -1"),
        ({"part": "3/2"}, "--part 3/2"),
        ({"device": "abacus"}, "--device abacus"),
        ({"init_seed": None, "checkpoint": "/nowhere/x.pth"}, "/nowhere/x.pth"),
        ({"init_seed": None, "checkpoint": truncated}, "half.safetensors"),
        ({"init_seed": None, "checkpoint": foreign}, "bevdepth-tiny-l.*bevdepth-tiny-h"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(data, live, tmp_path, capsys, changes, says):
    made = changes.get("checkpoint")
    if callable(made):
        changes = {**changes, "checkpoint": made(tmp_path, live[0].model)}
    capsys.readouterr()
    assert main(flags(data, tmp_path / "c.zarr", **changes)) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said
    assert re.search(says, said)
    assert not (tmp_path / "c.zarr").exists()


def test_another_cache_at_out_is_refused_before_anything_is_said(data, cache, capsys):
    assert main(flags(data, cache, preset="balanced")) == 2
    said = capsys.readouterr()
    assert said.out == "" and "they differ in preset" in said.err


@pytest.mark.parametrize("verb", ["info", "verify"])
def test_what_is_not_a_cache_is_refused(verb, tmp_path, capsys):
    for path in (tmp_path, tmp_path / "nothing.zarr"):
        assert main([verb, str(path)]) == 2
        assert str(path) in capsys.readouterr().err


def test_a_seed_and_a_checkpoint_exclude_each_other(data, tmp_path):
    for changes in ({"init_seed": None}, {"checkpoint": "x"}):
        with pytest.raises(SystemExit) as ended:
            main(flags(data, tmp_path / "c.zarr", **changes))
        assert ended.value.code == 2


def test_a_real_keyframe_goes_through(real_keyframe, tmp_path):
    out = tmp_path / "real.zarr"
    arguments = flags(real_keyframe, out, split=real_keyframe.split, preset="balanced")
    assert main(arguments) == 0
    source = CachedExpert(out)
    assert np.isfinite(source.load(source.reader.tokens[0])["bev"]).all()


def test_an_interrupt_while_the_verbs_are_imported_is_told_in_a_word(monkeypatch, capsys):
    class Interrupted:
        def find_spec(self, name, path=None, target=None):
            if name == "cache_tools.commands":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "cache_tools.commands", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert main(["info", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_command_itself_imports_nothing_slow():
    code = "import sys, cache_tools.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "zarr"} & set(done.stdout.split())
