import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fd3d.boxes import VX, VY
from fd3d.classes import CAMERAS
from fd3d.data import frames
from fd3d.data.batch import collate
from fd3d.data.frames import FrameDataset, drawn_choice
from fd3d.data.images import ImageSpec
from fd3d.data.index import FrameIndex
from fd3d.data.placement import ego_motion, keyframe_moments, sweep_moments
from fd3d.errors import UsageError

IMAGE = ImageSpec(height=64, width=176, stride=8)


@pytest.fixture(scope="module")
def index(synthetic):
    return synthetic.open()


def _dataset(index, **options) -> FrameDataset:
    given = {"positions": np.arange(len(index)), "image": IMAGE, "truth": True, **options}
    return FrameDataset(index=index, **given)


def _same(one, other) -> bool:
    return torch.equal(one.images, other.images) and torch.equal(one.rots, other.rots)


def _pixels(batch, points: torch.Tensor, camera: int, moment: int = 0) -> torch.Tensor:
    """(P, 3) network u, v and depth of points in the batch's LIDAR frame."""
    rots, trans = batch.rots[0, moment, camera], batch.trans[0, moment, camera]
    seen = torch.linalg.solve(rots.double(), (points - trans).double().T)
    image = batch.intrins[0, moment, camera].double() @ seen
    image = torch.cat([image[:2] / image[2:], torch.ones(1, image.shape[1])])
    post = batch.post_rots[0, moment, camera].double() @ image
    uv = post + batch.post_trans[0, moment, camera].double()[:, None]
    return torch.cat([uv[:2], seen[2:]]).T


def test_a_batch_has_the_promised_shapes_and_collates(index):
    dataset = _dataset(index)
    batch = collate([dataset[0], dataset[1]])
    assert batch.tokens == tuple(dataset.tokens[:2])
    assert batch.images.shape == (2, 6, 2, 3, 64, 176) and batch.images.dtype == torch.float32
    assert batch.rots.shape == batch.intrins.shape == batch.post_rots.shape == (2, 2, 6, 3, 3)
    assert batch.trans.shape == batch.post_trans.shape == (2, 2, 6, 3)
    assert batch.dt.shape == (2,) and (batch.dt > 0).all()
    assert batch.depth.shape == (2, 6, 8, 22)
    assert [len(boxes) for boxes in batch.boxes] == [len(labels) for labels in batch.labels]
    inference = _dataset(index, truth=False)[0]
    assert inference.depth is None and inference.boxes is None and inference.labels is None


def test_points_project_as_through_the_global_frame(index):
    batch, frame = _dataset(index)[2], index.frame(2)
    rng = np.random.default_rng(0)
    points = rng.uniform(-30, 30, size=(200, 3)) * [1, 1, 0.05]
    now = frame.ego2global @ frame.lidar2ego
    in_global = points @ now[:3, :3].T + now[:3, 3]
    for camera, shot in enumerate(frame.cameras):
        to_camera = np.linalg.inv(shot.ego2global @ shot.camera2ego)
        seen = in_global @ to_camera[:3, :3].T + to_camera[:3, 3]
        ahead = seen[:, 2] > 1
        stored = seen[ahead] @ shot.intrinsic.T
        stored = stored[:, :2] / stored[:, 2:]
        # The test view of a 352x198 picture: halved, the bottom 64 rows kept.
        expected = stored * 0.5 - [0, 99 - 64]
        found = _pixels(batch, torch.from_numpy(points[ahead]), camera).numpy()
        np.testing.assert_allclose(found[:, :2], expected, atol=0.05)
        np.testing.assert_allclose(found[:, 2], seen[ahead, 2], atol=1e-3)


def test_the_adjacent_cameras_carry_the_ego_motion(index):
    position = 3
    batch, frame, adjacent = (
        _dataset(index)[position],
        index.frame(position),
        index.adjacent(position, 5),
    )
    point = np.array([412.0, 1180.0, 2.0, 1.0])
    then = np.linalg.inv(adjacent.ego2global @ frame.lidar2ego) @ point
    now = np.linalg.inv(frame.ego2global @ frame.lidar2ego) @ point
    np.testing.assert_allclose(ego_motion(frame, adjacent) @ then, now, atol=1e-6)
    motion = ego_motion(frame, adjacent)
    np.testing.assert_allclose(
        batch.trans[0, 1], batch.trans[0, 0].numpy() @ motion[:3, :3].T + motion[:3, 3], atol=1e-4
    )
    np.testing.assert_allclose(
        batch.rots[0, 1], motion[:3, :3] @ batch.rots[0, 0].numpy(), atol=1e-5
    )
    assert batch.dt[0] == pytest.approx(adjacent.seconds)
    assert not torch.equal(batch.images[:, :, 0], batch.images[:, :, 1])


