"""Where an expert and the truth agree: the counts, the verb, and what FD3D makes of it."""

import json

import numpy as np
import pytest
import torch

from cache_tools.cli import main
from fd3d import models
from fd3d.distill.agreement import agreement, count_mistakes


def rows(*places: tuple[float, float]) -> torch.Tensor:
    return torch.tensor([[x, y, 0, 2, 4, 1.5, 0, 0, 0] for x, y in places]).reshape(-1, 9)


def test_the_surest_detection_takes_the_box():
    """Two detections at one true box: one agrees; classes and distances keep the others apart."""
    found = rows((0.5, 0), (0, 0), (10, 0), (20, 0), (30, 2.5))
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5])
    classes = torch.tensor([0, 0, 0, 3, 0])
    boxes = rows((0, 0), (10, 1), (20, 0), (30, 0))
    said = agreement(found, scores, classes, boxes, torch.tensor([0, 0, 0, 0]))
    assert said.detections.tolist() == [True, False, True, False, False]
    assert said.truth.tolist() == [True, True, False, False]


def test_of_two_boxes_the_nearer_free_one_agrees():
    found, scores = rows((0, 0), (0.2, 0)), torch.tensor([0.5, 0.9])
    boxes = rows((0.1, 0), (-1, 0))
    said = agreement(found, scores, torch.zeros(2), boxes, torch.zeros(2).long())
    assert said.detections.all() and said.truth.all()


@pytest.mark.parametrize("count", [0, 3])
def test_nothing_agrees_with_nothing(count):
    some, none = rows(*[(i, i) for i in range(count)]), rows()
    labels = torch.zeros(count).long()
    said = agreement(some, labels.float(), labels, none, torch.zeros(0).long())
    assert not said.detections.any() and len(said.truth) == 0
    said = agreement(none, torch.zeros(0), torch.zeros(0), some, labels)
    assert not said.truth.any() and len(said.truth) == count


def test_mistakes_are_counted_by_class():
    table = torch.cat(
        [rows((0, 0), (9, 9), (5, 5)), torch.tensor([[0.9, 0.0], [0.8, 2.0], [0.05, 1.0]])], dim=1
    )
    frames = [(table, rows((0, 1), (5, 5)), torch.tensor([0, 1]))] * 2
    found = count_mistakes(frames, min_score=0.1)
    assert (found["car"].right, found["car"].false, found["car"].missed) == (2, 0, 0)
    assert (found["truck"].right, found["truck"].false, found["truck"].missed) == (0, 0, 2)
    false = {name: counts.false for name, counts in found.items() if counts.false}
    assert list(false.values()) == [2]


@pytest.fixture(scope="module")
def cache(synthetic, tmp_path_factory):
    out = tmp_path_factory.mktemp("mistakes") / "c.zarr"
    words = f"build --expert bevdepth-tiny-h --init-seed 1 --version {synthetic.version} "
    words += "--split val --signals bev,detections --workers 0"
    paths = ["--dataroot", str(synthetic.dataroot), "--out", str(out)]
    assert main([*words.split(), *paths]) == 0
    return out


def test_the_verb_reports_every_class(cache, synthetic, capsys):
    words = ["mistakes", str(cache), "--dataroot", str(synthetic.dataroot), "--min-score", "0.01"]
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["classes"]) == 10 and said["frames"] > 0
    index = synthetic.open()
    frames = [index.frame(position) for position in index.split("val")]
    grid = models.build("bevdepth-tiny-h").grid
    inside = [
        frame.seen() & (np.abs(frame.boxes_in("lidar")[:, :2]) < grid.x_max).all(axis=1)
        for frame in frames
    ]
    things = sum(int(one.sum()) for one in inside)
    counted = sum(c["right"] + c["missed"] for c in said["classes"].values())
    assert 0 < counted == things and said["frames"] == len(frames)
    assert main(words) == 0
    assert "missed" in capsys.readouterr().out


def test_things_beyond_the_expert_s_grid_are_no_misses_without_a_map_either(
    cache, synthetic, tmp_path, capsys
):
    where = ["--dataroot", str(synthetic.dataroot)]
    told = []
    for path, more in ((cache, []), (tmp_path / "d.zarr", ["--signals", "detections"])):
        if more:
            assert main(["export", str(cache), str(path), *more]) == 0
        capsys.readouterr()
        assert main(["mistakes", str(path), *where, "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out)["classes"])
    assert told[0] == told[1]


def test_the_verb_refuses_what_it_cannot_use(cache, synthetic, tmp_path, capsys):
    assert main(["mistakes", str(cache), "--dataroot", str(tmp_path)]) == 2
    where = ["--dataroot", str(synthetic.dataroot)]
    assert main(["mistakes", str(cache), *where, "--min-score", "2"]) == 2
    assert "--min-score" in capsys.readouterr().err
    bare = tmp_path / "bare.zarr"
    assert main(["export", str(cache), str(bare), "--signals", "bev"]) == 0
    assert main(["mistakes", str(bare), *where]) == 2
    assert "detections" in capsys.readouterr().err
