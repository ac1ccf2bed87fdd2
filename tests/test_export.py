"""Caches made from caches, and comparing two."""

import json

import made_cache
import numpy as np
import pytest

from cache_tools import commands
from cache_tools.compare import compare
from cache_tools.export import export
from cache_tools.presets import PRESETS
from cache_tools.reader import CacheReader
from cache_tools.verify import verify
from fd3d.errors import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same frames, built in each preset."""
    folder = tmp_path_factory.mktemp("export")
    for preset in PRESETS:
        made_cache.build(folder / f"{preset}.zarr", preset=preset)
    return folder


def data(cache):
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.glob("*/c.*")}


# Preset focal needs a data set; tests/test_focal.py has that.
@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"focal"}))
def test_an_export_is_what_building_would_have_given(folder, tmp_path, preset):
    built = CacheReader(folder / f"{preset}.zarr")
    report = export(folder / "lossless.zarr", tmp_path / "out.zarr", preset=preset, quiet=True)
    assert report.complete and report.cache_id == built.cache_id
    assert data(tmp_path / "out.zarr") == data(folder / f"{preset}.zarr")
    assert verify(tmp_path / "out.zarr").ok


def test_a_part_of_frames_and_signals_in_the_order_of_the_source(folder, tmp_path):
    source = CacheReader(folder / "lossless.zarr")
    keys = [source.tokens[7], source.tokens[2], source.tokens[5]]
    report = export(
        source.path, tmp_path / "o.zarr", preset="lossless", keys=keys, signals=["bev"], quiet=True
    )
    found = CacheReader(tmp_path / "o.zarr")
    assert found.tokens == tuple(sorted(keys)) and tuple(found.specs) == ("bev",)
    assert report.signals_id != source.signals_id
    for token in keys:
        np.testing.assert_array_equal(found.read(token)["bev"], source.read(token)["bev"])


def test_what_cannot_be_exported_is_refused_before_anything_is_written(folder, tmp_path):
    out = tmp_path / "o.zarr"
    for source, options, said in (
        ("balanced", {}, "a loss on top of a loss"),
        ("lossless", {"keys": ["frame-000", "nobody"]}, "no frame nobody"),
        ("lossless", {"keys": []}, "not been asked for a frame"),
        ("lossless", {"signals": ["pv"]}, "pv"),
        ("lossless", {"preset": "small"}, "small"),
        ("lossless", {"preset": "focal"}, "--dataroot"),
    ):
        with pytest.raises(UsageError, match=said):
            export(folder / f"{source}.zarr", out, **{"preset": "balanced", **options})
        assert not out.exists()


def test_differences_are_those_of_the_codec(folder):
    same = compare(folder / "lossless.zarr", folder / "lossless.zarr")
    assert same.frames == 11 and all(one.worst == 0 for one in same.maps.values())
    assert same.tables == {"detections": 0} and same.left_out == ()
    found = compare(folder / "lossless.zarr", folder / "balanced.zarr")
    one, other = (CacheReader(folder / f"{p}.zarr") for p in ("lossless", "balanced"))
    for name, difference in found.maps.items():
        expected = {}
        for token in one.tokens:
            a, b = (r.read(token)[name].astype(np.float64) for r in (one, other))
            spread = a - a.mean(axis=(1, 2), keepdims=True)
            expected[token] = np.linalg.norm(a - b) / np.linalg.norm(spread)
        worst = max(expected, key=expected.get)
        assert difference.worst_token == worst
        assert difference.worst == pytest.approx(expected[worst], rel=1e-4)
        assert difference.mean == pytest.approx(np.mean(list(expected.values())), rel=1e-4)
        assert difference.worst_channel >= difference.worst > 0.001
    assert found.tables == {"detections": 0}


def test_the_verbs(folder, tmp_path, capsys):
    source = str(folder / "lossless.zarr")
    (tmp_path / "keys.txt").write_text("frame-003\nframe-001\n")
    flags = ["--keys", str(tmp_path / "keys.txt"), "--signals", "bev", "--preset", "balanced"]
    commands.run(["export", source, str(tmp_path / "o.zarr"), *flags, "--json"])
    assert json.loads(capsys.readouterr().out)["frames"] == 2
    commands.run(["compare", source, str(tmp_path / "o.zarr")])
    said = capsys.readouterr().out
    assert "2 frames are in both" in said and "heatmap: not in both" in said
    commands.run(["compare", source, str(tmp_path / "o.zarr"), "--json"])
    assert set(json.loads(capsys.readouterr().out)["maps"]) == {"bev"}
    with pytest.raises(UsageError, match="cannot be read"):
        commands.run(["export", source, str(tmp_path / "p.zarr"), "--keys", str(tmp_path)])
