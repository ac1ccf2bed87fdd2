"""What the devkit reads from the synthetic data set, and whether pictures and tables agree."""

import json

import numpy as np
import pytest
from made_synthetic import TINY, VERSION, make
from PIL import Image

from fd3d.classes import CAMERAS
from fd3d.data.synthetic.parameters import Parameters
from fd3d.data.synthetic.placement import draw_world


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make(tmp_path_factory.mktemp("synthetic") / "data")


@pytest.fixture(scope="module")
def nusc(root):
    nuscenes = pytest.importorskip("nuscenes")
    return nuscenes.NuScenes(version=VERSION, dataroot=str(root), verbose=False)


def sensor_to_global(nusc, data):
    from nuscenes.utils.geometry_utils import transform_matrix
    from pyquaternion import Quaternion

    matrix = np.eye(4)
    for table, key in (
        ("ego_pose", "ego_pose_token"),
        ("calibrated_sensor", "calibrated_sensor_token"),
    ):
        record = nusc.get(table, data[key])
        matrix = matrix @ transform_matrix(record["translation"], Quaternion(record["rotation"]))
    return matrix


def lidar_points(nusc, sample):
    """(n, 3) global coordinates of the keyframe's sweep."""
    data = nusc.get("sample_data", sample["data"]["LIDAR_TOP"])
    points = np.fromfile(nusc.get_sample_data_path(data["token"]), dtype=np.float32).reshape(-1, 5)
    matrix = sensor_to_global(nusc, data)
    return points[:, :3].astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]


def boxes(nusc, sample):
    return [(nusc.get("sample_annotation", token), nusc.get_box(token)) for token in sample["anns"]]


def true_actors(number):
    """The scene as it was drawn, by the public parameters: what the tables should describe."""
    parameters = Parameters(camera_hz=4, **TINY)
    rng = np.random.default_rng(parameters.scene_seed(number))
    return parameters, draw_world(rng, duration=(TINY["frames"] - 1) / 2)


def test_all_tables_and_files_are_there(root, nusc):
    assert len(nusc.table_names) == 13
    assert all(len(getattr(nusc, name)) for name in nusc.table_names)
    assert len(nusc.scene) == 3 and len(nusc.sample) == 12
    for data in nusc.sample_data:
        path = root / data["filename"]
        if data["channel"] in CAMERAS:
            with Image.open(path) as image:
                assert image.size == (data["width"], data["height"]) == (256, 144)
        else:
            assert path.stat().st_size % 20 == 0 and path.stat().st_size > 20 * 1000
    assert all(set(sample["data"]) == {"LIDAR_TOP", *CAMERAS} for sample in nusc.sample)
    on_disk = {
        str(p.relative_to(root)) for k in ("samples", "sweeps") for p in root.glob(f"{k}/*/*")
    }
    assert on_disk == {data["filename"] for data in nusc.sample_data}


def test_chains_run_through_each_scene(nusc):
    for scene in nusc.scene:
        sample = nusc.get("sample", scene["first_sample_token"])
        for channel, images in [("LIDAR_TOP", 4)] + [(camera, 13) for camera in CAMERAS]:
            data = nusc.get("sample_data", sample["data"][channel])
            keyframe = data["timestamp"]
            while data["prev"]:
                data = nusc.get("sample_data", data["prev"])
            # The cameras start 1.5 s early, for the first keyframe's adjacent frame.
            lead = 0 if channel == "LIDAR_TOP" else 1.5e6
            assert abs(keyframe - data["timestamp"] - lead) <= 2
            stamps = [data["timestamp"]]
            while data["next"]:
                after = nusc.get("sample_data", data["next"])
                assert after["prev"] == data["token"] and after["channel"] == channel
                data = after
                stamps.append(data["timestamp"])
                assert data["timestamp"] == nusc.get("ego_pose", data["token"])["timestamp"]
            assert len(stamps) == images
            gap = 0.5e6 if channel == "LIDAR_TOP" else 0.25e6
            np.testing.assert_allclose(np.diff(stamps), gap, atol=2)
        tokens = [sample["token"]]
        while sample["next"]:
            sample = nusc.get("sample", sample["next"])
            tokens.append(sample["token"])
        assert len(tokens) == scene["nbr_samples"] and tokens[-1] == scene["last_sample_token"]
    for instance in nusc.instance:
        row = nusc.get("sample_annotation", instance["first_annotation_token"])
        count = 1
        while row["next"]:
            row, count = nusc.get("sample_annotation", row["next"]), count + 1
        assert row["token"] == instance["last_annotation_token"]
        assert count == instance["nbr_annotations"]


def test_lidar_counts_are_those_of_the_devkit(nusc):
    from nuscenes.utils.geometry_utils import points_in_box

    total = wrong = 0
    for sample in nusc.sample[::3]:
        points = lidar_points(nusc, sample).T
        for row, box in boxes(nusc, sample):
            difference = abs(int(points_in_box(box, points).sum()) - row["num_lidar_pts"])
            assert difference <= 1
            total, wrong = total + 1, wrong + difference
    assert total > 60 and wrong < 0.02 * total


def test_most_annotations_have_points_and_every_class_of_visibility_occurs(nusc):
    rows = nusc.sample_annotation
    assert np.mean([row["num_lidar_pts"] > 0 for row in rows]) > 0.85
    assert {row["visibility_token"] for row in rows} >= {"1", "4"}
    per_frame = len(rows) / len(nusc.sample)
    assert 20 < per_frame < 55
    for row in rows:
        kind = row["category_name"].split(".")[0]
        wanted = 0 if kind == "movable_object" else 1
        assert len(row["attribute_tokens"]) == wanted


