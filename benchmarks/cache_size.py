"""Bytes of the same maps: every preset of our cache against the usual ways to keep them.

    python benchmarks/cache_size.py --tiny val.zarr --dataroot DATAROOT --work WORK

Two sizes of maps, as `benchmarks/cache_read.py` has them: `full` of `bevdepth-r50h` with weights
from a seed, `tiny` of a trained `bevdepth-tiny-h`. Each contender writes the same float16 maps;
its bytes, files, processor time and error (relative L2, channel means removed; of focal inside the
tiles that it keeps) are those of this one writing. Prints tables and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import stores
import torch
from cache_read import full_maps, tiny_maps
from timing import circumstances, once

from cache_tools.codecs import error_of
from cache_tools.presets import PRESETS, codec_for
from cache_tools.reader import CacheReader
from fd3d.boxes import YAW, L, W
from fd3d.distill.areas import footprints
from fd3d.distill.signals import SignalSpec
from fd3d.grid import BEVGrid

FULL_GRID = BEVGrid.square(half_extent=51.2, cells=256)
TRAIN_FRAMES = 28_130  # nuScenes v1.0-trainval, split train
OBJECTS = 30
NEAREST, FARTHEST = 5.0, 50.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", type=Path, help="a lossless cache, for the size tiny")
    parser.add_argument("--dataroot", type=Path, help="a nuScenes data set, for the size full")
    parser.add_argument("--version", default="v1.0-mini", help="of the data set [v1.0-mini]")
    parser.add_argument("--split", default="mini_val", help="of the data set [mini_val]")
    parser.add_argument("--frames", type=int, default=16, help="of the size full [16: a shard]")
    parser.add_argument("--tiny-frames", type=int, default=32, help="of the size tiny")
    parser.add_argument("--work", type=Path, help="where the stores are written, and the made map")
    parser.add_argument("--note", default="", help="what else ran on the machine, for the JSON")
    parser.add_argument("--out", type=Path, help="JSON file [benchmarks/results/cache-size-cpu]")
    args = parser.parse_args()
    if args.tiny is None and args.dataroot is None and args.work is None:
        parser.error("give --tiny, --dataroot or a --work that has the made map")
    return args


def objects(frame: int, *, grid: BEVGrid, margin: float) -> np.ndarray:
    """(Y, X) bool: where the drawn objects of a frame are, anywhere around the car."""
    rng = np.random.default_rng(frame)
    boxes = np.zeros((OBJECTS, 9))
    angle = rng.uniform(-np.pi, np.pi, OBJECTS)
    away = rng.uniform(NEAREST, FARTHEST, OBJECTS)
    boxes[:, 0], boxes[:, 1] = away * np.cos(angle), away * np.sin(angle)
    boxes[:, L], boxes[:, W] = 4.8, 2.0
    boxes[:, YAW] = rng.uniform(-np.pi, np.pi, OBJECTS)
    return footprints(torch.as_tensor(boxes), grid=grid, margin=margin).numpy()


def contenders(grid: BEVGrid) -> dict[str, Callable[[Path], stores.Store]]:
    """Name -> the store in a folder."""
    made = {
        ".npy fp16": stores.Npy,
        "torch.save": stores.TorchSave,
        "safetensors": stores.Safetensors,
        "np.savez_compressed": stores.Npz,
        "HDF5, gzip": lambda folder: stores.Hdf5(folder, "gzip"),
        "LMDB": stores.Lmdb,
        "WebDataset tar": stores.WebDataset,
        "zarr-python, its defaults": stores.ZarrDefaults,
    }
    for preset in PRESETS:
        made[f"cache {preset}"] = lambda folder, preset=preset: ours(folder, preset, grid)
    return made


def ours(folder: Path, preset: str, grid: BEVGrid) -> stores.Cache:
    spec = SignalSpec(name="bev", shape=(1, *grid.shape), dtype="float16", grid=grid)
    codec = codec_for(spec, preset)
    if not codec.coarse:
        return stores.Cache(folder, preset, grid=grid)

    def focus(frame: int) -> np.ndarray:
        return objects(frame, grid=grid, margin=codec.focus_margin)

    return stores.Cache(folder, preset, grid=grid, focus=focus)


def measure(maps: list[np.ndarray], grid: BEVGrid, work: Path) -> dict:
    """One size: what every contender makes of the maps."""
    made = {name: make(work / f"{i}") for i, (name, make) in enumerate(contenders(grid).items())}
    rows = {}
    for name, store in stores.installed(made).items():
        # Imports and the first call of each codec are not what is asked.
        for part in (maps[:1], maps):
            shutil.rmtree(store.folder, ignore_errors=True)
            store.folder.mkdir(parents=True)
            busy = once(lambda store=store, part=part: store.write(part))[1]
        rows[name] = {**row(store, maps), "encode_processor_ms": round(busy / len(maps), 2)}
        store.close()
        shutil.rmtree(store.folder)
    raw = maps[0].nbytes
    report(rows, f"{len(maps)} maps of {' x '.join(map(str, maps[0].shape))}, {raw / 1e6:.2f} MB")
    return {"shape": list(maps[0].shape), "frames": len(maps), "raw_bytes": raw, "stores": rows}


def row(store: stores.Store, maps: list[np.ndarray]) -> dict:
    """Bytes, files and errors of a store that was written."""
    size = sum(path.stat().st_size for path in store.files()) / len(maps)
    kept, errors = [], []
    for frame, value in enumerate(maps):
        found = store.read(frame).float()[0].numpy()
        cells = np.ones(value.shape[1:], bool)
        if isinstance(store, stores.Cache):
            cells = store.reader().exact(str(frame), "bev")
        kept.append(cells.mean())
        value = value.astype(np.float32)
        errors.append(error_of(value[:, cells], found[:, cells]).frame)
    return {
        "of_raw": round(size / maps[0].nbytes, 4),
        "bytes_a_frame": round(size),
        "files": len(store.files()),
        "error_mean": round(float(np.mean(errors)), 5),
        "error_worst": round(max(errors), 5),
        "cells_kept": round(float(np.mean(kept)), 3),
        "train_gb": round(size * TRAIN_FRAMES / 1e9, 1),
    }


def report(rows: dict[str, dict], title: str) -> None:
    print(f"\n{title}\n{'':28}{'of raw':>8}{'encode':>9}{'error':>9}{'files':>7}{'train':>10}")
    for name, found in rows.items():
        print(
            f"{name:28}{found['of_raw']:8.3f}{found['encode_processor_ms']:6.1f} ms"
            f"{found['error_mean']:9.2%}{found['files']:7}{found['train_gb']:7.1f} GB"
        )


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    packages = ("torch", "numpy", "zarr", "numcodecs", "safetensors", "h5py", "lmdb", "webdataset")
    result = {
        "what": "bytes on disk of the same float16 maps, one signal, a frame a map; encode is "
        "processor time of writing them, to the disk where the store does that",
        "focal": f"{OBJECTS} objects of 4.8 m x 2 m drawn {NEAREST:g} to {FARTHEST:g} m from the "
        "car, anew for each frame; its error is that inside the tiles that it keeps",
        "train_frames": TRAIN_FRAMES,
        **circumstances(device="cpu", threads=1, note=args.note, packages=packages),
        "sizes": {},
    }
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = args.work or Path(folder)
        if args.dataroot is not None or (work / "r50h-seed-0.npy").exists():
            found = measure(full_maps(args, work), FULL_GRID, Path(folder) / "full")
            found["maps"] = "bevdepth-r50h, weights from seed 0, one frame moved by some cells"
            result["sizes"]["full"] = found
        if args.tiny is not None:
            grid = CacheReader(args.tiny).specs["bev"].grid
            found = measure(tiny_maps(args.tiny, args.tiny_frames), grid, Path(folder) / "tiny")
            found["maps"] = "a trained bevdepth-tiny-h"
            result["sizes"]["tiny"] = found
    result["load_after"] = os.getloadavg()[0]
    out = args.out or Path(__file__).parent / "results" / "cache-size-cpu.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwrote {out.name}")


if __name__ == "__main__":
    main()
