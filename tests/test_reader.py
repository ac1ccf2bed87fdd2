"""Reading by key: right values, refusals at the door, and never zeros for what is not there."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import made_cache
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from cache_tools.arrays import DirectArray, ZarrArray
from cache_tools.expectation import Expectation
from cache_tools.presets import PRESETS
from cache_tools.reader import CacheReader
from cache_tools.source import CachedExpert
from fd3d.errors import CheckFailed, UsageError
from fd3d.grid import BEVGrid
from fd3d.resample import resample


@pytest.fixture(scope="module")
def lossless(tmp_path_factory):
    out = tmp_path_factory.mktemp("lossless") / "c.zarr"
    made_cache.build(out)
    return out


@pytest.fixture(scope="module")
def balanced(tmp_path_factory):
    out = tmp_path_factory.mktemp("balanced") / "c.zarr"
    made_cache.build(out, preset="balanced")
    return out


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    out = tmp_path_factory.mktemp("fast") / "c.zarr"
    made_cache.build(out, preset="fast")
    return out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiny") / "c.zarr"
    made_cache.build(out, preset="tiny")
    return out


@pytest.fixture(scope="module")
def focal(tmp_path_factory):
    out = tmp_path_factory.mktemp("focal") / "c.zarr"
    made_cache.build(out, preset="focal")
    return out


@pytest.fixture
def copy(lossless, tmp_path):
    return shutil.copytree(lossless, tmp_path / "copy.zarr")


def expected():
    """key -> signals of the unbroken build with shards of 4 in batches of 3."""
    found = {}
    for batch in ([0, 1, 2], [3], [4, 5, 6], [7], [8, 9, 10]):
        for row, position in enumerate(batch):
            values = made_cache.compute(batch)
            found[f"frame-{position:03d}"] = {name: values[name][row] for name in values}
    return found


def test_lossless_frames_are_the_experts_in_float16(lossless):
    reader = CacheReader(lossless)
    assert len(reader) == 11 and list(reader.tokens) == made_cache.keys(11)
    for token, signals in expected().items():
        found = reader.read(token)
        assert token in reader
        for name in ("bev", "heatmap"):
            assert found[name].dtype == np.float16
            np.testing.assert_array_equal(found[name], signals[name].astype(np.float16))
        np.testing.assert_array_equal(found["detections"], signals["detections"])


def test_balanced_frames_are_within_the_budget_and_tables_exact(balanced):
    reader = CacheReader(balanced)
    for token, signals in expected().items():
        found = reader.read(token)
        assert found["bev"].dtype == np.float16
        centred = signals["bev"] - signals["bev"].mean(axis=(1, 2), keepdims=True)
        wrong = np.linalg.norm(found["bev"].astype(np.float32) - signals["bev"])
        assert 0 < wrong <= 0.04 * np.linalg.norm(centred)
        np.testing.assert_array_equal(found["detections"], signals["detections"])


# Uses nothing of this project; docs/cache.md shows the same lines.
PLAIN = """
import json, sys
import numpy as np, zarr
cache, token, out = sys.argv[1:]
group = zarr.open_group(cache, mode="r")
frame = json.load(open(f"{cache}/tokens.json")).index(token)
bev = group["bev"][frame]
if bev.dtype == np.int8:
    step, zero = group["bev_scale"][frame], group["bev_zero"][frame]
    rows = group["bev"].chunks[2]
    for start in range(0, bev.shape[1], rows):  # rows are differences, begun anew in each tile
        bev[:, start : start + rows] = np.cumsum(bev[:, start : start + rows], 1, dtype=np.int8)
    bev = (bev * step[:, None, None] + zero[:, None, None]).astype(np.float16)
