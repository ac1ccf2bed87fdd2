"""Every stage of the networks against stored tensors of the original code; see `parity_files`."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from parity_files import (
    FOLDER,
    assert_stage,
    drawn_images,
    drawn_weights,
    files,
    kinds,
    ours,
    stages,
    stored_keys,
)

from fd3d import models
from fd3d.boxes import wrap_angle
from fd3d.data.batch import Batch
from fd3d.data.placement import cameras_in_ego
from fd3d.efficiency import giga_multiply_adds
from fd3d.grid import BEVGrid
from fd3d.models import checkpoints, public
from fd3d.models.bevdepth.camera_aware import camera_numbers
from fd3d.models.bevdepth.network import BEVDepth, moment_cameras
from fd3d.models.bevdepth.view_transform import frustum_points
from fd3d.models.checkpoints import REBUILT
from fd3d.models.presets import bevdepth_r50l

# The largest difference relative to a stage's largest magnitude. Rounding moves single frustum
# points across a cell's border, which whatever follows the splat feels; a few values by more.
BEFORE_SPLAT, AFTER_SPLAT, STRAYS = 1e-4, 1e-3, 1e-2
SPLAT = ("view_bev", "pre_process", "shifted_adj", "bev_", "head/")
# Higher pictures than this take long: they run with `pytest -m slow`.
QUICK_HEIGHT = 128


def networks(*wanted):
    """The network files, those with large pictures marked slow."""
    found = []
    for case in files(*wanted):
        if case.values[0] is None:
            return [case]
        with np.load(case.values[0]) as golden:
            height = golden["in/img_shape"][3]
        marks = [pytest.mark.slow] if height > QUICK_HEIGHT else []
        found.append(pytest.param(case.values[0], id=case.id, marks=marks))
    return found


def batch_of(golden, poses, bev_augment=None):
    """A batch of one frame; `poses` (T, 6, 4, 4) place the cameras, augmentation included."""
    moments = len(poses)

    def field(name):
        value = torch.from_numpy(golden[f"in/{name}"])
        return value.view(1, moments, 6, *value.shape[2:])

    poses = torch.as_tensor(poses, dtype=torch.float32)[None]
    return Batch(
        tokens=("golden",),
        images=drawn_images(golden),
        rots=poses[..., :3, :3],
        trans=poses[..., :3, 3],
        intrins=field("intrin"),
        post_rots=field("post_rot"),
        post_trans=field("post_tran"),
        dt=torch.ones(1),
        bev_augment=bev_augment,
    )


def first_batch(golden):
    poses = np.zeros((golden["in/img_shape"][1] // 6, 6, 4, 4), dtype=np.float32)
    poses[..., :3, :3] = golden["in/rots"].reshape(-1, 6, 3, 3)
    poses[..., :3, 3] = golden["in/trans"].reshape(-1, 6, 3)
    return batch_of(golden, poses)


def second_batch(golden):
    mounting, cars = (
        golden[f"in/{name}"].astype(np.float64).reshape(-1, 6, 4, 4)
        for name in ("sensor2ego", "ego2global")
    )
    cameras = cameras_in_ego(mounting, cars, cars[0, 0])
    np.testing.assert_allclose(cameras, golden["sensor2keyego"][0], atol=1e-5)
    augment = np.eye(4)
    augment[:3, :3] = golden["in/bda"][0]
    return batch_of(golden, augment @ cameras, torch.from_numpy(golden["in/bda"]))


def watch(model):
    """Stage name -> tensor, filled while the model runs."""
    found = {}
    view = model.img_view_transformer

    def add(name, value):
        number = sum(stage.split("_call")[0] == name for stage in found)
        found[f"{name}_call{number}" if number else name] = value
        return value

    def note(module, name, pick=lambda output: output):
        def hook(_, __, output):
            add(name, pick(output))

        module.register_forward_hook(hook)

    note(model.img_backbone, "backbone_c4", lambda maps: maps[0])
    note(model.img_backbone, "backbone_c5", lambda maps: maps[1])
    note(model.img_neck, "img_neck")
    if model.config.depth_net == "gated":
        note(view.featnet, "featnet")
        note(view.se, "se_out")
        note(view.extra_depthnet, "extra_depthnet", lambda maps: maps[0])
        note(view.dcn[0], "dcn_conv")
        note(view.dcn, "dcn_bn")
        note(view.depthnet, "depth_logits")
    if model.config.depth_net == "aware":
        note(view.depth_net, "depth_net_raw", lambda both: torch.cat(both, dim=1))
        note(view.depth_net, "depth_prob", lambda both: both[0].softmax(dim=1))
    splat = view.splat
    view.splat = lambda *factors: add("view_bev", splat(*factors))
    if model.pre_process_net is not None:
        note(model.pre_process_net, "pre_process", lambda maps: maps[0])
    for stage in range(3):
        note(model.img_bev_encoder_backbone, f"bev_backbone_{stage}", lambda m, s=stage: m[s])
    context = model.config.context
    model.img_bev_encoder_backbone.register_forward_pre_hook(
        lambda _, inputs: found.update(shifted_adj=inputs[0][:, context:])
    )
    return found


def sized(config, golden):
    """`config` with the picture size and the grid of a stored run."""
    _, _, _, height, width = (int(size) for size in golden["in/img_shape"])
    cells = int(golden["bev_encoder_out/shape"][-1])
    return replace(
        config,
        image=replace(config.image, height=height, width=width),
        grid=BEVGrid.square(half_extent=51.2, cells=cells, frame=config.grid.frame),
    )


def run(config, golden, batch):
    """The network with the stored run's weights, the stages it went through, and its outputs."""
    model = BEVDepth(config).eval()
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    checkpoints.load(model, drawn_weights(shapes, int(golden["in/weight_seed"])))
    found = watch(model)
    with torch.no_grad():
        outputs = model(batch)
    # The original's products of geometry were counted too.
    counted = 2e9 * giga_multiply_adds(model)
    assert counted == pytest.approx(float(golden["flops_total_2xMAC"]), rel=2e-3)
    found["bev_encoder_out"] = outputs.bev
    for task, maps in enumerate(outputs.tasks):
        found.update({f"head/task{task}/{name}": value for name, value in maps.items()})
    return model, found, outputs