def test_speeds_from_the_devkit_are_the_true_ones(nusc):
    checked = moving = 0
    for number, scene in enumerate(nusc.scene):
        parameters, world = true_actors(number)
        for actor in range(world.actors.annotated):
            token = parameters.token(scene["name"], "instance", actor)
            if token not in nusc._token2ind["instance"]:
                continue
            row = nusc.get(
                "sample_annotation", nusc.get("instance", token)["first_annotation_token"]
            )
            while row["next"]:
                if row["prev"]:
                    speed = np.linalg.norm(nusc.box_velocity(row["token"])[:2])
                    # On a bend the outer lanes are faster than the road's own arc length.
                    share = 0.15 if world.actors.motion.on_road[actor] else 0.01
                    true = world.actors.motion.speed[actor]
                    np.testing.assert_allclose(speed, true, rtol=share, atol=2e-3)
                    checked, moving = checked + 1, moving + (true > 0)
                row = nusc.get("sample_annotation", row["next"])
    assert checked > 100 and moving > 30


def test_attributes_follow_motion(nusc):
    _, world = true_actors(0)
    for attribute, speed in zip(world.actors.attribute, world.actors.motion.speed, strict=True):
        if attribute.startswith(("vehicle", "pedestrian")):
            assert attribute.endswith(".moving") == (speed > 0)
        elif attribute == "cycle.without_rider":
            assert speed == 0


def test_fronts_are_lighter_and_rears_redder_in_the_images(root, nusc):
    """Lidar points on standing vehicles, projected into the images by the tables alone."""
    front, rear = [], []
    for sample in nusc.sample:
        points = lidar_points(nusc, sample)
        images = []
        for camera in CAMERAS:
            data = nusc.get("sample_data", sample["data"][camera])
            record = nusc.get("calibrated_sensor", data["calibrated_sensor_token"])
            with Image.open(root / data["filename"]) as image:
                images.append(
                    (
                        np.asarray(image).astype(float),
                        np.linalg.inv(sensor_to_global(nusc, data)),
                        np.array(record["camera_intrinsic"]),
                    )
                )
        for row, box in boxes(nusc, sample):
            parked = not row["category_name"].startswith("vehicle.") or np.linalg.norm(
                nusc.box_velocity(row["token"])[:2]
            )
            if row["visibility_token"] != "4" or parked > 0.1 or row["num_lidar_pts"] < 20:
                continue
            local = (points - box.center) @ box.rotation_matrix
            inside = (np.abs(local) <= box.wlh[[1, 0, 2]] / 2).all(axis=1)
            # Well above the ground, whose points may be inside as well.
            inside &= local[:, 2] > -0.3 * box.wlh[2]
            along = local[:, 0] / box.wlh[1]
            for image, to_camera, intrinsic in images:
                seen = points @ to_camera[:3, :3].T + to_camera[:3, 3]
                pixel = seen @ intrinsic.T
                with np.errstate(divide="ignore", invalid="ignore"):
                    uv = np.floor(pixel[:, :2] / pixel[:, 2:])
                good = inside & (seen[:, 2] > 1) & (uv >= 0).all(axis=1)
                good &= (uv < (image.shape[1], image.shape[0])).all(axis=1)
                for part, chosen in ((front, good & (along > 0.2)), (rear, good & (along < -0.25))):
                    column, line = uv[chosen].astype(int).T
                    part.append(image[line, column])
    front, rear = np.concatenate(front), np.concatenate(rear)
    assert len(front) > 100 and len(rear) > 100
    assert np.median(front[:, 1]) > 1.5 * np.median(rear[:, 1])
    assert np.median(rear[:, 0] / (rear[:, 1] + 1)) > 1.5 * np.median(
        front[:, 0] / (front[:, 1] + 1)
    )


def test_devkit_scores_the_truth_perfectly_on_its_split(root, nusc, tmp_path):
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval
    from nuscenes.eval.detection.utils import category_to_detection_name

    splits = json.loads((root / VERSION / "splits.json").read_text())
    assert splits["train"] == splits["synthetic_train"] == [s["name"] for s in nusc.scene[:2]]
    assert splits["val"] == splits["synthetic_val"] == [nusc.scene[2]["name"]]
    results = {}
    for sample in nusc.sample[8:]:
        results[sample["token"]] = [
            {
                "sample_token": sample["token"],
                "translation": row["translation"],
                "size": row["size"],
                "rotation": row["rotation"],
                "velocity": np.nan_to_num(nusc.box_velocity(row["token"])[:2]).tolist(),
                "detection_name": category_to_detection_name(row["category_name"]),
                "detection_score": 1.0,
                "attribute_name": "".join(
                    nusc.get("attribute", token)["name"] for token in row["attribute_tokens"]
                ),
            }
            for row, _ in boxes(nusc, sample)
            if row["num_lidar_pts"] and category_to_detection_name(row["category_name"])
        ]
    meta = {f"use_{name}": False for name in ("camera", "lidar", "radar", "map", "external")}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"meta": meta, "results": results}))
    summary = DetectionEval(
        nusc,
        config_factory("detection_cvpr_2019"),
        str(path),
        "synthetic_val",
        str(tmp_path),
        verbose=False,
    ).main(plot_examples=0, render_curves=False)
    present = {box["detection_name"] for boxes_ in results.values() for box in boxes_}
    assert len(present) >= 6
    scores = [summary["mean_dist_aps"][name] for name in present]
    # A class may occur only beyond its range; none that is scored may be missed.
    assert all(score > 0.999 or score == 0.0 for score in scores)
    assert np.mean(scores) > 0.7
