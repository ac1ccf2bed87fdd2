"""Bytes against errors: what the presets were chosen by.

    fd3d-cache build ... --split val --signals bev,detections --out val.zarr    # lossless
    python benchmarks/rate_distortion.py --cache val.zarr --dataroot DATA --full r50h.npy

Packs every map of a trained tiny expert's lossless cache (and one full-size map, (C, Y, X) float16
or float32 in a .npy file, for its bytes) in candidates for the presets. For each: bytes of raw
float16, relative error with channel means removed (99th percentile of frames, worst channel,
inside objects), and the change of NDS when the expert's own head reads the decoded maps, over all
frames of the split. Prints a table and writes JSON. Minutes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numcodecs.blosc import BITSHUFFLE, NOSHUFFLE, Blosc
from timing import circumstances

from cache_tools import focal
from cache_tools.codecs import dequantise, error_of, quantise
from cache_tools.differences import differences
from cache_tools.focus import Focus
from cache_tools.presets import SignalCodec, codec_for
from cache_tools.reader import CacheReader
from cache_tools.score import detect, head_of, scores_of
from fd3d.data.index import FrameIndex
from fd3d.distill.signals import SignalSpec
from fd3d.grid import BEVGrid

_SHUFFLE = {"bitshuffle": BITSHUFFLE, "noshuffle": NOSHUFFLE}
_OBJECTS = SignalCodec(kind="int8", focus_boxes=0, focus_margin=0.0)
# Whatever its shape, presets look at a spec for what kind of signal it is.
_BEV = SignalSpec(
    name="bev", shape=(1, 1, 1), dtype="float16", grid=BEVGrid.square(half_extent=1.0, cells=1)
)


def candidates() -> Iterator[tuple[str, SignalCodec]]:
    """Steps first, then packers for the same codes, then what focal may leave out."""
    base = codec_for(_BEV, "balanced")
    for steps in (32.0, 16.0, 12.0, 8.0, 6.0, 4.0, 3.0, 2.0):
        yield f"sd/{steps:g}", replace(base, steps_per_sd=steps)
    for level in (1, 5, 7):
        yield f"zstd-{level}", replace(base, clevel=level)
    for tile in (16, 64):
        yield f"tiles of {tile}", replace(base, tile=tile)
    yield "bitshuffle", replace(base, shuffle="bitshuffle")
    plain = replace(base, difference=False)
    yield "no differences", plain
    yield "no differences, bitshuffle", replace(plain, shuffle="bitshuffle")
    yield "no differences, bitshuffle, zstd-1", replace(plain, shuffle="bitshuffle", clevel=1)
    for name, level in (("lz4", 1), ("lz4hc", 5)):
        packer = replace(base, steps_per_sd=16.0, cname=name, clevel=level)
        yield f"sd/16, {name}-{level}", packer
        yield f"sd/16, {name}-{level}, no differences", replace(packer, difference=False)
    focus = codec_for(_BEV, "focal")
    for tile in (8, 16, 32):
        for coarse in (2, 4, 8):
            codec = replace(focus, tile=tile, coarse=coarse)
            yield f"focal, tiles of {tile}, means of {coarse}", codec


def packed(code: np.ndarray, codec: SignalCodec, keep: np.ndarray | None = None) -> int:
    """Bytes of a map's tiles as a cache would hold them, without the shard's index."""
    blosc = Blosc(
        cname=codec.cname, clevel=codec.clevel, shuffle=_SHUFFLE[codec.shuffle], typesize=1
    )
    rows, columns = (-(-cells // codec.tile) for cells in code.shape[1:])
    total = 0
    for row in range(rows):
        for column in range(columns):
            if keep is not None and not keep[row, column]:
                continue
            y, x = (slice(i * codec.tile, (i + 1) * codec.tile) for i in (row, column))
            tile = np.ascontiguousarray(code[:, y, x])
            total += len(blosc.encode(differences(tile) if codec.difference else tile)) + 4
    return total


def stored(
    value: np.ndarray, codec: SignalCodec, focus: np.ndarray | None
) -> tuple[int, np.ndarray, np.ndarray]:
    """(bytes, the decoded map, which cells are exact) of a map (C, Y, X)."""
    code, scale, zero = quantise(value, steps_per_sd=codec.steps_per_sd)
    size = scale.nbytes + zero.nbytes
    exact = np.ones(value.shape[1:], bool)
    keep = None
    if codec.coarse:
        keep = focal.tiles_in(focus, codec.tile)
        exact = focal.cells(keep, codec.tile, value.shape[1:])
        means = focal.coarse(code, codec.coarse)
        size += packed(means, codec)
        whole = np.empty_like(code)
        focal.spread(means, whole, codec.coarse)
        code = np.where(exact, code, whole)
    size += packed(code, codec, keep)
    return size, dequantise(code, scale, zero, dtype="float16"), exact


def of_frames(
    reader: CacheReader, codec: SignalCodec, focus: Callable, truth: Callable
) -> tuple[dict, dict[str, np.ndarray]]:
    """What a candidate does to every frame of the cache, and the maps that it gives back."""
    sizes, errors, inside, channels, maps = [], [], [], [], {}
    for token in reader.tokens:
        found = reader.read(token, ["bev", "detections"])
        value = found["bev"].astype(np.float32)
        mask = focus(token, found["detections"]) if codec.coarse else None
        size, decoded, exact = stored(value, codec, mask)
        sizes.append(size / found["bev"].nbytes)
        whole = error_of(value[:, exact], decoded[:, exact])
        errors.append(whole.frame)
        channels.append(whole.worst_channel)
        objects = truth(token, found["detections"])
        if objects.sum() > 1:
            inside.append(error_of(value[:, objects], decoded[:, objects]).frame)
        maps[token] = decoded
    return {
        "of_raw": float(np.mean(sizes)),
        "error_p99": float(np.quantile(errors, 0.99)),
        "worst_channel": max(channels),
        "inside_objects_p99": float(np.quantile(inside, 0.99)),
    }, maps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="lossless, of a whole split")
    parser.add_argument("--dataroot", type=Path, required=True, help="of the cache's data set")
    parser.add_argument("--full", type=Path, help="a full-size map in a .npy file, for its bytes")
    parser.add_argument("--no-nds", action="store_true", help="bytes and errors alone")
    parser.add_argument("--note", default="", help="what else ran on the machine, for the JSON")
    parser.add_argument("--out", type=Path, default="benchmarks/results/rate-distortion.json")
    args = parser.parse_args()
    reader = CacheReader(args.cache)
    who, grid = reader.manifest.identity, reader.specs["bev"].grid
    index = FrameIndex.open(dataroot=args.dataroot, version=who.dataset_version)
    data = {"dataroot": args.dataroot, "version": who.dataset_version, "split": who.split}
    model = None if args.no_nds else head_of(reader)
    full = np.load(args.full).astype(np.float32) if args.full else None
    objects = Focus(index=index, grid=grid, codec=_OBJECTS)

    def nds(maps: dict[str, np.ndarray]) -> float:
        found = detect(model, reader.tokens, maps.get, index=index, quiet=True)
        return scores_of(found, **data).nds

    lossless = {token: reader.read(token, ["bev"])["bev"] for token in reader.tokens}
    base = nds(lossless) if model else None
    rows = {}
    for name, codec in candidates():
        focus = Focus(index=index, grid=grid, codec=codec)
        row, maps = of_frames(reader, codec, focus, objects)
        if model:
            row["nds_points"] = 100 * (nds(maps) - base)
        if full is not None and not codec.coarse:
            size, decoded, _ = stored(full, codec, None)
            row["full_of_raw"] = size / (full.size * 2)
            row["full_error"] = error_of(full, decoded).frame
        rows[name] = {key: round(value, 5) for key, value in row.items()}
        print(f"{name:40}", "  ".join(f"{k} {v:.4f}" for k, v in row.items()), flush=True)
    args.out.write_text(
        json.dumps(
            {
                **circumstances(device="cpu", threads=1, note=args.note, packages=("numcodecs",)),
                "maps": f"bev of {who.expert} ({who.origin}), {len(reader)} frames of {who.split}, "
                f"{who.dataset_version}",
                "nds_lossless": base,
                "candidates": rows,
            },
            indent=1,
        )
        + "\n"
    )
    print(f"made {args.out}")


if __name__ == "__main__":
    main()
