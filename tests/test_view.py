"""`fd3d-cache view`: the picture shows what the cache holds."""

import json

import made_cache
import numpy as np
import pytest
from matplotlib import image

from cache_tools.cli import main
from cache_tools.reader import CacheReader
from cache_tools.view import boxes_of, components, energy, find_token
from fd3d.errors import UsageError


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    out = tmp_path_factory.mktemp("view") / "c.zarr"
    made_cache.build(out, preset="focal")
    return out


def test_colours_are_the_principal_components():
    rng = np.random.default_rng(0)
    bev = rng.normal(size=(6, 9, 8)) * np.array([5, 3, 2, 1, 0.5, 0.1])[:, None, None] + 7
    flat = bev.reshape(6, -1) - bev.reshape(6, -1).mean(axis=1, keepdims=True)
    _, _, right = np.linalg.svd(flat, full_matrices=False)
    found = components(bev)
    assert found.shape == (9, 8, 3) and found.min() == 0 and found.max() == 1
    for number in range(3):
        assert abs(np.corrcoef(found[..., number].ravel(), right[number])[0, 1]) > 0.98
    np.testing.assert_array_equal(found, components(bev.copy()))
    assert components(bev[:2])[..., 2].max() == 0


def test_energy_is_blind_to_what_a_channel_always_says():
    bev = np.zeros((3, 4, 4))
    bev[1] = 100
    bev[2, 1, 2] = 16
    found = energy(bev)
    assert found[1, 2] == pytest.approx(15) and found[0, 0] == pytest.approx(1)


def test_frames_by_key_beginning_and_number(cache):
    reader = CacheReader(cache)
    assert find_token(reader, "frame-003") == find_token(reader, "3") == "frame-003"
    assert find_token(reader, "frame-01") == "frame-010"
    for words, said in (("frame-00", "10 frames"), ("nobody", "0 frames"), ("11", "0 to 10")):
        with pytest.raises(UsageError, match=said):
            find_token(reader, words)


def test_boxes_below_the_score_are_left_out(cache):
    reader = CacheReader(cache)
    table = reader.read("frame-002", ["detections"])["detections"]
    (found,) = boxes_of(reader, "frame-002", made_cache.GRID, index=None, min_score=0.5).values()
    np.testing.assert_array_equal(found, table[table[:, 9] >= 0.5, :9])
    assert 0 < len(found) < len(table)


def test_the_picture_is_made_once(cache, tmp_path, capsys):
    out = tmp_path / "frame.png"
    words = ["view", str(cache), "1", "--out", str(out)]
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["token"] == "frame-001" and said["picture"] == str(out)
    first = image.imread(out)
    assert first.shape[1] > 1500 and first[..., :3].std() > 0.1
    assert main(words) == 2
    assert "--force" in capsys.readouterr().err
    words[2] = "2"
    assert main([*words, "--force"]) == 0
    assert (image.imread(out) != first).any()


def test_kinds_of_pictures_and_keys_that_lead_elsewhere(tmp_path, monkeypatch, capsys):
    keys = ["../evil", ".hidden/a b"]
    made_cache.build(tmp_path / "c.zarr", frames=2, keys=keys)
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    assert main(["view", "../c.zarr", "0", "--out", "f.xyz"]) == 2
    assert ".png" in capsys.readouterr().err
    for number in ("0", "1"):
        assert main(["view", "../c.zarr", number]) == 0
    assert sorted(path.name for path in inner.iterdir()) == ["_evil.png", "hidden_a_b.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.zarr", "inner"]


def test_ground_truth_and_what_cannot_be_drawn(synthetic, tmp_path, capsys):
    words = f"--expert bevdepth-tiny-h --init-seed 0 --version {synthetic.version} --split val "
    words = [*words.split(), "--workers", "0", "--dataroot", str(synthetic.dataroot)]
    for signals in ("bev", "detections"):
        out = tmp_path / f"{signals}.zarr"
        assert main(["build", *words, "--signals", signals, "--out", str(out)]) == 0
    picture = ["--out", str(tmp_path / "p.png"), "--dataroot", str(synthetic.dataroot)]
    assert main(["view", str(tmp_path / "bev.zarr"), "0", *picture]) == 0
    assert "of ground truth" in capsys.readouterr().out
    assert main(["view", str(tmp_path / "detections.zarr"), "0", *picture, "--force"]) == 2
    assert "no BEV map to look at" in capsys.readouterr().err
    lost = ["view", str(tmp_path / "bev.zarr"), "0", "--out", str(tmp_path / "no" / "p.png")]
    assert main(lost) == 2