boxes = group["detections"][frame][: group["detections_count"][frame, 0]]
assert not any(name.startswith(("fd3d", "cache_tools")) for name in sys.modules)
np.savez(out, bev=bev, detections=boxes)
"""


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"focal"}))
def test_plain_zarr_reads_the_same_numbers_without_this_project(preset, request, tmp_path):
    cache = request.getfixturevalue(preset)
    out = tmp_path / "found.npz"
    command = [sys.executable, "-I", "-c", PLAIN, str(cache), "frame-005", str(out)]
    subprocess.run(command, check=True)
    ours = CacheReader(cache).read("frame-005")
    with np.load(out) as plain:
        np.testing.assert_array_equal(plain["bev"], ours["bev"])
        np.testing.assert_array_equal(plain["detections"], ours["detections"])


def test_a_frame_or_signal_that_is_not_there_is_a_sentence(lossless):
    reader = CacheReader(lossless)
    assert "frame-999" not in reader
    with pytest.raises(UsageError, match="no frame 'frame-999'.*split val"):
        reader.read("frame-999")
    with pytest.raises(UsageError, match="bev, detections, heatmap, not lift"):
        reader.read("frame-000", ["lift"])


@pytest.mark.parametrize(
    ("expect", "says"),
    [
        ({"expert": "bevdepth-r50h"}, "expert drawn, asked for is bevdepth-r50h.*--expert"),
        ({"split": "train"}, "split val, asked for is train.*--split train"),
        ({"dataset_version": "v1.0-mini"}, "v0-drawn, asked for is v1.0-mini"),
        ({"tensors": "ffff"}, "0123456789ab, asked for is ffff"),
        ({"mode": "moved"}, "mode clean, asked for is moved"),
        ({"grid": BEVGrid.square(half_extent=16.0, cells=80)}, "40x40.*asked for is 80x80"),
        ({"signals_id": "ffffffffffff"}, "asked for is ffffffffffff"),
        ({"cache_id": "ffffffffffff"}, "asked for is ffffffffffff"),
    ],
)
def test_another_cache_than_expected_is_refused_naming_both(lossless, expect, says):
    with pytest.raises(UsageError, match=says):
        CacheReader(lossless, expect=Expectation(**expect))


def test_the_cache_that_is_expected_is_taken(lossless):
    reader = CacheReader(lossless)
    CacheReader(
        lossless,
        expect=Expectation(
            expert="drawn",
            tensors=made_cache.IDENTITY.tensors,
            dataset_version="v0-drawn",
            split="val",
            mode="clean",
            grid=made_cache.GRID,
            signals_id=reader.signals_id,
            cache_id=reader.cache_id[:12],
        ),
    )


def test_an_unfinished_cache_is_refused_unless_asked_for(copy):
    (copy / "commits" / "00001.json").unlink()
    with pytest.raises(UsageError, match=r"not finished \(7 of 11 frames\).*nobody is building"):
        CacheReader(copy)
    reader = CacheReader(copy, allow_partial=True)
    assert "frame-000" in reader and "frame-005" not in reader
    assert reader.read("frame-000")
    with pytest.raises(UsageError, match="frame-005 is not built yet"):
        reader.read("frame-005")


@pytest.mark.parametrize("file", ["bev/c.1.0.0.0", "detections/c.1.0.0", "detections_count/c.1.0"])
def test_a_missing_file_is_an_error_and_never_zeros(copy, file):
    reader = CacheReader(copy)
    reader.read("frame-005")
    (copy / file).unlink()
    with pytest.raises(CheckFailed, match="frame-005"):
        reader.read("frame-005")
    with pytest.raises(CheckFailed, match="is missing"):
        CacheReader(copy)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_flipped_byte_in_any_data_file_is_noticed_on_reading(preset, request, tmp_path):
    copy = shutil.copytree(request.getfixturevalue(preset), tmp_path / "copy.zarr")
    sound = {t: CacheReader(copy).read(t) for t in made_cache.keys(11)}
    rng = np.random.default_rng(0)
    for path in sorted(copy.rglob("c.*")):
        whole = path.read_bytes()
        for at in rng.choice(len(whole), min(5, len(whole)), replace=False):
            torn = bytearray(whole)
            torn[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(torn)
            reader, noticed = CacheReader(copy), 0
            first = 4 * int(path.name.split(".")[1])
            for token in made_cache.keys(11)[first : first + 4]:
                try:
                    found = reader.read(token)
                except CheckFailed as error:
                    noticed += 1
                    assert token in str(error) and str(path) in str(error)
                    continue
                for name, value in found.items():
                    np.testing.assert_array_equal(value, sound[token][name])
            # Frames within the budget are not in "exact"; only its index can be damaged.
            assert noticed > 0 or path.parent.name.endswith("_exact"), (path, at)
        path.write_bytes(whole)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_file_is_noticed_on_reading(copy, keep):
    reader = CacheReader(copy)
    path = copy / "heatmap" / "c.0.0.0.0"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckFailed, match="bytes instead of .*frame-000"):
        reader.read("frame-000")
    assert set(reader.read("frame-000", ["bev"])) == {"bev"}


def test_damage_names_file_and_frame_however_it_is_read(copy):
    path = copy / "bev" / "c.1.0.0.0"
    torn = bytearray(path.read_bytes())
    torn[10] ^= 1
    path.write_bytes(torn)
    reader = CacheReader(copy)
    for read in (
        lambda token: reader.read(token),
        lambda token: reader.read_stored(token, "bev"),
        lambda token: reader.read_area(token, "bev"),
        lambda token: reader.read_tiles(token, "bev", [(0, 0), (0, 1), (1, 0), (1, 1)]),
    ):
        with pytest.raises(CheckFailed, match=f"{path} is damaged.*frame-004 .*verify"):
            read("frame-004")
        read("frame-005")
    path.write_bytes(torn[:-1])
    reader = CacheReader(copy, allow_partial=True)
    with pytest.raises(CheckFailed, match="bev/c.1.0.0.0 has .*frame-004 to frame-007"):
        reader.read("frame-006")


@pytest.mark.parametrize("preset", PRESETS)
def test_all_arrays_are_read_directly_and_zarr_python_gives_the_same(preset, request, monkeypatch):
    direct = CacheReader(request.getfixturevalue(preset))
    direct.read("frame-000")
    assert all(isinstance(array, DirectArray) for array in direct._arrays().values())
    without_our_own_way(monkeypatch)
    fallback = CacheReader(direct.path)
    tiles = [(1, 1), (0, 1)]
    for token in direct.tokens:
        ours, theirs = direct.read(token), fallback.read(token)
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            assert ours[name].tobytes() == theirs[name].tobytes()
        one, other = (r.read_area(token, "bev", rows=slice(20, 37)) for r in (direct, fallback))
        np.testing.assert_array_equal(one, other)
        if preset == "focal":
            one, other = (r.exact(token, "bev") for r in (direct, fallback))
        else:
            one, other = (r.read_tiles(token, "bev", tiles) for r in (direct, fallback))
        np.testing.assert_array_equal(one, other)
    assert isinstance(fallback._arrays()["bev"], ZarrArray)


def test_what_is_missing_is_no_fill_value_to_zarr_python_either(copy, monkeypatch):
    without_our_own_way(monkeypatch)
    reader = CacheReader(copy)
    reader.read("frame-005")
    (copy / "bev" / "c.1.0.0.0").unlink()
    with pytest.raises(CheckFailed, match="is missing, so frame frame-005"):
        reader.read("frame-005")


@pytest.mark.parametrize("preset", PRESETS)
def test_parts_of_a_map_are_parts_of_the_whole(preset, request):
    reader, token = CacheReader(request.getfixturevalue(preset)), "frame-006"
    whole = reader.read(token, ["bev"])["bev"]
    part = reader.read_area(
        token, "bev", channels=slice(1, 4), rows=slice(30, 35), columns=slice(-9, None)
    )
    assert part.dtype == whole.dtype
    np.testing.assert_array_equal(part, whole[1:4, 30:35, -9:])
    assert reader.read_area(token, "bev", rows=slice(7, 7)).shape == (6, 0, 40)
    if preset == "focal":
        with pytest.raises(UsageError, match="focal and lacks tiles"):
            reader.read_tiles(token, "bev", [(0, 0)])
        return
    # 40 cells are one tile of 32 and 8 cells of the next.
    tiles = reader.read_tiles(token, "bev", [(1, 0), (0, 0), (1, 1)])
    padded = np.pad(whole, ((0, 0), (0, 24), (0, 24)))
    assert tiles.dtype == whole.dtype and tiles.shape == (3, 6, 32, 32)
    for tile, (row, column) in zip(tiles, [(1, 0), (0, 0), (1, 1)], strict=True):
        cut = padded[:, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        np.testing.assert_array_equal(tile, cut)
    assert reader.read_tiles(token, "bev", []).shape == (0, 6, 32, 32)


def test_parts_that_a_map_does_not_have_are_refused(lossless):
    reader = CacheReader(lossless)
    for tiles in ([(0, 2)], [(-1, 0)], [(0, 0), (0, 0)]):
        with pytest.raises(UsageError, match=r"tiles \(0, 0\) to \(1, 1\), not"):
            reader.read_tiles("frame-000", "bev", tiles)
    with pytest.raises(UsageError, match="steps"):
        reader.read_area("frame-000", "bev", rows=slice(0, 9, 2))
    with pytest.raises(UsageError, match="detections is not a map"):
        reader.read_area("frame-000", "detections")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_stored_map_resampled_is_the_decoded_map_resampled(preset, request):
    reader, token = CacheReader(request.getfixturevalue(preset)), "frame-003"
    there = {"from_grid": made_cache.GRID, "to_grid": made_cache.GRID}
    found = reader.read_stored(token, "bev")
    assert found.stored.dtype == ("float16" if preset == "lossless" else "int8")
    stored = torch.from_numpy(found.stored)[None]
    assert stored.is_contiguous(memory_format=torch.channels_last)
    ours, _ = resample(stored, scale=found.scale, zero=found.zero, **there)
    whole = torch.from_numpy(reader.read(token, ["bev"])["bev"])[None]
    wanted, _ = resample(whole, **there)
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)


def test_what_is_read_goes_into_the_arrays_that_were_given(lossless, balanced):
    for cache in (lossless, balanced):
        reader = CacheReader(cache)
        out = {"bev": np.empty((6, 40, 40), np.float16)}
        for token in ("frame-001", "frame-008"):
            found, alone = reader.read(token, out=out), reader.read(token)
            assert found["bev"] is not alone["bev"]
            assert np.shares_memory(found["bev"], out["bev"])
            for name in alone:
                np.testing.assert_array_equal(found[name], alone[name])
        stored = np.empty_like(reader.read_stored(token, "bev").stored, order="C")
        assert reader.read_stored(token, "bev", out=stored).stored is stored
        np.testing.assert_array_equal(stored, reader.read_stored(token, "bev").stored)
        for wrong in (np.empty((6, 40, 40)), np.empty((6, 40, 41), np.float16)):
            with pytest.raises(UsageError, match="bev cannot be read into.*float16"):
                reader.read(token, out={"bev": wrong})
            with pytest.raises(UsageError, match="bev is stored as"):
                reader.read_stored(token, "bev", out=wrong)
        with pytest.raises(UsageError, match="none for a table"):
            reader.read(token, out={"detections": np.empty((20, 11), np.float32)})


def test_frames_that_were_read_keep_their_values(balanced):
    reader = CacheReader(balanced)
    first = reader.read("frame-000")
    kept = {name: value.copy() for name, value in first.items()}
    for token in reader.tokens:
        reader.read(token)
    for name, value in first.items():
        np.testing.assert_array_equal(value, kept[name])


def test_threads_share_a_reader(balanced):
    reader = CacheReader(balanced)
    here = {token: CacheReader(balanced).read(token)["bev"] for token in reader.tokens}
    tokens = np.random.default_rng(0).choice(reader.tokens, 200)
    with ThreadPoolExecutor(8) as pool:
        for token, bev in zip(
            tokens, pool.map(lambda t: reader.read(t)["bev"], tokens), strict=True
        ):
            np.testing.assert_array_equal(bev, here[token])


class Frames(Dataset):
    def __init__(self, reader):
        self.reader = reader

    def __len__(self):
        return len(self.reader)

    def __getitem__(self, item):
        return torch.from_numpy(self.reader.read(self.reader.tokens[item])["bev"])


def without_our_own_way(monkeypatch):
    def open_array(array, *, difference, **_):
        return ZarrArray(array=array, difference=difference)

    monkeypatch.setattr("cache_tools.reader.open_array", open_array)


@pytest.mark.parametrize(("start", "direct"), [("fork", True), ("fork", False), ("spawn", True)])
def test_reading_in_workers_after_the_parent_has_read(balanced, start, direct, monkeypatch):
    if not direct:
        without_our_own_way(monkeypatch)
    reader = CacheReader(balanced)
    here = [reader.read(token)["bev"] for token in reader.tokens]
    loader = DataLoader(
        Frames(reader), batch_size=None, num_workers=2, multiprocessing_context=start, timeout=60
    )
    for mine, theirs in zip(here, loader, strict=True):
        np.testing.assert_array_equal(mine, theirs.numpy())


def test_a_reader_survives_pickling(lossless):
    reader = CacheReader(lossless)
    reader.read("frame-000")
    again = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(again.read("frame-001")["bev"], reader.read("frame-001")["bev"])


def test_cached_expert_yields_batches_as_the_live_one_does(lossless):
    source = CachedExpert(lossless, names=("bev", "detections"), expect={"split": "val"})
    assert source.grid == made_cache.GRID and set(source.specs) == {"bev", "detections"}
    assert source.ids["cache_id"] == source.cache_id
    tokens = ["frame-009", "frame-002"]
    found = source.signals([source.load(token) for token in tokens], "cpu")
    assert found["bev"].dtype == torch.float32 and found["bev"].shape == (2, 6, 40, 40)
    for row, token in enumerate(tokens):
        wanted = expected()[token]
        torch.testing.assert_close(
            found["bev"][row], torch.from_numpy(wanted["bev"].astype(np.float16)).float()
        )
        torch.testing.assert_close(found["detections"][row], torch.from_numpy(wanted["detections"]))


def test_cached_expert_refuses_what_the_cache_is_not(lossless):
    with pytest.raises(UsageError, match="not lift"):
        CachedExpert(lossless, names=("lift",))
    with pytest.raises(UsageError, match="mode 'sideways'"):
        CachedExpert(lossless, mode="sideways")
    with pytest.raises(UsageError, match="colour.*split"):
        CachedExpert(lossless, expect={"colour": "red"})
