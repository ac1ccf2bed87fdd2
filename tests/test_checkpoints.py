import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fd3d import models
from fd3d.errors import UsageError
from fd3d.models import checkpoints
from fd3d.models.imagenet import load_backbone
from fd3d.models.resnet import ResNet, ResNetConfig


class Small(nn.Module):
    def __init__(self, name="small", width=4):
        super().__init__()
        self.name = name
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)


def tensors_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_round_trip_restores_every_tensor_and_the_digest(tmp_path):
    saved, other = Small(), Small()
    saved.to(memory_format=torch.channels_last)
    checkpoints.save(tmp_path / "a.safetensors", saved, {"steps": 12, "note": "hello"})
    assert checkpoints.tensors_digest(saved) != checkpoints.tensors_digest(other)
    report = checkpoints.load(other, tmp_path / "a.safetensors")
    assert checkpoints.tensors_digest(saved) == checkpoints.tensors_digest(other)
    assert set(report.loaded) == set(saved.state_dict())
    assert report.missing == report.unexpected == report.ignored == ()
    metadata = checkpoints.read_metadata(tmp_path / "a.safetensors")
    assert metadata == {"fd3d_architecture": "small", "steps": "12", "note": "hello"}


def test_digest_sees_one_changed_number():
    model = Small()
    before = checkpoints.tensors_digest(model)
    with torch.no_grad():
        model.norm.running_var[2] += 1e-6
    assert checkpoints.tensors_digest(model) != before


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    checkpoints.save(path, Small())
    before = path.read_bytes()

    def broken(*_):
        raise OSError("disk is gone")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk is gone"):
        checkpoints.save(path, Small())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint at .*nowhere"):
        checkpoints.load(Small(), tmp_path / "nowhere")


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_a_truncated_file_is_refused_and_changes_nothing(tmp_path, size):
    path = tmp_path / "a.safetensors"
    checkpoints.save(path, Small())
    path.write_bytes(path.read_bytes()[:size])
    model = Small()
    before = tensors_of(model)
    with pytest.raises(UsageError, match="not a whole checkpoint"):
        checkpoints.load(model, path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_another_architecture_is_refused_by_both_names(tmp_path):
    checkpoints.save(tmp_path / "a", Small(name="expert"))
    with pytest.raises(UsageError, match="holds expert, but the network is apprentice"):
        checkpoints.load(Small(name="apprentice"), tmp_path / "a")


def test_other_shapes_are_refused(tmp_path):
    checkpoints.save(tmp_path / "a", Small(width=4))
    with pytest.raises(UsageError, match="conv.weight is"):
        checkpoints.load(Small(width=5), tmp_path / "a")


def test_an_mmcv_file_loads_without_its_prefix_and_its_geometry(tmp_path):
    saved, model = Small(), Small()
    state = {f"module.{name}": value for name, value in saved.state_dict().items()}
    state["module.img_view_transformer.frustum"] = torch.zeros(2, 3)
    torch.save({"meta": {"epoch": 3}, "state_dict": state}, tmp_path / "a.pth")
    report = checkpoints.load(model, tmp_path / "a.pth")
    assert report.ignored == ("img_view_transformer.frustum",)
    assert checkpoints.tensors_digest(saved) == checkpoints.tensors_digest(model)


def test_missing_and_unexpected_keys_of_an_mmcv_file_are_named(tmp_path):
    state = Small().state_dict()
    state["extra.weight"] = state.pop("norm.bias")
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(UsageError, match="misses norm.bias and has unexpected extra.weight"):
        checkpoints.load(Small(), tmp_path / "a.pth")
    report = checkpoints.load(Small(), tmp_path / "a.pth", partial=True)
    assert report.missing == ("norm.bias",) and report.unexpected == ("extra.weight",)
    assert "conv.weight" in report.loaded


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("should_not_exist",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb()}, "a.pth")
    with pytest.raises(UsageError, match="not a whole checkpoint of plain tensors"):
        checkpoints.load(Small(), "a.pth")
    assert os.listdir(tmp_path) == ["a.pth"]


