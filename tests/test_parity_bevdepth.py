"""BEVDepth against stored tensors of the original networks, where those files are at hand.

They are looked for in $FD3D_PARITY, then in ../shared/parity beside the repository.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fd3d.boxes import old_yaw
from fd3d.data.batch import Batch
from fd3d.grid import BEVGrid
from fd3d.models import presets
from fd3d.models.bevdepth.config import LossConfig
from fd3d.models.bevdepth.decode import candidates, decode
from fd3d.models.bevdepth.losses import head_losses
from fd3d.models.bevdepth.network import BEVDepth, moment_cameras
from fd3d.models.bevdepth.targets import make_targets
from fd3d.models.bevdepth.view_transform import frustum_points
from fd3d.models.checkpoints import REBUILT

BESIDE = Path(__file__).parents[1].parent / "shared" / "parity"
FOLDER = Path(os.environ.get("FD3D_PARITY") or BESIDE) / "bevdepth"

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no parity files at {FOLDER}: set FD3D_PARITY to their folder"
)


def stored_keys(name):
    shapes = json.loads((FOLDER / f"{name}.json").read_text())
    shapes = shapes.get("keys", shapes)
    return {key: tuple(shape) for key, shape in shapes.items() if key not in REBUILT}


def drawn_weights(shapes):
    """The weights behind the stored tensors, drawn by the rule that comes with them."""
    rng = np.random.Generator(np.random.PCG64(2024))
    weights = {}
    for key in sorted(shapes):
        shape, last = shapes[key], key.rsplit(".", 1)[-1]
        if last == "num_batches_tracked":
            weights[key] = torch.zeros(shape, dtype=torch.int64)
            continue
        normal = rng.standard_normal(shape)
        if last == "running_var":
            value = 1 + 0.1 * np.abs(normal)
        elif last in ("running_mean", "bias"):
            value = 0.1 * normal
        elif len(shape) == 1:
            value = 1 + 0.1 * normal
        else:
            value = normal / np.sqrt(np.prod(shape[1:]))
        weights[key] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    weights["img_view_transformer.se.fc.0.running_var"] *= 1e5
    return weights


def golden_batch(golden):
    shape = tuple(golden["in/img_shape"])
    normal = np.random.Generator(np.random.PCG64(7)).standard_normal(shape)
    images = torch.from_numpy(normal.astype(np.float32)).view(1, 6, 2, *shape[2:])

    def field(name):
        value = torch.from_numpy(golden[f"in/{name}"])
        return value.view(1, 2, 6, *value.shape[2:])

    return Batch(
        tokens=("golden",),
        images=images,
        rots=field("rots"),
        trans=field("trans"),
        intrins=field("intrin"),
        post_rots=field("post_rot"),
        post_trans=field("post_tran"),
        dt=torch.ones(1),
    )


def watch(model):
    """Stage name -> tensor, filled while the model runs."""
    stages = {}
    view = model.img_view_transformer

    def note(module, name, pick=lambda output: output):
        def hook(_, __, output):
            stages[name if name not in stages else f"{name}_call1"] = pick(output)

        module.register_forward_hook(hook)

    note(model.img_backbone, "backbone_c4", lambda maps: maps[0])
    note(model.img_backbone, "backbone_c5", lambda maps: maps[1])
    note(model.img_neck, "img_neck")
    note(view.featnet, "featnet")
    note(view.se, "se_out")
    note(view.extra_depthnet, "extra_depthnet", lambda maps: maps[0])
    note(view.dcn[0], "dcn_conv")
    note(view.dcn, "dcn_bn")
    note(view.depthnet, "depth_logits")
    note(view, "view_bev", lambda outputs: outputs[0])
    note(model.pre_process_net, "pre_process", lambda maps: maps[0])
    for stage in range(3):
        note(model.img_bev_encoder_backbone, f"bev_backbone_{stage}", lambda m, s=stage: m[s])
    context = model.config.context
    model.img_bev_encoder_backbone.register_forward_pre_hook(
        lambda _, inputs: stages.update(shifted_adj=inputs[0][:, context:])
    )
    return stages


CASES = [
    pytest.param("128x352_bev64", 1e-5, id="small"),
    pytest.param("256x704_bev128", 1e-3, id="low", marks=pytest.mark.slow),
    pytest.param("512x1408_bev256", 1e-3, id="high", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("size", "after_splat"), CASES)
def test_every_stage_of_the_two_frame_network(size, after_splat):
    """1e-5 of the largest magnitude; rounding may move a single point across a cell's border in
    the larger grids, so that `after_splat` is what may differ from there on."""
    golden = np.load(FOLDER / f"golden_v1_bevdepth4d_r50_6task_{size}.npz")
    pixels, cells = size.split("_bev")
    height, width = (int(number) for number in pixels.split("x"))
    base = presets.bevdepth_r50l()
    config = replace(
        base,
        image=replace(base.image, height=height, width=width),
        grid=BEVGrid.square(half_extent=51.2, cells=int(cells)),
    )
    model = BEVDepth(config).eval()
    model.load_state_dict(drawn_weights(stored_keys("keys_bevdepth_r50_256x704")))
    stages = watch(model)
    batch = golden_batch(golden)
    with torch.no_grad():
        outputs = model(batch)
    stages["geometry"] = frustum_points(moment_cameras(batch, 0), config.image)
    stages["geometry_call1"] = frustum_points(moment_cameras(batch, 1), config.image)
    stages["bev_encoder_out"] = outputs.bev
    for task, maps in enumerate(outputs.tasks):
        stages.update({f"head/task{task}/{name}": value for name, value in maps.items()})

    names = [key.removesuffix("/sub") for key in golden.files if key.endswith("/sub")]
    assert set(names) <= set(stages)
    splat = ("view_bev", "pre_process", "shifted_adj", "bev_", "head/")
    for name in names:
        found = stages[name].contiguous()
        assert tuple(found.shape) == tuple(golden[f"{name}/shape"]), name
        largest = golden[f"{name}/stats"][2]
        sampled = found.flatten()[:: int(golden[f"{name}/stride"])].numpy()
        error = np.abs(sampled - golden[f"{name}/sub"]).max() / largest
        assert error < (after_splat if name.startswith(splat) else 1e-5), f"{name}: {error:.1e}"
        mean, deviation = found.double().mean().item(), found.double().std(correction=0).item()
        assert abs(mean - golden[f"{name}/stats"][0]) < 1e-4 * golden[f"{name}/stats"][1], name
        assert deviation == pytest.approx(golden[f"{name}/stats"][1], rel=1e-4), name

    if size == "128x352_bev64":
        found = model.decode(outputs.tasks, batch.dt)[0]
        scores = golden["decoded/scores"]
        assert len(found) == len(scores)
        np.testing.assert_allclose(found.scores.sort()[0], np.sort(scores), atol=1e-4)


@pytest.mark.parametrize("preset", [presets.bevdepth_r50h, presets.bevdepth_r50l])
def test_keys_and_shapes_are_those_of_the_original(preset):
    with torch.device("meta"):
        model = BEVDepth(preset())
    size = f"{model.image.height}x{model.image.width}"
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes == stored_keys(f"keys_bevdepth_r50_{size}")
    assert sum(value.numel() for value in model.parameters()) == 53_217_566


@pytest.fixture(params=[128, 256], ids=["grid128", "grid256"])
def head_case(request):
    """The stored file, its grid, and the head maps it was made from."""
    size = request.param
    golden = np.load(FOLDER / f"golden_v1_head_6task_grid{size}.npz")
    rng = np.random.Generator(np.random.PCG64(22))
    tasks = []
    branches = {"reg": 2, "height": 1, "dim": 3, "rot": 2, "vel": 2}
    for names in presets.bevdepth_r50l().tasks:
        maps = {}
        for branch, channels in {**branches, "heatmap": len(names)}.items():
            value = rng.standard_normal((1, channels, size, size))
            change = {"heatmap": (1.2, -4.0), "dim": (0.3, 0.8), "reg": (0.2, 0.5)}
            scale, shift = change.get(branch, (1.0, 0.0))
            maps[branch] = torch.from_numpy((scale * value + shift).astype(np.float32))
        tasks.append(maps)
    return golden, BEVGrid.square(half_extent=51.2, cells=size), tuple(tasks)


def golden_targets(golden, grid):
    boxes = torch.from_numpy(golden["in/gt_boxes_gravity_center"]).clone()
    boxes[:, 6] = old_yaw(boxes[:, 6])
    # The stored velocities are displacements already.
    return make_targets(
        boxes=[boxes],
        labels=[torch.from_numpy(golden["in/gt_labels"])],
        dt=torch.ones(1),
        grid=grid,
        tasks=presets.bevdepth_r50l().tasks,
    )


def test_targets_are_the_stored_ones(head_case):
    golden, grid, _ = head_case
    for task, target in enumerate(golden_targets(golden, grid)):
        used = golden[f"t{task}/mask"] > 0
        np.testing.assert_allclose(target.heatmap, golden[f"t{task}/heatmap"], atol=1e-6)
        np.testing.assert_array_equal(target.cell, golden[f"t{task}/ind"][used])
        np.testing.assert_allclose(target.codes, golden[f"t{task}/anno_box"][used], atol=2e-5)


@pytest.mark.parametrize(("variant", "velocity"), [("bevdepth4d-r50", 1.0), ("bevdepth-r50", 0.2)])
def test_losses_are_the_stored_ones(head_case, variant, velocity):
    golden, grid, tasks = head_case
    config = LossConfig(code=(1.0,) * 8 + (velocity,) * 2, nan_velocity="zero")
    terms = head_losses(tasks, golden_targets(golden, grid), config)
    prefix = f"loss_v1-{variant}/"
    stored = [key for key in golden.files if key.startswith(prefix)]
    assert len(stored) == len(terms) == 36
    for key in stored:
        name = key.removeprefix(prefix).replace(".loss_", ".")
        assert terms[name].item() == pytest.approx(float(golden[key]), rel=2e-5), name


def old_boxes(boxes, bottom):
    """Rows of ours as the original's: old yaw, and z at the bottom where asked."""
    boxes = boxes.clone()
    boxes[:, 6] = old_yaw(boxes[:, 6])
    if bottom:
        boxes[:, 2] -= boxes[:, 5] / 2
    return boxes.numpy()


