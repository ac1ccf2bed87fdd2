import math
from dataclasses import replace

import pytest
import torch

from fd3d import models
from fd3d.classes import CLASSES
from fd3d.data.batch import Batch
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid
from fd3d.models import checkpoints, presets
from fd3d.models.bevdepth.network import BEVDepth, moment_cameras
from fd3d.models.bevdepth.view_transform import frustum_points

DIRECTIONS = (55, 0, -55, 110, 180, -110)  # degrees to the left of forward


def ring_batch(model, frames=2, boxes=6):
    """A batch of noise seen by six nuScenes-like cameras; the car moved 2 m between moments."""
    image, generator = model.image, torch.Generator().manual_seed(1)
    height, width = image.depth_shape
    scale = image.width / 1600
    rots = torch.stack([camera_rotation(angle) for angle in DIRECTIONS])
    intrins = torch.tensor([[1266.0, 0, 800], [0, 1266, 450], [0, 0, 1]])
    post_trans = torch.tensor([0.0, image.height - 900 * scale, 0.0])
    trans = torch.zeros(frames, 2, 6, 3)
    trans[:, 1, :, 1] = -2.0
    truth = torch.rand(frames, boxes, 9, generator=generator) * 4 + 0.5
    truth[..., :2] = torch.rand(frames, boxes, 2, generator=generator) * 100 - 50
    depth = torch.rand(frames, 6, height, width, generator=generator) * 80
    return Batch(
        tokens=tuple(f"frame{index}" for index in range(frames)),
        images=torch.randn(frames, 6, 2, 3, image.height, image.width, generator=generator),
        rots=rots.expand(frames, 2, 6, 3, 3).clone(),
        trans=trans,
        intrins=intrins.expand(frames, 2, 6, 3, 3).clone(),
        post_rots=torch.diag(torch.tensor([scale, scale, 1.0])).expand(frames, 2, 6, 3, 3).clone(),
        post_trans=post_trans.expand(frames, 2, 6, 3).clone(),
        dt=torch.full((frames,), 1.5),
        depth=torch.where(depth < 60, depth, 0.0),
        boxes=tuple(truth),
        labels=tuple(torch.randint(0, 10, (frames, boxes), generator=generator)),
    )


def camera_rotation(degrees):
    """Columns: the camera's right, down and forward in the lidar frame (y forward, z up)."""
    angle = math.radians(degrees + 90)
    forward = torch.tensor([math.cos(angle), math.sin(angle), 0.0])
    down = torch.tensor([0.0, 0.0, -1.0])
    return torch.stack([torch.linalg.cross(down, forward), down, forward], dim=1)


@pytest.fixture(scope="module")
def low():
    torch.manual_seed(0)
    return models.build("bevdepth-tiny-l")


@pytest.fixture
def batch(low):
    return ring_batch(low)


def test_unknown_names_are_refused_with_the_list():
    with pytest.raises(UsageError, match="bevdepth-tiny-x.*bevdepth-r50h.*bevdepth-tiny-l"):
        models.build("bevdepth-tiny-x")


@pytest.mark.parametrize("name", models.names())
def test_presets_say_what_they_are(name):
    with torch.device("meta"):
        model = models.build(name)
    assert model.name == name == model.config.name
    assert model.grid.frame == model.image.frame
    assert model.grid.x_max == (25.6 if "tiny" in name else 51.2)
    assert sum(model.config.tasks, ()) == CLASSES
    # The full-size networks train as G1; the tiny ones learn no speed from boxes without one.
    assert model.config.loss.nan_velocity == ("ignore" if "tiny" in name else "zero")


def test_expert_and_apprentice_of_a_pair_have_the_same_tensors():
    for pair in (("bevdepth-tiny-h", "bevdepth-tiny-l"), ("bevdepth-r50h", "bevdepth-r50l")):
        with torch.device("meta"):
            high, low = (models.build(name).state_dict() for name in pair)
        assert {k: v.shape for k, v in high.items()} == {k: v.shape for k, v in low.items()}


