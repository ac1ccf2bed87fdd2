import json
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fd3d.boxes import VX, VY, YAW, H, L, W, wrap_angle
from fd3d.classes import CAMERAS, CLASSES
from fd3d.data.index import FrameIndex, main
from fd3d.data.synthetic import generate
from fd3d.errors import UsageError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def index(synthetic):
    return synthetic.open()


@pytest.fixture(scope="module")
def devkit(synthetic):
    from nuscenes import NuScenes

    return NuScenes(synthetic.version, str(synthetic.dataroot), verbose=False)


def _with_tables(synthetic, folder: Path, **changes) -> Path:
    """A data set with the same pictures, and tables of which some have been replaced."""
    for part in ("samples", "sweeps"):
        if (synthetic.dataroot / part).exists():
            (folder / part).symlink_to(synthetic.dataroot / part)
    shutil.copytree(synthetic.dataroot / synthetic.version, folder / synthetic.version)
    for name, rows in changes.items():
        (folder / synthetic.version / f"{name}.json").write_text(json.dumps(rows))
    return folder


def _pose(devkit, table: str, token: str) -> np.ndarray:
    from pyquaternion import Quaternion

    row = devkit.get(table, token)
    pose = np.eye(4)
    pose[:3, :3] = Quaternion(row["rotation"]).rotation_matrix
    pose[:3, 3] = row["translation"]
    return pose


def test_frames_are_in_scene_and_time_order(index):
    frames = [index.frame(position) for position in range(len(index))]
    keys = [(index.meta["scenes"].index(frame.scene), frame.timestamp) for frame in frames]
    assert keys == sorted(keys) and len(set(keys)) == len(index)
    assert [frame.token for frame in frames] == index.tokens
    assert [index.position(token) for token in index.tokens] == list(range(len(index)))


def test_frames_say_what_the_devkit_says(index, devkit):
    from nuscenes.eval.detection.utils import category_to_detection_name

    assert len(index) == len(devkit.sample)
    for position, token in enumerate(index.tokens):
        frame, sample = index.frame(position), devkit.get("sample", token)
        lidar = devkit.get("sample_data", sample["data"]["LIDAR_TOP"])
        assert frame.lidar_file == lidar["filename"]
        np.testing.assert_allclose(
            frame.ego2global, _pose(devkit, "ego_pose", lidar["ego_pose_token"]), atol=1e-9
        )
        for channel, shot in zip(CAMERAS, frame.cameras, strict=True):
            picture = devkit.get("sample_data", sample["data"][channel])
            mounted = devkit.get("calibrated_sensor", picture["calibrated_sensor_token"])
            assert (shot.file, shot.timestamp) == (picture["filename"], picture["timestamp"])
            assert shot.size == (picture["width"], picture["height"])
            np.testing.assert_array_equal(shot.intrinsic, mounted["camera_intrinsic"])
            np.testing.assert_allclose(
                shot.camera2ego, _pose(devkit, "calibrated_sensor", mounted["token"]), atol=1e-9
            )
            np.testing.assert_allclose(
                shot.ego2global, _pose(devkit, "ego_pose", picture["ego_pose_token"]), atol=1e-9
            )
        rows = [devkit.get("sample_annotation", name) for name in sample["anns"]]
        rows = [row for row in rows if category_to_detection_name(row["category_name"])]
        assert len(frame.boxes) == len(rows)
        for box, label, row in zip(frame.boxes, frame.labels, rows, strict=True):
            assert CLASSES[label] == category_to_detection_name(row["category_name"])
            np.testing.assert_array_equal(box[:3], row["translation"])
            np.testing.assert_array_equal(box[[W, L, H]], row["size"])
            np.testing.assert_allclose(
                box[VX : VY + 1], devkit.box_velocity(row["token"])[:2], atol=1e-9
            )
            yaw = devkit.get_box(row["token"]).orientation.yaw_pitch_roll[0]
            assert wrap_angle(box[YAW] - yaw) == pytest.approx(0, abs=1e-3)
        np.testing.assert_array_equal(frame.lidar_points, [row["num_lidar_pts"] for row in rows])


def test_adjacent_frames_lie_a_quarter_second_apart_on_the_earlier_side(index):
    for position in range(len(index)):
        frame = index.frame(position)
        count = index.adjacent_count(position)
        assert 1 <= count <= 9
        for choice in range(count):
            adjacent = index.adjacent(position, choice)
            assert adjacent.seconds == pytest.approx(0.25 * (choice + 1), abs=0.1)
            assert adjacent.timestamp < frame.timestamp
        assert index.adjacent(position, 99).files == index.adjacent(position, count - 1).files