def assert_same_boxes(found, stored):
    difference = np.abs(found - stored)
    difference[:, 6] = np.abs(np.angle(np.exp(1j * (found[:, 6] - stored[:, 6]))))
    assert difference.max() < 1e-4


def test_candidates_are_the_stored_ones(head_case):
    golden, grid, tasks = head_case
    for task, maps in enumerate(tasks):
        boxes, scores, classes = (item[0] for item in candidates(maps, grid=grid, count=500))
        good = (scores > 0.1) & (boxes[:, :3].abs() <= torch.tensor([61.2, 61.2, 10])).all(dim=1)
        stored = {name: golden[f"decode/t{task}/{name}"] for name in ("bboxes", "scores", "labels")}
        np.testing.assert_allclose(scores[good], stored["scores"], atol=1e-6)
        np.testing.assert_array_equal(classes[good], stored["labels"])
        assert_same_boxes(old_boxes(boxes[good], bottom=False), stored["bboxes"])


def test_final_boxes_are_the_stored_ones(head_case):
    golden, grid, tasks = head_case
    config = presets.bevdepth_r50l().decode
    (found,) = decode(tasks, torch.ones(1), grid=grid, config=config)
    np.testing.assert_allclose(found.scores, golden["final/scores"], atol=1e-6)
    np.testing.assert_array_equal(found.labels, golden["final/labels"])
    assert_same_boxes(old_boxes(found.boxes, bottom=True), golden["final/boxes_bottomcenter"])