def test_lidar_depths_lie_where_their_points_project(index):
    from fd3d.data.depth import load_points

    batch, frame = _dataset(index)[1], index.frame(1)
    points = torch.from_numpy(load_points(index.dataroot / frame.lidar_file).copy())
    for camera in range(6):
        seen = _pixels(batch, points, camera).numpy()
        filled = np.argwhere(batch.depth[0, camera].numpy() > 0)
        assert len(filled) > 0
        for row, column in filled[:: max(1, len(filled) // 10)]:
            depth = float(batch.depth[0, camera, row, column])
            point = seen[np.abs(seen[:, 2] - depth) < 1e-3]
            off = np.abs(point[:, :2] / IMAGE.stride - [column, row]).max(axis=1)
            assert off.min() <= 0.51


def test_boxes_are_seen_and_strictly_inside(index, monkeypatch):
    monkeypatch.setattr(frames, "HALF_EXTENT", 30.0)
    for position, batch in enumerate(_dataset(index)[i] for i in range(4)):
        frame = index.frame(position)
        boxes = frame.boxes_in("lidar")
        kept = frame.seen() & (np.abs(boxes[:, :2]) < 30.0).all(axis=1)
        assert kept.any() and not kept.all()
        np.testing.assert_allclose(batch.boxes[0], boxes[kept], atol=1e-3)
        np.testing.assert_array_equal(batch.labels[0], frame.labels[kept])


def test_unknown_velocities_stay_unknown(index, monkeypatch):
    frame = index.frame(1)
    boxes = frame.boxes.copy()
    boxes[::2, VX : VY + 1] = np.nan
    monkeypatch.setattr(index, "frame", lambda position: replace(frame, boxes=boxes))
    monkeypatch.setattr(frames, "HALF_EXTENT", 1e3)
    for options in ({}, {"bev_augment": True}):
        (found,) = _dataset(index, **options)[1].boxes
        expected = np.isnan(boxes[frame.seen()])
        assert expected.any() and not expected.all()
        np.testing.assert_array_equal(np.isnan(found), expected)


def test_draws_depend_on_seed_epoch_and_token_alone(index):
    options = {"adjacent": "draw", "image_augment": True, "bev_augment": True}
    one = _dataset(index, **options, seed=1)
    shuffled = _dataset(index, **options, seed=1, positions=np.arange(len(index))[::-1])
    assert _same(one[2], shuffled[len(index) - 3])
    assert _same(one[2], one[2])
    assert not _same(one[2], _dataset(index, **options, seed=2)[2])
    before = one[2]
    one.set_epoch(1)
    assert not _same(before, one[2])


def test_workers_draw_what_one_process_draws(index):
    dataset = _dataset(index, adjacent="draw", image_augment=True, bev_augment=True, seed=4)
    loader = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=collate)
    for number, batch in enumerate(loader):
        items = range(2 * number, min(2 * number + 2, len(dataset)))
        assert _same(batch, collate([dataset[item] for item in items]))


def test_a_missing_picture_is_named(synthetic, tmp_path):
    shutil.copytree(synthetic.dataroot, tmp_path / "copy")
    index = FrameIndex.open(dataroot=tmp_path / "copy", version=synthetic.version)
    file = tmp_path / "copy" / index.frame(0).cameras[2].file
    file.unlink()
    with pytest.raises(UsageError, match=file.name):
        _dataset(index)[0]


def test_expert_and_apprentice_views_share_the_adjacent_frame(index):
    options = {"adjacent": "draw", "truth": False, "seed": 5}
    expert = _dataset(index, **options, image=replace(IMAGE, height=128, width=352))
    apprentice = _dataset(index, **options, image_augment=True)
    seconds = [[view[i].dt.item() for i in range(len(index))] for view in (expert, apprentice)]
    assert seconds[0] == seconds[1]
    assert len(set(seconds[0])) > 1


def test_bev_augmentation_moves_boxes_and_cameras_together(index):
    plain, moved = _dataset(index)[1], _dataset(index, bev_augment=True, seed=9)[1]
    assert torch.equal(plain.images, moved.images)
    assert torch.equal(plain.depth, moved.depth)
    assert not torch.allclose(plain.rots, moved.rots)
    # Boxes near the border may come or go; those that both hold keep their order.
    near = plain.boxes[0][:, :2].abs().amax(dim=1) < 30
    count = int(near.sum())
    assert count > 0
    seen_plain = [_pixels(plain, plain.boxes[0][near, :3], camera) for camera in range(6)]
    for camera, expected in enumerate(seen_plain):
        found = _pixels(moved, moved.boxes[0][:, :3], camera)
        for row in expected[expected[:, 2] > 1]:
            assert (found - row).abs().amax(dim=1).min() < 0.2


def test_kept_pictures_are_the_same_pictures_and_stay_within_their_room(index):
    plain = _dataset(index)
    one_picture = 64 * 176 * 3 / 2**20
    kept = _dataset(index, keep_images_mb=3.5 * one_picture)
    for _ in range(2):
        assert all(_same(kept[i], plain[i]) for i in range(len(index)))
    assert len(kept._kept) == 3
    with pytest.raises(UsageError, match="keep_images_mb"):
        _dataset(index, keep_images_mb=1, image_augment=True)


def test_training_choices_cover_their_range_and_shorten_with_the_list():
    rng = np.random.default_rng(0)
    assert {drawn_choice(9, rng) for _ in range(300)} == set(range(2, 9))
    assert {drawn_choice(5, rng) for _ in range(100)} == {2, 3, 4}
    assert [drawn_choice(count, rng) for count in (0, 1, 2)] == [0, 0, 1]


def test_an_unknown_adjacent_rule_is_refused(index):
    with pytest.raises(UsageError, match="test or draw"):
        _dataset(index, adjacent="next")


def test_a_frame_without_neighbours_repeats_itself(real_keyframe):
    spec = ImageSpec(height=128, width=352, resize_test=0.02)
    dataset = FrameDataset(index=real_keyframe.open(), positions=[0], image=spec, truth=True)
    batch = dataset[0]
    assert batch.dt.item() == 0
    assert torch.equal(batch.images[:, :, 0], batch.images[:, :, 1])
    assert torch.allclose(batch.rots[:, 0], batch.rots[:, 1], atol=1e-6)
    # The roof lidar of the real car sees the street in front of every camera.
    assert ((batch.depth > 0).float().mean(dim=(2, 3)) > 0.3).all()
    assert len(batch.boxes[0]) > 0


@pytest.mark.parametrize("frame", ["lidar", "ego"])
def test_corners_project_as_the_devkit_projects_them(frame, real_keyframe):
    """Annotated boxes through our matrices, in float64 as they are made, against its own path."""
    from nuscenes import NuScenes
    from nuscenes.utils.geometry_utils import view_points

    index = real_keyframe.open()
    key = index.frame(0)
    if frame == "lidar":
        (moment,), pose = sweep_moments(key, None), key.pose("lidar")
    else:
        (moment,), pose = keyframe_moments([key]), key.cameras[0].ego2global
    devkit = NuScenes(
        version=real_keyframe.version, dataroot=str(real_keyframe.dataroot), verbose=False
    )
    sample = devkit.get("sample", key.token)
    compared = 0
    for camera, name in enumerate(CAMERAS):
        token = sample["data"][name]
        _, boxes, intrinsic = devkit.get_sample_data(token)
        for box in boxes:
            world = devkit.get_box(box.token).corners()
            inside = np.linalg.inv(pose) @ np.vstack([world, np.ones(8)])
            local = (np.linalg.inv(moment.cameras[camera]) @ inside)[:3]
            ours = moment.intrins[camera] @ local
            theirs = view_points(box.corners(), intrinsic, normalize=True)
            seen = (local[2] > 0.1) & (theirs[0] > 0) & (theirs[0] < 1600)
            seen &= (theirs[1] > 0) & (theirs[1] < 900)
            compared += seen.sum()
            away = np.abs(ours[:2] / ours[2] - theirs[:2])[:, seen]
            assert away.size == 0 or away.max() < 1e-3
    assert compared > 100