def test_adjacent_pictures_are_the_nearest_in_time_with_the_front_cameras_pose(index, devkit):
    by_file = {row["filename"]: row for row in devkit.sample_data}
    for position in (0, len(index) - 1):
        adjacent = index.adjacent(position, 5)
        rows = [by_file[file] for file in adjacent.files]
        front = rows[CAMERAS.index("CAM_FRONT")]
        assert front["timestamp"] == adjacent.timestamp
        np.testing.assert_allclose(
            adjacent.ego2global, _pose(devkit, "ego_pose", front["ego_pose_token"]), atol=1e-9
        )
        for channel, row in zip(CAMERAS, rows, strict=True):
            assert row["channel"] == channel
            for neighbour in filter(None, (row["prev"], row["next"])):
                other = devkit.get("sample_data", neighbour)
                assert abs(other["timestamp"] - front["timestamp"]) >= abs(
                    row["timestamp"] - front["timestamp"]
                )


def test_pictures_at_12_hz_are_taken_every_third_and_later_ones_where_none_is_earlier(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("fd3d.data.synthetic.scene.LEAD_IN_SECONDS", 0.0)
    generate(
        out=tmp_path, scenes=1, frames=4, seed=1, width=64, camera_hz=12, workers=1, quiet=True
    )
    index = FrameIndex.open(dataroot=tmp_path, version="v1.0-synthetic")
    assert [index.adjacent_count(position) for position in range(4)] == [6, 2, 4, 6]
    assert index.adjacent(0, 0).timestamp > index.frame(0).timestamp
    seconds = [index.adjacent(3, choice).seconds for choice in range(6)]
    np.testing.assert_allclose(seconds, 0.25 * np.arange(1, 7), atol=0.06)


def _velocities(index) -> np.ndarray:
    boxes = [index.frame(position).boxes for position in range(len(index))]
    return np.concatenate(boxes)[:, VX : VY + 1]


@pytest.mark.parametrize(("slower", "known"), [(2.9, True), (3.2, False)])
def test_annotations_too_far_apart_in_time_give_no_velocity(
    synthetic, index, tmp_path, slower, known
):
    samples = json.loads((synthetic.dataroot / synthetic.version / "sample.json").read_text())
    start = min(row["timestamp"] for row in samples)
    for row in samples:
        row["timestamp"] = round(start + slower * (row["timestamp"] - start))
    dataroot = _with_tables(synthetic, tmp_path, sample=samples)
    found = _velocities(FrameIndex.open(dataroot=dataroot, version=synthetic.version))
    # Neighbours are now 1.45 or 1.6 s away; nuScenes allows 1.5 s, twice that across a box.
    expected = _velocities(index) / slower if known else np.full_like(found, np.nan)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_classes_present_leaves_out_boxes_without_points(index):
    positions = np.arange(len(index))
    expected = np.zeros((len(index), len(CLASSES)), dtype=bool)
    for position in positions:
        frame = index.frame(position)
        expected[position, frame.labels[frame.seen()]] = True
    np.testing.assert_array_equal(index.classes_present(positions), expected)
    np.testing.assert_array_equal(index.classes_present(positions[::-2]), expected[::-2])


def test_splits_are_disjoint_and_whole_scenes(index, synthetic):
    train, val = index.split("train"), index.split(synthetic.split)
    assert not set(train) & set(val)
    assert len(train) and len(val)
    scenes = {index.frame(position).scene for position in val}
    assert scenes == set(index.splits[synthetic.split])


def test_an_index_travels_to_workers_by_its_path(index):
    copy = pickle.dumps(index)
    assert len(copy) < 1000
    assert pickle.loads(copy).tokens == index.tokens


def test_a_made_index_opens_without_the_devkit(synthetic, index_folder):
    synthetic.open()
    program = (
        "import sys; from fd3d.data.index import FrameIndex; "
        f"FrameIndex.open(dataroot={str(synthetic.dataroot)!r}, version={synthetic.version!r}, "
        f"folder={str(index_folder)!r}).frame(0); sys.exit('nuscenes' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_two_processes_may_make_one_index_at_once(synthetic, tmp_path):
    program = (
        "from fd3d.data.index import FrameIndex; "
        f"print(len(FrameIndex.open(dataroot={str(synthetic.dataroot)!r}, "
        f"version={synthetic.version!r}, folder={str(tmp_path)!r})))"
    )
    command = [sys.executable, "-c", program]
    with ThreadPoolExecutor() as pool:
        runs = list(
            pool.map(
                lambda _: subprocess.run(command, cwd=ROOT, capture_output=True, text=True),
                range(2),
            )
        )
    assert [run.returncode for run in runs] == [0, 0], runs
    assert len({run.stdout for run in runs}) == 1
    assert [path.suffix for path in tmp_path.iterdir()] != [".tmp"]
    assert len(list(tmp_path.iterdir())) == 1


def test_changed_tables_give_a_new_index(synthetic, tmp_path):
    samples = json.loads((synthetic.dataroot / synthetic.version / "sample.json").read_text())
    dataroot = _with_tables(synthetic, tmp_path)
    first = FrameIndex.open(dataroot=dataroot, version=synthetic.version)
    again = FrameIndex.open(dataroot=dataroot, version=synthetic.version)
    assert first.path == again.path
    for row in samples:
        row["timestamp"] += 1_000_000
    (dataroot / synthetic.version / "sample.json").write_text(json.dumps(samples))
    changed = FrameIndex.open(dataroot=dataroot, version=synthetic.version)
    assert changed.frame(0).timestamp == first.frame(0).timestamp + 1_000_000


def test_a_data_set_without_annotations_has_frames_without_boxes(synthetic, tmp_path):
    dataroot = _with_tables(synthetic, tmp_path, sample_annotation=[], instance=[])
    index = FrameIndex.open(dataroot=dataroot, version=synthetic.version)
    assert index.frame(0).boxes.shape == (0, 9)
    assert not index.classes_present(np.arange(len(index))).any()


def test_the_real_keyframe_is_its_own_neighbour(real_keyframe):
    index = real_keyframe.open()
    frame = index.frame(0)
    assert len(index) == 1 and len(frame.boxes) == 68
    assert np.isnan(frame.boxes[:, VX : VY + 1]).all()
    assert index.adjacent_count(0) == 0
    adjacent = index.adjacent(0, 5)
    assert adjacent.seconds == 0
    assert adjacent.files == tuple(shot.file for shot in frame.cameras)


def test_what_is_not_there_is_said_with_what_is(synthetic, index, tmp_path):
    with pytest.raises(UsageError, match="not a folder"):
        FrameIndex.open(dataroot=tmp_path / "nowhere", version="v1.0-mini")
    with pytest.raises(UsageError, match=synthetic.version):
        FrameIndex.open(dataroot=synthetic.dataroot, version="v9.9-nothing")
    with pytest.raises(UsageError, match=synthetic.split):
        index.split("no such split")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="FD3D_INDEX_DIR"):
        FrameIndex.open(
            dataroot=synthetic.dataroot, version=synthetic.version, folder=tmp_path / "file"
        )
    with pytest.raises(UsageError, match="no such frame"):
        index.position("no such frame")


@pytest.mark.parametrize("table", ["sample_data", "ego_pose", "scene"])
def test_a_missing_or_broken_table_is_named(synthetic, tmp_path, table):
    dataroot = _with_tables(synthetic, tmp_path)
    path = dataroot / synthetic.version / f"{table}.json"
    path.write_text("[{")
    with pytest.raises(UsageError, match=table):
        FrameIndex.open(dataroot=dataroot, version=synthetic.version)
    path.unlink()
    with pytest.raises(UsageError, match=table):
        FrameIndex.open(dataroot=dataroot, version=synthetic.version)


def test_a_reference_to_a_record_that_is_not_there_is_named(synthetic, tmp_path):
    dataroot = _with_tables(synthetic, tmp_path, ego_pose=[])
    with pytest.raises(UsageError, match="name a record or field .* that they do not have"):
        FrameIndex.open(dataroot=dataroot, version=synthetic.version)


@pytest.mark.parametrize("splits", [["val"], {"val": "scene-0001"}])
def test_splits_of_another_form_are_named(synthetic, tmp_path, splits):
    dataroot = _with_tables(synthetic, tmp_path, splits=splits)
    with pytest.raises(UsageError, match=r"splits\.json must hold lists"):
        FrameIndex.open(dataroot=dataroot, version=synthetic.version)


@pytest.mark.parametrize("file", ["meta.json", "boxes.npy", "names.npy"])
def test_a_truncated_index_is_named(synthetic, tmp_path, file):
    where = {"dataroot": synthetic.dataroot, "version": synthetic.version, "folder": tmp_path}
    path = FrameIndex.open(**where).path
    whole = (path / file).read_bytes()
    (path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="delete that folder"):
        FrameIndex.open(**where)


def test_the_command_counts_frames_and_boxes_per_split(synthetic, index, capsys):
    arguments = ["--dataroot", str(synthetic.dataroot), "--version", synthetic.version]
    main([*arguments, "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["frames"] == len(index)
    positions = index.split(synthetic.split)
    counts = facts["splits"][synthetic.split]
    assert counts["frames"] == len(positions)
    boxes = sum(len(index.frame(position).labels) for position in positions)
    assert sum(counts["boxes"].values()) == boxes
    main(arguments)
    printed = capsys.readouterr().out
    assert str(index.path) in printed and "next:" in printed
