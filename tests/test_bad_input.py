"""Bad input at the recipes and the cache: one sentence, the right exit code, nothing lost."""

import errno
import json
import shutil

import made_cache
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cache_tools.cli import main as cache_main
from fd3d import models
from fd3d.errors import UsageError, exit_code
from fd3d.models import checkpoints
from recipes import evaluate, train

MODEL = "bevdepth-tiny-l"


def said(capsys, code, wanted):
    """The one line on stderr that names the fix."""
    text = capsys.readouterr().err
    line = [line for line in text.splitlines() if line.startswith(("error:", "failed:"))]
    assert code == wanted and len(line) == 1 and "Traceback" not in text, text
    return line[0]


def training(data, out, *more):
    words = ["--model", MODEL, "--dataroot", data.dataroot, "--version", data.version]
    words += ["--out", out, "--epochs", 1, "--batch", 2, "--workers", 0, "--warmup", 0]
    args = train.parse([str(word) for word in (*words, *more)])
    return exit_code(lambda: train.main(args))


def test_nothing_is_put_into_a_cache(synthetic, tmp_path, capsys):
    """Neither a training nor another cache."""
    cache = tmp_path / "c.zarr"
    made_cache.build(cache)
    before = sorted(path.name for path in cache.rglob("*"))
    for out in (cache, cache / "runs" / "one"):
        code = training(synthetic, out, "--max-steps", 1)
        assert "lies in the cache" in said(capsys, code, 2)
    code = cache_main(["export", str(cache), str(cache / "inner.zarr")])
    assert "lies inside of" in said(capsys, code, 2)
    assert sorted(path.name for path in cache.rglob("*")) == before


