"""Shards of our own making: the chunks that zarr-python would write, frame after frame."""

from __future__ import annotations

import made_cache
import numpy as np
import pytest
import zarr

from cache_tools import layout
from cache_tools.presets import PRESETS, codec_for
from cache_tools.shard_builder import ShardBuilder
from cache_tools.shard_files import ShardFiles
from fd3d.distill.signals import SignalSpec

FRAMES, SHARD = 3, 4
SIGNALS = {
    **made_cache.SIGNALS,
    "lift": SignalSpec(name="lift", shape=(2, 3, 5, 7), dtype="float16"),
    "depth": SignalSpec(name="depth", shape=(4, 33, 31), dtype="float32"),
}


def draw(array, rng):
    return (rng.normal(size=(FRAMES, *array.shape)) * 40).astype(array.dtype)


def in_zarr(array, values):
    """What the Zarr array holds for frames: themselves, or differences of the rows of tiles."""
    if not array.difference:
        return values
    stored = np.diff(values, axis=2, prepend=np.int8(0))
    stored[:, :, :: array.chunk[1]] = values[:, :, :: array.chunk[1]]
    return stored


def make(folder, preset):
    """Twice the same values: a folder that we wrote and one that zarr-python did."""
    codecs = {name: codec_for(spec, preset) for name, spec in SIGNALS.items()}
    arrays = layout.all_arrays(SIGNALS, codecs)
    rng = np.random.default_rng(0)
    values = {name: draw(array, rng) for name, array in arrays.items()}
    for who in ("ours", "theirs"):
        layout.create_arrays(folder / who, arrays=arrays, frames=FRAMES, shard=SHARD)
    for name, array in arrays.items():
        shard = ShardBuilder(array=array, shard_frames=SHARD)
        for row, value in enumerate(values[name]):
            shard.add(row, value)
        (folder / "ours" / array.file_of(0)).write_bytes(b"".join(shard.parts()))
        with zarr.config.set({"array.write_empty_chunks": True}):
            zarr.open_group(folder / "theirs")[name][...] = in_zarr(array, values[name])
    return arrays, values


@pytest.mark.parametrize("preset", PRESETS)
def test_zarr_python_reads_what_was_added(tmp_path, preset):
    arrays, values = make(tmp_path, preset)
    for name, array in arrays.items():
        found = zarr.open_group(tmp_path / "ours")[name][...]
        np.testing.assert_array_equal(found, in_zarr(array, values[name]))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_chunk_is_the_one_that_zarr_python_writes(tmp_path, preset):
    for name, array in make(tmp_path, preset)[0].items():
        ours, theirs = (tmp_path / who / array.file_of(0) for who in ("ours", "theirs"))
        assert ours.stat().st_size == theirs.stat().st_size
        if array.blosc is None:
            assert ours.read_bytes() == theirs.read_bytes(), name
            continue
        tiles = int(np.prod([-(-n // c) for n, c in zip(array.shape, array.chunk, strict=True)]))
        count, files = SHARD * tiles, ShardFiles()
        mine, wanted = (
            {n: None if s is None else s.tobytes() for n, s in found}
            for found in (files.chunks(p, range(count), count=count) for p in (ours, theirs))
        )
        assert mine == wanted
        # The frame that was not added is in neither.
        assert [n for n, s in mine.items() if s is None] == list(range(FRAMES * tiles, count))


def test_a_frame_lies_in_one_piece_and_in_order(tmp_path):
    arrays, _ = make(tmp_path, "balanced")
    array = arrays["bev"]
    whole = (tmp_path / "ours" / array.file_of(0)).read_bytes()
    index = np.frombuffer(whole[-SHARD * 4 * 16 - 4 : -4], "<u8").reshape(SHARD * 4, 2)[
        : FRAMES * 4
    ]
    assert index[0, 0] == 0 and (index[1:, 0] == index[:-1].sum(axis=1)).all()