def test_a_header_length_that_looks_like_a_zip_file_is_still_read(tmp_path):
    # 0x4B50 is "PK" in the first two bytes of a safetensors file.
    path = tmp_path / "a.safetensors"
    checkpoints.save(path, Small(), {"note": ""})
    header = int.from_bytes(path.read_bytes()[:8], "little")
    checkpoints.save(path, Small(), {"note": "x" * (0x4B50 - header)})
    assert path.read_bytes()[:2] == b"PK"
    assert checkpoints.read_metadata(path)["fd3d_architecture"] == "small"


def test_a_truncated_torch_file_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"state_dict": Small().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UsageError, match="not a whole checkpoint"):
        checkpoints.load(Small(), path)


def test_a_state_dict_in_memory_loads_like_a_file():
    saved, model = Small(), Small()
    report = checkpoints.load(model, {"epoch": 3, "state_dict": saved.state_dict()})
    assert set(report.loaded) == set(saved.state_dict())
    assert checkpoints.tensors_digest(saved) == checkpoints.tensors_digest(model)
    with pytest.raises(UsageError, match="the given mapping holds no state_dict"):
        checkpoints.load(model, {"state_dict": [1, 2]})


def test_an_ema_file_loads(tmp_path):
    saved, model = Small(), Small()
    content = {"epoch": 20, "state_dict": saved.state_dict(), "updates": 70_000}
    torch.save(content, tmp_path / "epoch_20_ema.pth")
    checkpoints.load(model, tmp_path / "epoch_20_ema.pth")
    assert checkpoints.tensors_digest(saved) == checkpoints.tensors_digest(model)


def shapes_of(name):
    with torch.device("meta"):
        state = models.build(name).state_dict()
    return {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}


@pytest.mark.parametrize(
    ("given", "built", "message"),
    [
        ("bevdet-r50-4d-depth", "bevdepth-r50l", "holds the tensors of bevdet-r50-4d-depth, not"),
        ("bevdet-r50-4d-depth", "bevdet-r50-4dlongterm-depth", "build bevdet-r50-4d-depth$"),
        ("bevdepth-r50l", "bevdet-r50", "build bevdepth-r50h or bevdepth-r50l$"),
    ],
)
def test_a_checkpoint_of_another_layout_is_named(given, built, message):
    with torch.device("meta"):
        model = models.build(built)
    with pytest.raises(UsageError, match=message):
        checkpoints.load(model, shapes_of(given))


def torchvision_like(backbone):
    state = {name: torch.randn(value.shape) for name, value in backbone.state_dict().items()}
    state = {name: v for name, v in state.items() if not name.endswith("num_batches_tracked")}
    return {**state, "fc.weight": torch.randn(1000, 512), "fc.bias": torch.randn(1000)}


@pytest.mark.parametrize("prefix", ["", "backbone.", "img_backbone."])
@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_imagenet_weights_load_by_any_of_their_names(tmp_path, prefix, form):
    shape = ResNetConfig(bottleneck=True, stem=8, widths=(8, 8, 8, 8), blocks=(1, 1, 1, 1))
    backbone = ResNet(shape)
    state = torchvision_like(backbone)
    named = {f"{prefix}{name}": value for name, value in state.items()}
    if prefix:
        named["head.fc.weight"] = named.pop(f"{prefix}fc.weight")
    if form == "torch":
        torch.save(named, tmp_path / "weights")
    else:
        save_file(named, tmp_path / "weights")
    report = load_backbone(backbone, tmp_path / "weights")
    for name, value in backbone.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, state[name])
    assert all(name.endswith("num_batches_tracked") for name in report.missing)
    assert all(name.startswith("fc.") for name in report.ignored)


def test_imagenet_weights_of_another_depth_are_refused(tmp_path):
    shape = ResNetConfig(bottleneck=True, stem=8, widths=(8, 8, 8, 8), blocks=(1, 1, 1, 1))
    torch.save(torchvision_like(ResNet(shape)), tmp_path / "shallow.pth")
    deeper = ResNet(ResNetConfig(stem=8, widths=(8, 8, 8, 8), blocks=(1, 2, 1, 1)))
    before = tensors_of(deeper)
    with pytest.raises(UsageError, match="is not of this backbone .see layer2.1"):
        load_backbone(deeper, tmp_path / "shallow.pth")
    assert all(torch.equal(before[name], value) for name, value in deeper.state_dict().items())
