"""The direct way to read shards: the same bits as zarr-python, little memory, nothing unnoticed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec

from cache_tools import arrays
from cache_tools.arrays import DirectArray, ZarrArray, open_array
from cache_tools.shard_files import ChunkDamaged, ShardFiles

DTYPES = ("bool", "int8", "uint8", "int16", "uint16", "int64", "float16", "float32", "float64")


def draw_codecs(rng, dtype):
    """(serialiser, compressors, True where our own way knows them)."""
    known = [
        [],
        [Crc32cCodec()],
        *(
            [
                BloscCodec(typesize=size, cname=cname, shuffle=shuffle, blocksize=blocksize),
                *crc,
            ]
            for cname, blocksize in (("zstd", 0), ("lz4", 256), ("blosclz", 0))
            for shuffle in ("shuffle", "bitshuffle", "noshuffle")
            for crc in ([], [Crc32cCodec()])
            for size in (1, np.dtype(dtype).itemsize)
        ),
    ]
    foreign = [[ZstdCodec()], [GzipCodec(), Crc32cCodec()], [Crc32cCodec(), ZstdCodec()]]
    if rng.random() < 0.15:
        return BytesCodec(), foreign[rng.integers(len(foreign))], False
    compressors = known[rng.integers(len(known))]
    if rng.random() < 0.1 and np.dtype(dtype).itemsize > 1:
        return BytesCodec(endian="big"), compressors, False
    return BytesCodec(), compressors, True


def draw_array(folder, rng):
    """(array, True where our own way knows it) of a drawn layout with drawn numbers, partly not
    written."""
    dtype = DTYPES[rng.integers(len(DTYPES))]
    shape = tuple(int(n) for n in rng.integers(1, 12, rng.integers(2, 5)))
    chunk = tuple(int(rng.integers(1, n + 2)) for n in shape)
    cover = tuple(-(-n // c) * c for n, c in zip(shape[1:], chunk[1:], strict=True))
    serialiser, compressors, known = draw_codecs(rng, dtype)
    fill = np.array(rng.integers(0, 100), dtype)
    layout = {"chunks": chunk, "serializer": serialiser, "compressors": compressors}
    kind = rng.choice(["sharded", "one chunk a file", "many files a frame"], p=[0.7, 0.2, 0.1])
    if kind == "sharded":
        layout["shards"] = (chunk[0] * int(rng.integers(1, 4)), *cover)
        if rng.random() < 0.3:
            layout = {
                "chunks": layout["shards"],
                "compressors": None,
                "serializer": ShardingCodec(
                    chunk_shape=chunk, codecs=[serialiser, *compressors], index_location="start"
                ),
            }
    elif kind == "one chunk a file":
        layout["chunks"] = (chunk[0], *(n + int(rng.integers(3)) for n in shape[1:]))
    else:
        known = known and cover == chunk[1:]
    array = zarr.create_array(
        folder / "a",
        shape=shape,
        dtype=dtype,
        filters=None,
        fill_value=fill,
        chunk_key_encoding={"name": "default", "separator": rng.choice([".", "/"])},
        **layout,
    )
    values = rng.integers(0, 256, shape).astype(dtype)
    for frame in range(shape[0]):
        if rng.random() < 0.7:
            cut = tuple(slice(int(rng.integers(n + 1))) for n in shape[1:])
            array[(frame, *cut)] = values[(frame, *cut)]
    return array, known


def draw_slice(rng, length):
    start, stop = sorted(int(n) for n in rng.integers(0, length + 1, 2))
    return slice(start, stop)


@pytest.mark.parametrize("seed", range(150))
def test_every_drawn_layout_gives_the_bits_that_zarr_gives(tmp_path, seed):
    rng = np.random.default_rng(seed)
    array, known = draw_array(tmp_path, rng)
    ours = open_array(array, files=ShardFiles(run_bytes=64, gap_bytes=int(rng.integers(40))))
    assert isinstance(ours, DirectArray if known else ZarrArray)
    plain, shape = ZarrArray(array=array), array.shape[1:]
    for frame in rng.permutation(array.shape[0]):
        whole = ours.read(frame)
        assert whole.dtype == array.dtype and whole.tobytes() == plain.read(frame).tobytes()
        region = [draw_slice(rng, n) for n in shape[: int(rng.integers(len(shape) + 1))]]
        np.testing.assert_array_equal(ours.read(frame, region), plain.read(frame, region))
        into = np.empty((*shape, 2), array.dtype)[..., 0]
        assert ours.read(frame, out=into) is into and into.tobytes() == whole.tobytes()
        counts = [-(-n // c) for n, c in zip(shape, array.chunks[1:], strict=True)]
        places = [p for p in np.ndindex(*counts) if rng.random() < 0.5]
        mine = {place: values.copy() for place, values in ours.chunks(frame, places)}
        assert sorted(mine) == sorted(places)
        for place, values in plain.chunks(frame, places):
            np.testing.assert_array_equal(mine[place], values)


def test_most_drawn_layouts_are_known(tmp_path):
    """Else the test above would compare zarr-python with itself."""
    known = [draw_array(tmp_path / str(s), np.random.default_rng(s))[1] for s in range(150)]
    assert sum(known) > 75 and not all(known)


def make_tiles(folder, *, frames_in_shard=8):
    """16 frames of (5, 70, 70) in tiles of 32, as a cache has them."""
    array = zarr.create_array(
        folder / "tiles",
        shape=(16, 5, 70, 70),
        dtype="int8",
        chunks=(1, 5, 32, 32),
        shards=(frames_in_shard, 5, 96, 96),
        compressors=[BloscCodec(typesize=1, cname="zstd"), Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    array[...] = np.random.default_rng(0).integers(-9, 9, array.shape)
    return array


@pytest.fixture
def tiles(tmp_path):
    return make_tiles(tmp_path)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
def test_channels_last_is_another_order_of_the_same_values(tmp_path, monkeypatch, dtype, compiled):
    if compiled:
        pytest.importorskip("numba")
    monkeypatch.setattr(arrays, "_COMPILED", compiled)
    array = zarr.create_array(
        tmp_path / "a",
        shape=(1, 12, 20, 9),
        chunks=(1, 12, 8, 8),
        shards=(1, 12, 24, 16),
        dtype=dtype,
    )
    array[...] = np.random.default_rng(0).normal(size=array.shape) * 50
    last = np.empty((20, 9, 12), dtype).transpose(2, 0, 1)
    found = open_array(array, files=ShardFiles())
    found.read(0, out=last)
    np.testing.assert_array_equal(last, array[0])
    part = last[:, 3:19, 1:9]
    found.read(0, (slice(None), slice(3, 19), slice(1, 9)), out=part)
    np.testing.assert_array_equal(part, array[0, :, 3:19, 1:9])


def reads_of(monkeypatch):
    """A list that every pread is noted in, as (start, bytes)."""
    seen, preadv = [], os.preadv

    def watched(handle, buffers, start):
        seen.append((start, sum(len(b) for b in buffers)))
        return preadv(handle, buffers, start)

    monkeypatch.setattr(os, "preadv", watched)
    return seen


def test_neighbours_are_read_in_one_go_and_the_index_once(tmp_path, monkeypatch):
    array = make_tiles(tmp_path, frames_in_shard=1)
    found, seen = open_array(array, files=ShardFiles(gap_bytes=0)), reads_of(monkeypatch)
    found.read(0)
    size = shard_file(array).stat().st_size
    assert seen == [(size - 148, 148), (0, size - 148)]
    found.read(0)
    assert seen[2:] == [(0, size - 148)]
    # Three tiles that are no neighbours in the file.
    row = (slice(None), slice(0, 32))
    found.read(0, row)
    apart = seen[3:]
    assert len(apart) == 3
    open_array(array, files=ShardFiles(gap_bytes=1 << 20)).read(0, row)
    assert len(seen) == 8 and seen[7][1] > sum(length for _, length in apart)


def test_memory_is_bounded_by_run_index_and_chunk(tiles, monkeypatch):
    files = ShardFiles(max_indexes=1, run_bytes=9000)
    found, seen = open_array(tiles, files=files), reads_of(monkeypatch)
    for frame in range(16):
        found.read(frame)
    largest = max(length for start, length in seen)
    assert len(seen) > 16 * 2 and largest <= 9000
    kept = [*files.memory._arrays.values(), *files.memory.indexes.values()]
    assert sum(array.nbytes for array in kept) <= 9000 + 5 * 32 * 32 + 16 * 72
    found.read(0)
    assert len(files.memory.indexes) == 1


def test_short_reads_are_continued(tiles, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda handle, buffers, start: preadv(handle, [buffers[0][:100]], start)
    )
    np.testing.assert_array_equal(open_array(tiles, files=ShardFiles()).read(5), tiles[5])


def test_threads_read_for_themselves(tiles):
    found, wanted = open_array(tiles, files=ShardFiles()), tiles[...]

    def look(seed):
        frames = np.random.default_rng(seed).integers(0, 16, 40)
        return all((found.read(int(frame)) == wanted[frame]).all() for frame in frames)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(look, range(16)))


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    """Even by one of the same length whose index says something else."""
    array = zarr.create_array(
        tmp_path / "a", shape=(2, 3), chunks=(1, 3), shards=(2, 3), dtype="int8", compressors=None
    )
    found = open_array(array, files=ShardFiles())
    for frame, other in ((0, 1), (1, 0)):
        array[other], array[frame] = 0, 5
        assert (found.read(frame) == 5).all() and (found.read(other) == 0).all()
    size = (tmp_path / "a" / "c" / "0" / "0").stat().st_size
    assert size == 3 + 2 * 16 + 4, "both files hold one chunk"


def shard_file(array):
    return array.store.root / "c.0.0.0.0"


def test_no_flipped_byte_of_a_shard_passes(tiles):
    path, wanted = shard_file(tiles), tiles[:8]
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    in_index = len(whole) - 16 * 72 - 4
    for at in (*rng.integers(0, in_index, 60), *rng.integers(in_index, len(whole), 60)):
        torn = bytearray(whole)
        torn[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(torn)
        found, noticed = open_array(tiles, files=ShardFiles()), 0
        for frame in range(8):
            try:
                np.testing.assert_array_equal(found.read(frame), wanted[frame])
            except ChunkDamaged as error:
                noticed += 1
                assert "crc32c" in str(error)
        assert noticed == (8 if at >= in_index else 1)


def test_no_truncation_of_a_shard_passes(tiles):
    path = shard_file(tiles)
    whole = path.read_bytes()
    for keep in (0, 3, 16 * 72 + 3, 16 * 72 + 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ChunkDamaged):
            open_array(tiles, files=ShardFiles()).read(0)


@pytest.mark.parametrize("place", [4, 12])
def test_lengths_that_blosc_would_take_on_trust_are_checked(tmp_path, place):
    """Without a crc32c, which nothing of ours is."""
    array = zarr.create_array(
        tmp_path / "a", shape=(1, 5000), chunks=(1, 5000), dtype="int8", compressors=[BloscCodec()]
    )
    array[...] = (np.arange(5000) % 7)[None]
    path = tmp_path / "a" / "c" / "0" / "0"
    torn = bytearray(path.read_bytes())
    torn[place + 1] += 1
    path.write_bytes(torn)
    with pytest.raises(ChunkDamaged, match="not what Blosc wrote|holds"):
        open_array(array, files=ShardFiles()).read(0)


def test_an_index_that_points_beyond_the_end_is_damage(tiles):
    """With a checksum that fits: a file that was put together wrongly."""
    import google_crc32c

    path = shard_file(tiles)
    whole = path.read_bytes()
    index = np.frombuffer(whole[-16 * 72 - 4 : -4], "<u8").copy()
    for place, value in ((0, len(whole) + 1), (1, len(whole) + 1), (1, 2**64 - 8)):
        wrong = index.copy()
        wrong[place] = value
        tail = wrong.tobytes() + google_crc32c.value(wrong.tobytes()).to_bytes(4, "little")
        path.write_bytes(whole[: -16 * 72 - 4] + tail)
        with pytest.raises(ChunkDamaged, match="beyond its end"):
            open_array(tiles, files=ShardFiles()).read(0)


def test_what_is_not_there_is_fill_or_damage_as_asked_for(tiles):
    path = shard_file(tiles)
    path.unlink()
    assert (open_array(tiles, files=ShardFiles()).read(0) == tiles.fill_value).all()
    strict = open_array(tiles, files=ShardFiles(), complete=True)
    with pytest.raises(FileNotFoundError):
        strict.read(0)
    tiles[0, :, :32, :32] = 1
    with pytest.raises(ChunkDamaged, match="is not in it"):
        strict.read(0)
    assert (strict.read(0, (slice(None), slice(32), slice(32))) == 1).all()


def test_what_cannot_be_asked_for_is_refused(tiles):
    found = open_array(tiles, files=ShardFiles())
    with pytest.raises(IndexError, match="no frame 16"):
        found.read(16)
    with pytest.raises(ValueError, match="without steps"):
        found.read(0, (slice(0, 4, 2),))
    with pytest.raises(ValueError, match="needed is int8"):
        found.read(0, out=np.empty((5, 70, 70), np.float32))
