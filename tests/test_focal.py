"""Preset focal: exact near objects, block means elsewhere, and uses that need more are refused."""

from pathlib import Path

import made_cache
import numpy as np
import pytest
import torch

from cache_tools import focal
from cache_tools.cli import main
from cache_tools.differences import accumulate, differences
from cache_tools.presets import codec_for
from cache_tools.reader import CacheReader
from cache_tools.source import CachedExpert
from fd3d.distill.areas import footprints
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid

CODEC = codec_for(made_cache.SIGNALS["bev"], "focal")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("focal")
    for preset in ("lossless", "focal"):
        made_cache.build(folder / f"{preset}.zarr", preset=preset)
    return folder


def test_tiles_with_focus_are_exact_and_the_rest_are_block_means(caches):
    whole, thin = (CacheReader(caches / f"{p}.zarr") for p in ("lossless", "focal"))
    kept = []
    for position, token in enumerate(whole.tokens):
        value = whole.read(token, ["bev"])["bev"].astype(np.float32)
        found = thin.read(token, ["bev"])["bev"].astype(np.float32)
        exact = thin.exact(token, "bev")
        rows, columns = np.nonzero(made_cache.focus(position))
        for row, column in zip(rows, columns, strict=True):
            first = [i - i % CODEC.tile for i in (row, column)]
            assert exact[tuple(slice(i, i + CODEC.tile) for i in first)].all()
        assert exact.any() == bool(len(rows))
        scale = value.std(axis=(1, 2))[:, None] / CODEC.steps_per_sd
        step = np.maximum(scale, np.ptp(value, axis=(1, 2))[:, None] / 255)
        assert (np.abs(found - value)[:, exact] <= 0.51 * step + 2e-3).all()
        means = value.reshape(6, 10, 4, 10, 4).mean(axis=(2, 4)).repeat(4, 1).repeat(4, 2)
        assert (np.abs(found - means)[:, ~exact] <= 1.1 * step + 2e-3).all()
        kept.append(exact.mean())
    assert 0 < np.mean(kept) < 1 and min(kept) == 0
    assert whole.exact(whole.tokens[0], "bev").all()


def test_what_is_not_kept_is_not_in_the_file(caches):
    sizes = {
        preset: sum(p.stat().st_size for p in (caches / f"{preset}.zarr/bev").glob("c.*"))
        for preset in ("lossless", "focal")
    }
    assert sizes["focal"] < 0.3 * sizes["lossless"]


def test_without_a_mask_nothing_is_built(tmp_path):
    def blind(positions):
        return {**made_cache.compute(positions), "focus": [None] * len(positions)}

    with pytest.raises(UsageError, match="frame frame-000: bev is kept where the focus is"):
        made_cache.build(tmp_path / "c.zarr", preset="focal", compute=blind)

    def silent(positions):
        found = made_cache.compute(positions)
        return {name: found[name] for name in made_cache.SIGNALS}

    with pytest.raises(UsageError, match="the expert gave nothing for signal focus"):
        made_cache.build(tmp_path / "c.zarr", preset="focal", compute=silent)


def test_uses_that_need_whole_maps_are_refused(caches):
    with pytest.raises(UsageError, match="focal.*exact near objects only.*another preset"):
        CachedExpert(caches / "focal.zarr")
    source = CachedExpert(caches / "focal.zarr", areas=True)
    assert set(source.specs) == {"bev", "exact"}
    token = source.reader.tokens[1]
    loaded = source.load(token)
    np.testing.assert_array_equal(loaded["exact"][0] == 1, source.reader.exact(token, "bev"))
    found = source.signals([loaded])
    assert found["exact"].shape == (1, 1, 40, 40) and found["bev"].shape == (1, 6, 40, 40)


def area(boxes: np.ndarray, margin: float = 0.0) -> np.ndarray:
    grid = BEVGrid.square(half_extent=8.0, cells=16)
    return footprints(torch.from_numpy(boxes), grid=grid, margin=margin).numpy()


def test_footprints_are_the_cells_under_the_boxes():
    box = np.array([[2.0, 1.0, 0.0, 1.8, 4.2, 1.5, 0.0, 0.0, 0.0]])
    found = area(box)
    centres = np.arange(16) - 7.5
    x, y = np.meshgrid(centres, centres)
    np.testing.assert_array_equal(found, (np.abs(x - 2) <= 2.6) & (np.abs(y - 1) <= 1.4))
    turned = box.copy()
    turned[0, 6] = np.pi / 2
    expected = (np.abs(x - 2) <= 1.4) & (np.abs(y - 1) <= 2.6)
    np.testing.assert_array_equal(area(turned), expected)
    assert area(box * 0 + 0.1).sum() >= 1
    assert not area(box + [[100, 0, 0, 0, 0, 0, 0, 0, 0]]).any()
    assert not area(np.zeros((0, 9))).any()
    assert area(box, margin=1.0).sum() > found.sum()


def test_the_blocks_at_the_far_edges():
    rng = np.random.default_rng(0)
    code = rng.integers(-128, 128, (3, 10, 7)).astype(np.int8)
    means = focal.coarse(code, 4)
    assert means.shape == (3, 3, 2)
    out = np.empty_like(code)
    focal.spread(means, out, 4)
    assert (out[:, 8:10, 4:7] == means[:, 2:, 1:]).all()
    mask = np.zeros((10, 7), bool)
    mask[9, 6] = True
    tiles = focal.tiles_in(mask, 4)
    assert tiles.tolist() == [[0, 0], [0, 0], [0, 1]]
    assert focal.cells(tiles, 4, (10, 7)).sum() == 2 * 3


@pytest.mark.parametrize("shape", [(3, 40, 40), (1, 1, 5), (4, 33, 7)])
def test_differences_come_back(shape, monkeypatch):
    rng = np.random.default_rng(1)
    tile = rng.integers(-128, 128, shape).astype(np.int8)
    stored = differences(tile)
    plain = np.cumsum(stored, axis=1, dtype=np.int8)
    np.testing.assert_array_equal(plain, tile)
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr("cache_tools.differences._COMPILED", False)
        back = stored.copy()
        accumulate(back)
        np.testing.assert_array_equal(back, tile)


def test_an_exported_focal_cache_is_the_built_one(synthetic, tmp_path):
    root = str(synthetic.dataroot)
    words = f"--expert bevdepth-tiny-h --init-seed 0 --version {synthetic.version} --split val "
    words = [*words.split(), "--workers", "0", "--signals", "bev,detections", "--dataroot", root]
    out = {preset: str(tmp_path / f"{preset}.zarr") for preset in ("lossless", "focal", "export")}
    for preset in ("lossless", "focal"):
        assert main(["build", *words, "--out", out[preset], "--preset", preset, "--json"]) == 0
    flags = ["--preset", "focal", "--dataroot", root, "--json"]
    assert main(["export", out["lossless"], out["export"], *flags]) == 0
    assert main(["export", out["lossless"], str(tmp_path / "x.zarr"), "--preset", "focal"]) == 2
    one, other = (
        {p.relative_to(out[name]): p.read_bytes() for p in Path(out[name]).glob("*/c.*")}
        for name in ("focal", "export")
    )
    assert one and one == other