def test_somebody_s_manifest_above_is_no_cache(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    made_cache.build(tmp_path / "inner" / "c.zarr", frames=2)


@pytest.fixture(scope="module")
def run(synthetic, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert training(synthetic, out, "--max-steps", 1) == 0
    return out


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


@pytest.mark.parametrize("name", ["run.json", "last.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe", b'{"identity": 3}'])
def test_a_damaged_run_file_ends_a_resume(synthetic, copy, capsys, name, content):
    (copy / name).write_bytes(content)
    weights = (copy / "model.safetensors").read_bytes()
    line = said(capsys, training(synthetic, copy, "--resume"), 2)
    assert name in line and "another --out" in line
    assert (copy / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin"])
@pytest.mark.parametrize("left", [None, 100])
def test_a_damaged_save_ends_a_resume(synthetic, copy, capsys, name, left):
    (file,) = copy.glob(f"state-*/{name}")
    if left is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:left])
    assert "state-" in said(capsys, training(synthetic, copy, "--resume"), 2)


def test_torn_lines_of_a_log_are_dropped(synthetic, copy):
    log = copy / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(b"junk\n\xff\n" + whole + b'{"st')
    assert training(synthetic, copy, "--resume", "--max-steps", 1) == 0
    assert log.read_bytes() == whole


def test_a_run_replaces_nothing_of_anyone_else(synthetic, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_text("mine")
    assert "in the way" in said(capsys, training(synthetic, tmp_path), 2)
    assert (tmp_path / "model.safetensors").read_text() == "mine"


@pytest.mark.parametrize(
    "flags",
    [
        ("--seed", -1),
        ("--lr", "nan"),
        ("--weight-decay", -1),
        ("--warmup", -1),
        ("--clip", "-0.5"),
        ("--minutes", "inf"),
        ("--minutes", -1),
        ("--keep-images-mb", -1),
        ("--keep-images-mb", 1, "--image-augment"),
        ("--save-steps", -2),
        ("--tracker", "nope"),
        ("--split", "vall"),
    ],
)
def test_a_refused_run_leaves_its_folder_free(synthetic, tmp_path, capsys, flags):
    said(capsys, training(synthetic, tmp_path / "run", *flags), 2)
    assert not (tmp_path / "run").exists()


def test_a_missing_start_checkpoint_leaves_the_folder_free(synthetic, tmp_path, capsys):
    said(capsys, training(synthetic, tmp_path / "run", "--init", tmp_path / "none"), 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [("--device", "foo"), ("--batch", 0), ("--workers", -1)])
def test_evaluation_refuses_impossible_flags(synthetic, run, tmp_path, capsys, flags):
    words = ["--model", MODEL, "--checkpoint", run / "model.safetensors", "--out", tmp_path]
    words += ["--dataroot", synthetic.dataroot, "--version", synthetic.version, *flags]
    args = evaluate.parse([str(word) for word in words])
    assert flags[0] in said(capsys, exit_code(lambda: evaluate.main(args)), 2)


def weights(model, **changes):
    tensors = {**model.state_dict(), **changes}
    return {name: value.contiguous() for name, value in tensors.items()}


def test_checkpoints_of_nan_or_whole_numbers_are_refused(tmp_path):
    model = models.build(MODEL)
    name, value = next(iter(model.state_dict().items()))
    wrong = {"NaN": torch.full_like(value, np.nan), "whole": value.to(torch.int32)}
    for word, changed in wrong.items():
        path = tmp_path / f"{word}.safetensors"
        save_file(weights(model, **{name: changed}), path, {checkpoints.ARCHITECTURE: MODEL})
        with pytest.raises(UsageError, match=word):
            checkpoints.load(models.build(MODEL), path)


def test_a_state_dict_with_numbers_for_names_is_refused(tmp_path):
    torch.save({1: torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(UsageError, match="state_dict"):
        checkpoints.load(models.build(MODEL), tmp_path / "x.pth")


def test_a_head_is_loaded_alone(run):
    model = models.build(MODEL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loaded = checkpoints.load_part(model, run / "model.safetensors", prefix="pts_bbox_head.")
    after = model.state_dict()
    assert loaded and all(name.startswith("pts_bbox_head.") for name in loaded)
    assert any(not torch.equal(after[name], before[name]) for name in loaded)
    assert all(torch.equal(after[name], before[name]) for name in before if name not in loaded)


def test_what_torch_raises_on_a_full_disk_is_told_as_such(tmp_path):
    for text in ("I/O error: No space left (os error 28)", "PytorchStreamWriter failed writing"):
        with pytest.raises(OSError) as caught, checkpoints.writing(tmp_path):
            raise RuntimeError(text)
        assert caught.value.errno == errno.ENOSPC
    with pytest.raises(RuntimeError, match="else"), checkpoints.writing(tmp_path):
        raise RuntimeError("something else")


def test_tables_that_are_no_records_are_named(synthetic, tmp_path, capsys):
    for name, content in (("scene", [1]), ("sample", None), ("ego_pose", {})):
        data = tmp_path / name
        shutil.copytree(synthetic.dataroot / synthetic.version, data / synthetic.version)
        (data / synthetic.version / f"{name}.json").write_text(json.dumps(content))
        moved = type(synthetic)(dataroot=data, version=synthetic.version, split="val")
        line = said(capsys, training(moved, tmp_path / "run"), 2)
        assert f"{name}.json is not a list of records" in line


def building(data, out, *more):
    words = ["build", "--expert", MODEL, "--init-seed", 0, "--dataroot", data.dataroot]
    words += ["--version", data.version, "--split", "val", "--out", out, "--workers", 0]
    return cache_main([str(word) for word in (*words, "--signals", "bev", *more)])


@pytest.mark.parametrize(
    "flags",
    [
        ("--device", "meta"),
        ("--init-seed", 10**30),
        ("--shard-frames", 10**30),
        ("--signals", "bev, dets"),
        ("--version", "../v1.0-synthetic"),
    ],
)
def test_a_build_refuses_impossible_flags(synthetic, tmp_path, capsys, flags):
    said(capsys, building(synthetic, tmp_path / "c.zarr", *flags), 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_an_empty_or_missing_folder_is_followed(synthetic, tmp_path, there):
    target = tmp_path / "target"
    if there:
        target.mkdir()
    (tmp_path / "link").symlink_to(target)
    assert building(synthetic, tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink() and (target / "manifest.json").is_file()


def test_a_build_goes_on_without_the_folder_of_records(synthetic, tmp_path):
    out = tmp_path / "c.zarr"
    assert building(synthetic, out) == 0
    shutil.rmtree(out / "commits")
    assert building(synthetic, out) == 0
    assert cache_main(["verify", str(out)]) == 0


def test_a_manifest_of_a_thousand_brackets_is_damaged(synthetic, tmp_path, capsys):
    out = tmp_path / "c.zarr"
    assert building(synthetic, out) == 0
    capsys.readouterr()
    (out / "manifest.json").write_text("[" * 100_000)
    assert "damaged" in said(capsys, cache_main(["info", str(out)]), 1)
