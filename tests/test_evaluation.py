import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fd3d.classes import CLASS_RANGE, CLASSES
from fd3d.data.batch import Detections
from fd3d.data.frames import Frame
from fd3d.errors import CheckFailed, UsageError
from fd3d.evaluation import (
    evaluate,
    frame_results,
    submission,
    truth_as_detections,
    write_submission,
)

NOTHING = Detections(
    boxes=torch.zeros(0, 9), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.int64)
)


def _truth(index, split: str, place: str = "lidar") -> dict[str, Detections]:
    return {
        index.tokens[position]: truth_as_detections(index, position, place)
        for position in index.split(split)
    }


def _score(data, results, folder):
    write_submission(folder / "results.json", submission(results, data.open(), data.split))
    return evaluate(
        dataroot=data.dataroot,
        version=data.version,
        split=data.split,
        submission=folder / "results.json",
        out_dir=folder / "scores",
    )


def _classes_in_range(index, split: str) -> set[str]:
    found = set()
    for position in index.split(split):
        frame = index.frame(position)
        reach = np.array([CLASS_RANGE[name] for name in CLASSES])[frame.labels]
        distance = np.hypot(*(frame.boxes[:, :2] - frame.ego2global[:2, 3]).T)
        found |= {CLASSES[label] for label in frame.labels[(distance < reach) & frame.seen()]}
    return found


@pytest.mark.parametrize("place", ["lidar", "ego"])
@pytest.mark.parametrize("name", ["synthetic", "real_keyframe"])
def test_ground_truth_finds_everything_in_range(name, place, request, tmp_path, capsys):
    data = request.getfixturevalue(name)
    index = data.open()
    scores = _score(data, _truth(index, data.split, place), tmp_path)
    present = _classes_in_range(index, data.split)
    assert len(present) >= 3
    for label, values in scores.classes.items():
        assert values["ap"] == pytest.approx(1.0 if label in present else 0.0, abs=1e-6), label
        if label in present:
            assert values["ate"] < 1e-5 and values["ase"] < 1e-5
            assert math.isnan(values["aoe"]) or values["aoe"] < 1e-5
    assert scores.map == pytest.approx(len(present) / len(CLASSES), abs=1e-6)
    assert capsys.readouterr().out == ""
    json.dumps(scores.to_dict(), allow_nan=False)


def test_errors_of_moved_boxes_are_the_distance_moved(synthetic, tmp_path):
    results = _truth(synthetic.open(), synthetic.split)
    for token, found in results.items():
        boxes = found.boxes.clone()
        boxes[:, 0] += 0.3
        results[token] = replace(found, boxes=boxes)
    scores = _score(synthetic, results, tmp_path)
    cars = scores.classes["car"]
    # A car at the very edge of its range may be moved out of it.
    assert cars["ap"] > 0.9
    assert cars["ate"] == pytest.approx(0.3, abs=0.01)


def test_a_submission_without_a_single_box_scores_zero(synthetic, tmp_path):
    index = synthetic.open()
    results = dict.fromkeys(_truth(index, synthetic.split), NOTHING)
    scores = _score(synthetic, results, tmp_path)
    assert scores.nds == scores.map == 0 and scores.mate == 1
    assert json.loads((tmp_path / "results.json").read_text())["results"] == {
        token: [] for token in results
    }


def test_frames_must_be_exactly_those_of_the_split(synthetic, tmp_path):
    index = synthetic.open()
    results = dict.fromkeys(_truth(index, synthetic.split), NOTHING)
    lost = results.pop(next(iter(results)))
    with pytest.raises(UsageError, match="lacks 1 of"):
        submission(results, index, synthetic.split)
    write_submission(tmp_path / "short.json", submission(results, index))
    with pytest.raises(UsageError, match="lacks 1 of"):
        evaluate(
            dataroot=synthetic.dataroot,
            version=synthetic.version,
            split=synthetic.split,
            submission=tmp_path / "short.json",
            out_dir=tmp_path,
        )
    with pytest.raises(UsageError, match="not in"):
        submission({"no such frame": lost}, index)


@pytest.mark.parametrize(
    "text", [None, "{", "[]", '{"results": {}}', '{"meta": {}, "results": []}']
)
def test_a_file_that_is_no_submission_is_named(synthetic, tmp_path, text):
    path = tmp_path / "wrong.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=r"wrong\.json"):
        evaluate(
            dataroot=synthetic.dataroot,
            version=synthetic.version,
            split=synthetic.split,
            submission=path,
            out_dir=tmp_path,
        )


def _frame(lidar2ego: np.ndarray, ego2global: np.ndarray) -> Frame:
    none = np.zeros(0, dtype=np.int64)
    return Frame(
        token="tok0",
        scene="",
        timestamp=0,
        lidar_file="",
        lidar2ego=lidar2ego,
        ego2global=ego2global,
        cameras=(),
        boxes=np.zeros((0, 9)),
        labels=none,
        lidar_points=none,
        radar_points=none,
        visibility=none,
        attributes=(),
    )


def _detections(boxes, labels) -> Detections:
    boxes = torch.as_tensor(boxes, dtype=torch.float32)
    return Detections(
        boxes=boxes, scores=torch.linspace(1, 0.1, len(boxes)), labels=torch.as_tensor(labels)
    )


def test_boxes_beyond_the_range_of_their_class_are_left_out():
    boxes = np.zeros((3, 9))
    boxes[:, 3:6] = 1
    boxes[:, 1] = [39.0, 41.0, 49.0]
    pedestrian, car = CLASSES.index("pedestrian"), CLASSES.index("car")
    rows = frame_results(
        _frame(np.eye(4), np.eye(4)), _detections(boxes, [pedestrian, pedestrian, car])
    )
    assert [row["detection_name"] for row in rows] == ["pedestrian", "car"]
    assert rows[0]["translation"] == pytest.approx([0, 39, 0])


def test_at_most_500_boxes_stay_the_best_ones():
    boxes = np.zeros((700, 9))
    boxes[:, 3:6] = 1
    rows = frame_results(_frame(np.eye(4), np.eye(4)), _detections(boxes, [0] * 700))
    assert len(rows) == 500
    assert rows[-1]["detection_score"] > 0.3


def test_attributes_follow_the_speed():
    boxes = np.zeros((8, 9))
    boxes[:, 3:6] = 1
    boxes[1::2, 7] = 3
    names = ["car", "car", "bus", "bus", "bicycle", "bicycle", "pedestrian", "traffic_cone"]
    boxes[6, 7] = 3
    labels = [CLASSES.index(name) for name in names]
    rows = frame_results(_frame(np.eye(4), np.eye(4)), _detections(boxes, labels))
    assert [row["attribute_name"] for row in rows] == [
        "vehicle.parked",
        "vehicle.moving",
        "vehicle.stopped",
        "vehicle.moving",
        "cycle.without_rider",
        "cycle.with_rider",
        "pedestrian.moving",
        "",
    ]


def test_a_diverged_network_is_told_apart_from_a_bad_one():
    boxes = np.full((1, 9), np.nan)
    with pytest.raises(CheckFailed, match="tok0"):
        frame_results(_frame(np.eye(4), np.eye(4)), _detections(boxes, [0]))