def test_forward_shapes_and_scores(low, batch):
    with torch.no_grad():
        outputs = low.eval()(batch.without_truth())
    assert outputs.bev.shape == (2, low.bev_channels, *low.grid.shape)
    assert outputs.depth_logits.shape == (12, low.image.depth_bins, *low.image.depth_shape)
    heat = low.heatmaps(outputs.tasks)
    assert heat.shape == (2, 10, *low.grid.shape) and heat.min() >= 0 and heat.max() <= 1
    again = low.head(outputs.bev)
    for one, two in zip(outputs.tasks, again, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(low.decode(outputs.tasks, batch.dt)) == 2


def test_frames_of_a_batch_are_independent_at_test_time(low, batch):
    low.eval()
    alone = replace(
        batch,
        tokens=batch.tokens[1:],
        **{
            name: getattr(batch, name)[1:]
            for name in ("images", "rots", "trans", "intrins", "post_rots", "post_trans", "dt")
        },
    ).without_truth()
    with torch.no_grad():
        both, one = low(batch.without_truth()), low(alone)
    torch.testing.assert_close(both.bev[1:], one.bev, atol=1e-4, rtol=1e-4)


def test_training_reaches_every_tensor_but_not_the_adjacent_moment(low, batch):
    low.train()
    images = batch.images.clone().requires_grad_()
    batch = replace(batch, images=images)
    terms = low.loss(low(batch), batch)
    low.zero_grad()
    sum(terms.values()).backward()
    assert all(value.grad is not None for value in low.parameters())
    assert images.grad[:, :, 0].abs().sum() > 0
    assert images.grad[:, :, 1].abs().sum() == 0
    assert all(torch.isfinite(value) for value in terms.values())


def test_both_moments_teach_the_batch_norms(low, batch):
    low.train()
    before = low.img_backbone.bn1.num_batches_tracked.item()
    head_before = low.pts_bbox_head.shared_conv.bn.num_batches_tracked.item()
    low(batch)
    assert low.img_backbone.bn1.num_batches_tracked.item() == before + 2
    assert low.pts_bbox_head.shared_conv.bn.num_batches_tracked.item() == head_before + 1


def test_the_adjacent_moment_changes_the_map(low, batch):
    low.eval()
    images = batch.images.clone()
    images[:, :, 1] = 0
    with torch.no_grad():
        difference = low(batch).bev - low(replace(batch, images=images)).bev
    assert difference.abs().max() > 1e-3


def test_own_optics_of_the_adjacent_moment_are_used(low, batch):
    low.eval()
    intrins = batch.intrins.clone()
    intrins[:, 1, :, 0, 0] *= 1.5
    with torch.no_grad():
        difference = low(batch).bev - low(replace(batch, intrins=intrins)).bev
    assert difference.abs().max() > 1e-4


def test_a_few_steps_lower_the_loss(batch):
    torch.manual_seed(0)
    model = models.build("bevdepth-tiny-l").train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        loss = sum(model.loss(model(batch), batch).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_bfloat16_autocast_stays_finite_and_near(low, batch):
    low.eval()
    with torch.no_grad():
        plain = low(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            coarse = low(batch)
            terms = low.loss(coarse, batch)
    assert all(torch.isfinite(value) and value.dtype == torch.float32 for value in terms.values())
    scale = plain.bev.std()
    assert (coarse.bev.float() - plain.bev).abs().mean() < 0.1 * scale
    assert low.heatmaps(coarse.tasks).dtype == torch.float32


def test_bfloat16_training_reaches_the_backbone(low, batch):
    low.train()
    low.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = low(batch)
    sum(low.loss(outputs, batch).values()).backward()
    gradient = low.img_backbone.conv1.weight.grad
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_the_deformable_variant_runs_in_both_precisions(batch):
    torch.manual_seed(0)
    config = replace(presets.bevdepth_tiny_l(), deformable=True)
    model = BEVDepth(config).train()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs = model(batch)
        sum(model.loss(outputs, batch).values()).backward()
        gradient = model.img_view_transformer.dcn[0].conv_offset.weight.grad
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_frusta_invert_the_projection(low, batch):
    """Every frustum point, projected by the rule in `Batch`, falls on its own pixel and depth."""
    points = frustum_points(moment_cameras(batch, 0), low.image)
    local = torch.einsum(
        "bnji,bndhwj->bndhwi", batch.rots[:, 0], points - batch.trans[:, 0, :, None, None, None]
    )
    image = torch.einsum("bnij,bndhwj->bndhwi", batch.intrins[:, 0], local)
    pixel = torch.cat([image[..., :2] / image[..., 2:], torch.ones_like(image[..., :1])], dim=-1)
    pixel = torch.einsum("bnij,bndhwj->bndhwi", batch.post_rots[:, 0], pixel)
    pixel = pixel + batch.post_trans[:, 0, :, None, None, None]
    _, _, bins, height, width, _ = points.shape
    first, _, step = low.image.depth_range
    expected = torch.stack(
        torch.broadcast_tensors(
            torch.linspace(0, low.image.width - 1, width).view(1, 1, width),
            torch.linspace(0, low.image.height - 1, height).view(1, height, 1),
        ),
        dim=-1,
    )
    torch.testing.assert_close(
        pixel[..., :2], expected.expand_as(pixel[..., :2]), atol=1e-2, rtol=0
    )
    depths = (first + step * torch.arange(bins)).view(-1, 1, 1).expand(local.shape[:-1])
    torch.testing.assert_close(local[..., 2], depths, atol=1e-3, rtol=0)


def test_a_single_moment_is_refused(low, batch):
    with pytest.raises(UsageError, match="needs 2 moments"):
        low(replace(batch, images=batch.images[:, :, :1]))


def test_the_loss_refuses_batches_without_truth(low, batch):
    with pytest.raises(UsageError, match="load the frames with truth"):
        low.loss(low(batch), batch.without_truth())


def test_mismatched_configs_are_refused():
    config = presets.bevdepth_tiny_l()
    with pytest.raises(UsageError, match="stride 8 but the image spec says 16"):
        replace(config, image=replace(config.image, stride=16))
    with pytest.raises(UsageError, match="1 tasks need as many NMS settings, not 6"):
        replace(config, decode=presets.bevdepth_r50l().decode)
    with pytest.raises(UsageError, match="cells that divide by 4"):
        replace(config, grid=BEVGrid.square(half_extent=51.2, cells=34))


def test_a_checkpoint_of_the_expert_is_not_one_of_the_apprentice(low, tmp_path):
    checkpoints.save(tmp_path / "low", low)
    with pytest.raises(UsageError, match="holds bevdepth-tiny-l.*bevdepth-tiny-h"):
        checkpoints.load(models.build("bevdepth-tiny-h"), tmp_path / "low")
