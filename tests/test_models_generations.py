"""BEVDet's second generation, and that neither is mistaken for the other."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_models_network import ring_batch
from torch.nn import functional

from fd3d import models
from fd3d.boxes import YAW, wrap_angle
from fd3d.classes import ONE_TASK
from fd3d.data.frames import FrameDataset
from fd3d.data.images import ImageSpec
from fd3d.errors import UsageError
from fd3d.evaluation import frame_results
from fd3d.grid import BEVGrid
from fd3d.models import presets
from fd3d.models.bevdepth.camera_aware import camera_numbers
from fd3d.models.bevdepth.codes import decode_codes, encode
from fd3d.models.bevdepth.decode import decode
from fd3d.models.bevdepth.head import BRANCHES
from fd3d.models.bevdepth.losses import depth_loss
from fd3d.models.bevdepth.network import BEVDepth, moment_cameras
from fd3d.models.bevdepth.targets import make_targets
from fd3d.models.deformable import GroupedDeformableConv2d

PLACES = {"lidar": "old", "ego": "new"}


def narrow(moments):
    """A second-generation network that a CPU runs in no time."""
    base = presets.bevdepth_tiny_l()
    image = replace(base.image, moments=moments, frame="ego", channels="bgr", depth_cells="floor")
    return replace(
        base,
        image=image,
        grid=replace(base.grid, frame="ego"),
        depth_net="aware",
        aspp=8,
        aligned=False,
        pre_process_blocks=1 if moments > 1 else 0,
        convention="new",
        displacement=False,
        loss=replace(base.loss, parts=0.0, depth_form="softmax-bce"),
    )


def batch_for(model, **options):
    """The first generation's batch of noise, told as one of the second."""
    batch, moments = ring_batch(model, **options), model.image.moments
    numbers = [0, *[1] * (moments - 1)]
    fields = ("rots", "trans", "intrins", "post_rots", "post_trans")
    changed = {name: getattr(batch, name)[:, numbers] for name in fields}
    return replace(batch, images=batch.images[:, :, numbers], **changed)


@pytest.mark.parametrize("moments", [1, 2, 3])
def test_second_generation_networks_train_and_decode(moments):
    torch.manual_seed(0)
    model = BEVDepth(narrow(moments)).train()
    batch = batch_for(model)
    images = batch.images.clone().requires_grad_()
    terms = model.loss(model(replace(batch, images=images)), batch)
    sum(terms.values()).backward()
    assert all(value.grad is not None for value in model.parameters())
    assert all(torch.isfinite(value) for value in terms.values())
    assert images.grad[:, :, 0].abs().sum() > 0 and not images.grad[:, :, 1:].any()
    with torch.no_grad():
        (found, _) = model.eval().decode(model(batch).tasks, torch.zeros(2))
    assert found.frame == "ego"


def test_adjacent_moments_are_lifted_with_their_own_poses():
    model = BEVDepth(narrow(2)).eval()
    batch = batch_for(model)
    trans = batch.trans.clone()
    trans[:, 1, :, 0] += 5.0
    with torch.no_grad():
        difference = model(batch).bev - model(replace(batch, trans=trans)).bev
    assert difference.abs().max() > 1e-4


def test_plain_depth_knows_nothing_of_the_cameras():
    config = narrow(1)
    loss = replace(config.loss, depth=0.0)
    model = BEVDepth(replace(config, depth_net="plain", loss=loss)).eval()
    batch = batch_for(model)
    with torch.no_grad():
        outputs = model(batch)
        other = model(replace(batch, intrins=batch.intrins * 1.5))
    assert torch.equal(outputs.depth_logits, other.depth_logits)
    assert "depth" not in model.loss(outputs, batch)


