"""Every stage of the networks against stored tensors of the original code; see `parity_files`."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from parity_files import (
    assert_stage,
    drawn_images,
    drawn_weights,
    files,
    kinds,
    stages,
    stored_keys,
)

from fd3d.data.batch import Batch
from fd3d.grid import BEVGrid
from fd3d.models import presets
from fd3d.models.bevdepth.network import BEVDepth, moment_cameras
from fd3d.models.bevdepth.view_transform import frustum_points
from fd3d.models.checkpoints import REBUILT

# The largest difference relative to a stage's largest magnitude. Rounding moves a few frustum
# points across a cell's border, so that from the splat on some values may differ by more.
BEFORE_SPLAT, AFTER_SPLAT, STRAYS = 1e-5, 1e-4, 1e-2
SPLAT = ("view_bev", "pre_process", "shifted_adj", "bev_", "head/")
# Higher pictures than this take long: they run with `pytest -m slow`.
QUICK_HEIGHT = 128


def networks(*wanted):
    """The network files, those with large pictures marked slow, the two-frame ones only."""
    found = []
    for case in files(*wanted):
        if case.values[0] is None:
            return [case]
        with np.load(case.values[0]) as golden:
            _, pictures, _, height, _ = golden["in/img_shape"]
        marks = [pytest.mark.slow] if height > QUICK_HEIGHT else []
        if pictures == 12:
            found.append(pytest.param(case.values[0], id=case.id, marks=marks))
    return found


def first_batch(golden):
    def field(name):
        value = torch.from_numpy(golden[f"in/{name}"])
        return value.view(1, 2, 6, *value.shape[2:])

    return Batch(
        tokens=("golden",),
        images=drawn_images(golden),
        rots=field("rots"),
        trans=field("trans"),
        intrins=field("intrin"),
        post_rots=field("post_rot"),
        post_trans=field("post_tran"),
        dt=torch.ones(1),
    )


def watch(model):
    """Stage name -> tensor, filled while the model runs."""
    found = {}
    view = model.img_view_transformer

    def note(module, name, pick=lambda output: output):
        def hook(_, __, output):
            found[name if name not in found else f"{name}_call1"] = pick(output)

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
    model.load_state_dict(drawn_weights(shapes, int(golden["in/weight_seed"])))
    found = watch(model)
    with torch.no_grad():
        outputs = model(batch)
    found["bev_encoder_out"] = outputs.bev
    for task, maps in enumerate(outputs.tasks):
        found.update({f"head/task{task}/{name}": value for name, value in maps.items()})
    return model, found, outputs


def assert_stages(golden, found):
    names = stages(golden)
    assert set(names) <= set(found), sorted(set(names) - set(found))
    for name in names:
        after = name.startswith(SPLAT)
        most = AFTER_SPLAT if after else BEFORE_SPLAT
        assert_stage(golden, name, found[name], most=most, strays=STRAYS if after else 0.0)


@pytest.mark.parametrize("path", networks("network 1"))
def test_parity_of_every_stage(path):
    golden = np.load(path)
    config = sized(presets.bevdepth_r50l(), golden)
    batch = first_batch(golden)
    model, found, outputs = run(config, golden, batch)
    for moment, name in enumerate(("geometry", "geometry_call1")):
        found[name] = frustum_points(moment_cameras(batch, moment), config.image)
    assert_stages(golden, found)
    # Random heads hold many nearly equal scores, whose order rounding decides.
    (decoded,) = model.decode(outputs.tasks, batch.dt)
    stored = np.sort(golden["decoded/scores"])
    assert len(decoded) == len(stored)
    np.testing.assert_allclose(decoded.scores.sort()[0], stored, atol=1e-4)


@pytest.mark.parametrize("preset", [presets.bevdepth_r50h, presets.bevdepth_r50l])
def test_parity_of_keys_and_shapes(preset):
    with torch.device("meta"):
        model = BEVDepth(preset())
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    lists = [stored_keys(path) for path, kind in kinds().items() if kind == "keys"]
    if not lists:
        pytest.skip("no key lists beside this repository: set FD3D_PARITY to their folder")
    kept = [{key: keys[key] for key in keys if key not in REBUILT} for keys in lists]
    assert shapes in kept
    assert sum(value.numel() for value in model.parameters()) == 53_217_566