def assert_stages(golden, found):
    names = stages(golden)
    assert set(names) <= set(found), sorted(set(names) - set(found))
    for name in names:
        if name.startswith(SPLAT):
            assert_stage(golden, name, found[name], most=AFTER_SPLAT, strays=STRAYS)
        else:
            assert_stage(golden, name, found[name], most=BEFORE_SPLAT)


def geometry(model, batch):
    """Where every moment's frustum lies, by the number of the moment."""
    own = not model.config.aligned
    return [
        frustum_points(moment_cameras(batch, moment, own=own), model.image)
        for moment in range(model.image.moments)
    ]


def assert_decoded(model, golden, outputs):
    # Random heads hold many nearly equal scores, whose order rounding decides, and with it which
    # of two overlapping boxes stays: all but a few boxes must be among the others.
    (decoded,) = model.decode(outputs.tasks, torch.ones(1))
    stored = ours(golden["decoded/boxes_bottomcenter"], model.config.convention, bottom=True)
    assert len(decoded) == pytest.approx(len(stored), abs=3)
    off = (decoded.boxes[:, None] - stored).abs()
    off[..., 6] = wrap_angle(decoded.boxes[:, None, 6] - stored[:, 6]).abs()
    same = (off < 1e-2).all(dim=-1)
    same &= decoded.labels[:, None] == torch.from_numpy(golden["decoded/labels"])
    same &= (decoded.scores[:, None] - torch.from_numpy(golden["decoded/scores"])).abs() < 1e-3
    assert same.any(dim=0).float().mean() > 0.98


@pytest.mark.parametrize("path", networks("network 1"))
def test_parity_of_the_first_generation(path):
    golden = np.load(path)
    batch = first_batch(golden)
    config = bevdepth_r50l() if len(batch.rots[0]) == 2 else public.bevdepth_r50l_single()
    model, found, outputs = run(sized(config, golden), golden, batch)
    for moment, points in enumerate(geometry(model, batch)):
        found["geometry" if not moment else f"geometry_call{moment}"] = points
    assert_stages(golden, found)
    assert_decoded(model, golden, outputs)


def second_config(golden, path):
    """Which of G2's networks a file is of. Frames and tasks show in its contents, a deformable
    convolution only in its name."""
    moments = golden["in/img_shape"][1] // 6
    if "head/task1/heatmap/shape" in golden.files:
        if moments > 1:
            config = public.bevdet4d_r50_depth()
        else:
            dcn = "dcn" in path.stem
            config = public.bevdepth_r50_g2_dcn() if dcn else public.bevdepth_r50_g2()
    else:
        config = public.bevdet_r50_4d_depth()
    assert moments in (1, config.image.moments), path
    return config


@pytest.mark.parametrize("path", networks("network 2"))
def test_parity_of_the_second_generation(path):
    golden = np.load(path)
    batch = second_batch(golden)
    model, found, outputs = run(sized(second_config(golden, path), golden), golden, batch)
    numbers = camera_numbers(moment_cameras(batch, 0))
    np.testing.assert_allclose(numbers, golden["mlp_input"][0], rtol=1e-5, atol=1e-5)
    for moment, points in enumerate(geometry(model, batch)):
        found["lidar_coor" if not moment else f"lidar_coor_call{moment}"] = points
    assert_stages(golden, found)
    assert_decoded(model, golden, outputs)


@pytest.mark.parametrize("path", files("keys"))
def test_parity_of_keys(path):
    """Every stored list is that of a preset, and a checkpoint of it loads without a rest."""
    keys = stored_keys(path)
    names = checkpoints.presets_of(keys)
    assert names, path.name
    with torch.device("meta"):
        model = models.build(names[-1])
    model.to_empty(device="cpu")
    state = {name: torch.full((), 0.5).expand(shape) for name, shape in keys.items()}
    report = checkpoints.load(model, {"meta": {}, "state_dict": state})
    assert report.missing == report.unexpected == ()
    assert set(report.ignored) == set(keys) & set(REBUILT)
    assert set(report.loaded) == set(keys) - set(REBUILT)
    assert all((value == 0.5).all() for value in model.parameters())
    if "bevdepth-r50l" in names:
        assert sum(value.numel() for value in model.parameters()) == 53_217_566


@pytest.mark.skipif(not kinds(), reason=f"no parity files under {FOLDER}: set FD3D_PARITY")
def test_parity_files_are_all_known():
    unknown = [path.name for path, kind in kinds().items() if not kind]
    assert not unknown