def test_camera_numbers_are_told_without_the_augmentation_and_with_it():
    model = BEVDepth(narrow(1))
    batch = batch_for(model)
    turn = torch.tensor([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]) * 1.03
    augment = turn.expand(2, 3, 3)
    moved = replace(
        batch,
        rots=augment[:, None, None] @ batch.rots,
        trans=batch.trans @ turn.T,
        bev_augment=augment,
    )
    plain, told = (camera_numbers(moment_cameras(item, 0)) for item in (batch, moved))
    torch.testing.assert_close(plain[:, 15:], told[:, 15:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(told[0, 10:15], torch.tensor([0.824, -0.618, 0.618, 0.824, 1.03]))
    torch.testing.assert_close(plain[0, 10:15], torch.tensor([1.0, 0, 0, 1, 1]))


def test_a_grouped_deformable_convolution_without_offsets_is_a_grouped_one():
    torch.manual_seed(0)
    conv = GroupedDeformableConv2d(8, 12, groups=4)
    x = torch.randn(2, 8, 5, 7)
    plain = functional.conv2d(x, conv.weight, padding=1, groups=4)
    torch.testing.assert_close(conv(x), plain, atol=1e-5, rtol=1e-5)


def test_the_second_generation_depth_loss_is_the_sum_over_bins_of_seen_cells():
    image = ImageSpec(height=32, width=48, depth_range=(1.0, 60.0, 0.5))
    logits = torch.randn(1, 118, 2, 3, generator=torch.Generator().manual_seed(0))
    depth = torch.zeros(1, 1, 2, 3)
    depth[0, 0, 0, 1], depth[0, 0, 1, 2] = 1.2, 59.9
    expected = 0.0
    for row, column, wanted in ((0, 1, 0), (1, 2, 117)):
        one_hot = torch.zeros(118)
        one_hot[wanted] = 1.0
        chances = logits[0, :, row, column].softmax(dim=0)
        expected += functional.binary_cross_entropy(chances, one_hot, reduction="sum") / 2
    torch.testing.assert_close(depth_loss(logits, depth, image, "softmax-bce"), expected)
    assert depth_loss(logits, torch.zeros_like(depth), image, "softmax-bce") == 0


def test_codes_of_a_car_by_hand():
    """A car 2 wide and 4.5 long that heads along +x."""
    car = torch.tensor([[0.0, 0.0, 0.0, 2.0, 4.5, 1.5, 0.0, 3.0, 0.0]])
    old, new = (encode(car, torch.zeros(1, 2), name)[0] for name in ("old", "new"))
    torch.testing.assert_close(old[3:6].exp(), torch.tensor([2.0, 4.5, 1.5]))
    torch.testing.assert_close(new[3:6].exp(), torch.tensor([4.5, 2.0, 1.5]))
    # Before 1.0 yaw runs clockwise from -y: the heading +x is a quarter turn back.
    torch.testing.assert_close(old[6:8], torch.tensor([-1.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(new[6:8], torch.tensor([0.0, 1.0]), atol=1e-6, rtol=0)


def maps_from(targets, grid):
    """Head maps of one frame that say exactly what the targets ask for."""
    (target,) = targets
    codes = torch.zeros(1, 10, grid.ny * grid.nx)
    codes[target.frame, :, target.cell] = target.codes
    maps = codes.view(1, 10, grid.ny, grid.nx).split(list(BRANCHES.values()), dim=1)
    heat = torch.logit((target.heatmap * 0.9).where(target.heatmap == 1, 1e-3))
    return ({**dict(zip(BRANCHES, maps, strict=True)), "heatmap": heat},)


def through(data, place, *, wrote, reads):
    """Annotated boxes of a data set to targets, head maps, detections and submission rows: the
    errors of length in metres, of size as 1 - IoU, and of yaw, by the convention of each end."""
    index = data.open()
    image = ImageSpec(height=64, width=176, stride=8, frame=place, moments=1)
    grid = BEVGrid.square(half_extent=51.2, cells=512, frame=place)
    nms = tuple(replace(one, threshold=0.0, keep=500) for one in presets.ONE_TASK_NMS)
    config = replace(presets.bevdepth_tiny_l().decode, nms=nms)
    position = int(index.split(data.split)[0])
    (batch, frame) = (
        FrameDataset(index=index, positions=[position], image=image, truth=True)[0],
        index.frame(position),
    )
    shared = {"dt": torch.ones(1), "grid": grid}
    targets = make_targets(
        boxes=batch.boxes, labels=batch.labels, tasks=ONE_TASK, convention=wrote, **shared
    )
    maps = maps_from(targets, grid)
    (found,) = decode(maps, shared["dt"], grid=grid, config=config, convention=reads)
    rows = frame_results(frame, found)
    centres = np.array([row["translation"] for row in rows])
    away = np.linalg.norm(frame.boxes[:, None, :3] - centres, axis=2)
    truth, sizes = frame.boxes[away.argmin(axis=0)], np.array([row["size"] for row in rows])
    volumes = [np.prod(size, axis=1) for size in (truth[:, 3:6], sizes)]
    shared_volume = np.prod(np.minimum(truth[:, 3:6], sizes), axis=1)
    w, x, y, z = np.array([row["rotation"] for row in rows]).T
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    return {
        "boxes": len(rows),
        "place": away.min(axis=0).max(),
        "scale": (1 - shared_volume / (sum(volumes) - shared_volume)).max(),
        "yaw": np.abs(wrap_angle(yaw - truth[:, YAW])),
    }


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["synthetic", "real_keyframe"])
def test_truth_comes_back_through_head_and_submission(name, place, request):
    data = request.getfixturevalue(name)
    convention = PLACES[place]
    errors = through(data, place, wrote=convention, reads=convention)
    assert errors["boxes"] > 5
    assert errors["place"] < 2e-5 and errors["scale"] < 1e-5 and errors["yaw"].max() < 1e-5


@pytest.mark.parametrize("place", PLACES)
def test_mixed_conventions_would_be_seen(place, synthetic):
    """What users meet as mASE 0.7 and mAOE 1.5: sizes swapped and headings turned."""
    convention = PLACES[place]
    (other,) = set(PLACES.values()) - {convention}
    errors = through(synthetic, place, wrote=convention, reads=other)
    assert errors["scale"] > 0.3 and np.median(errors["yaw"]) > 0.3


@pytest.mark.parametrize("name", models.names())
def test_presets_pair_frame_and_convention(name):
    """A network of one generation has nothing of the other's."""
    with torch.device("meta"):
        config = models.build(name).config
    assert config.convention == PLACES[config.grid.frame]
    assert config.image.channels == {"old": "rgb", "new": "bgr"}[config.convention]
    assert config.image.depth_cells == {"old": "round", "new": "floor"}[config.convention]
    assert config.aligned == (config.convention == "old")
    assert config.displacement == (config.convention == "old" and config.image.moments == 2)
    assert (
        config.depth_net
        in {"old": ("gated", "plain"), "new": ("aware", "plain")}[config.convention]
    )


def test_codes_round_trip_in_either_convention():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(50, 9, generator=generator) * 4 + 0.3
    boxes[:, YAW] = torch.linspace(-math.pi, math.pi - 0.01, 50)
    for convention in PLACES.values():
        codes = encode(boxes, torch.zeros(50, 2), convention)
        back = decode_codes(codes, boxes[:, 0], boxes[:, 1], convention)
        back[:, YAW] = wrap_angle(back[:, YAW] - boxes[:, YAW]) + boxes[:, YAW]
        torch.testing.assert_close(back, boxes, atol=1e-5, rtol=1e-5)


def ego_frames(data, moments):
    image = ImageSpec(height=64, width=176, stride=8, frame="ego", moments=moments, channels="bgr")
    index = data.open()
    frames = FrameDataset(index=index, positions=np.arange(len(index)), image=image, truth=True)
    return index, frames


def test_previous_keyframes_are_loaded_and_repeat_the_first_at_the_start(synthetic):
    index, frames = ego_frames(synthetic, 3)
    rgb = replace(frames.image, channels="rgb", moments=1)
    single = FrameDataset(index=index, positions=frames.positions, image=rgb, truth=False)
    starts = [n for n in range(len(index)) if index.frame(n).scene != index.frame(n - 1).scene]
    last = starts[-1]
    for position, expected in ((last, [0, 0]), (last + 1, [-1, 0]), (last + 2, [-1, -2])):
        batch = frames[position]
        assert batch.images.shape == (1, 6, 3, 3, 64, 176)
        for moment, step in enumerate(expected, start=1):
            source = (single[position + step].images * 0.229 + 0.485)[:, :, 0, 0]
            # Red of the plain picture is the last plane here, under blue's numbers.
            here = (batch.images[:, :, moment, 2] * 0.225) + 0.406
            torch.testing.assert_close(here, source, atol=1e-4, rtol=0)
    assert frames[last].dt == 0 and frames[last + 1].dt > 0.1


def test_both_frames_see_a_world_point_at_the_same_pixel(synthetic):
    index, frames = ego_frames(synthetic, 2)
    image = ImageSpec(height=64, width=176, stride=8)
    lidar = FrameDataset(index=index, positions=[2], image=image, truth=True)[0]
    ego, frame = frames[2], index.frame(2)
    # The cameras stand in the first camera's ego frame.
    poses = {"lidar": frame.pose("lidar"), "ego": frame.cameras[0].ego2global}
    world = frame.pose("lidar") @ [8.0, 15.0, 0.3, 1.0]
    seen = []
    for batch, pose in ((lidar, poses["lidar"]), (ego, poses["ego"])):
        point = torch.from_numpy((np.linalg.inv(pose) @ world)[:3])
        away = point - batch.trans[0, 0].double()
        local = torch.linalg.solve(batch.rots[0, 0].double(), away[..., None])
        pixel = batch.intrins[0, 0].double() @ local
        seen.append(pixel[..., 0] / pixel[:, 2:, 0])
    torch.testing.assert_close(seen[0], seen[1], atol=2e-2, rtol=1e-4)
    torch.testing.assert_close(lidar.depth > 0, ego.depth > 0)


def test_specs_and_configs_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="3 moments are not possible in the lidar frame"):
        ImageSpec(height=64, width=176, moments=3)
    with pytest.raises(UsageError, match="channels 'grb' is not known: use one of rgb, bgr"):
        ImageSpec(height=64, width=176, channels="grb")
    config = presets.bevdepth_tiny_l()
    with pytest.raises(UsageError, match="the grid lies in the ego frame but the image spec says"):
        replace(config, grid=replace(config.grid, frame="ego"))
    with pytest.raises(UsageError, match="convention 'newer' is not known: use one of old, new"):
        replace(config, convention="newer")
