"""From the disk to the target of a loss: our cache against what people do by hand.

    python recipes/quickstart.py --out runs/quickstart
    python benchmarks/cache_read.py --tiny runs/quickstart/expert.zarr \\
        --dataroot DATAROOT --version v1.0-mini --split mini_val --work WORK

Each run reads a frame, moves it by a BEV augmentation drawn for the round, and brings it to the
grid of comparison in float16. Two sizes: `full` is `bevdepth-r50h` with weights from a seed, run
on the first frame of the split (which stands in for a trained one, of which there is none);
`tiny` are maps of the trained expert of the quickstart. Prints tables and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import stores
import torch
from resample import naive, well_inside
from timing import circumstances, interleaved, once
from torch import Tensor

from cache_tools.reader import CacheReader
from fd3d.augment import draw_bev
from fd3d.grid import BEVGrid
from fd3d.resample import resample

NAIVE = ".npy fp16, naive torch"
KERNEL = ".npy fp16"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", type=Path, help="a cache of bevdepth-tiny-h, for the size tiny")
    parser.add_argument("--dataroot", type=Path, help="a nuScenes data set, for the size full")
    parser.add_argument("--version", default="v1.0-mini", help="of the data set [v1.0-mini]")
    parser.add_argument("--split", default="mini_val", help="of the data set [mini_val]")
    parser.add_argument("--frames", type=int, default=8, help="of the size full")
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each contender")
    parser.add_argument("--work", type=Path, help="where the stores are written [a temporary one]")
    parser.add_argument("--note", default="", help="what else ran on the machine, for the JSON")
    parser.add_argument("--out", type=Path, help="JSON file [benchmarks/results/cache-read-cpu]")
    args = parser.parse_args()
    if args.tiny is None and args.dataroot is None:
        parser.error("give --tiny, --dataroot or both")
    return args


def full_maps(args: argparse.Namespace, work: Path) -> list[np.ndarray]:
    """Maps of 256x256x256: one that the network made, moved by some cells for each frame."""
    kept = work / "r50h-seed-0.npy"
    if not kept.exists():
        from cache_tools.expert import prepare

        run = prepare(
            expert="bevdepth-r50h",
            checkpoint=None,
            init_seed=0,
            dataroot=args.dataroot,
            version=args.version,
            split=args.split,
            signals=("bev",),
            workers=0,
        )
        (batch,) = run.load([[0]])
        np.save(kept, run.compute(batch)["bev"][0].astype(np.float16))
    made = np.load(kept)
    # Not by whole tiles: each frame packs a little differently.
    return [np.roll(made, (37 * i, 53 * i), axis=(1, 2)) for i in range(args.frames)]


def tiny_maps(cache: Path, frames: int = 64) -> list[np.ndarray]:
    reader = CacheReader(cache)
    return [reader.read(token, ["bev"])["bev"] for token in reader.tokens[:frames]]


def write_stores(maps: list[np.ndarray], folder: Path) -> dict[str, stores.Store]:
    """Contender -> its store, written. Those without `naive` use `fd3d.resample`."""
    made = {
        KERNEL: stores.Npy(folder / "npy"),
        ".npy fp16, mapped": stores.NpyMapped(folder / "npy-mapped"),
        ".npy int8": stores.NpyInt8(folder / "npy-int8"),
        "torch.save fp16": stores.TorchSave(folder / "torch"),
        "safetensors fp16": stores.Safetensors(folder / "safetensors"),
        "zarr-python, lossless": stores.PlainZarr(folder / "plain-lossless", "lossless"),
        "zarr-python, balanced": stores.PlainZarr(folder / "plain-balanced", "balanced"),
        "zarr-python, its defaults": stores.ZarrDefaults(folder / "zarr"),
        "HDF5 fp16": stores.Hdf5(folder / "hdf5"),
        "LMDB fp16": stores.Lmdb(folder / "lmdb"),
        "WebDataset fp16": stores.WebDataset(folder / "webdataset"),
        "cache lossless": stores.Cache(folder / "lossless", "lossless"),
        "cache balanced": stores.Cache(folder / "balanced", "balanced"),
        "cache fast": stores.Cache(folder / "fast", "fast"),
    }
    made[NAIVE] = stores.Npy(folder / "npy-naive")
    made["cache balanced, naive torch"] = stores.CacheDecoded(folder / "decoded", "balanced")
    made = stores.installed(made)
    for store in made.values():
        store.folder.mkdir(parents=True)
        store.write(maps)
    return dict(sorted(made.items(), key=lambda item: ("naive" not in item[0], "cache" in item[0])))


def augmentation(number: int) -> np.ndarray:
    """(4, 4), the same for every contender that takes its `number`-th frame."""
    return draw_bev(np.random.default_rng(number)).matrix()


def contenders(
    made: dict[str, stores.Store],
    maps: list[np.ndarray],
    *,
    source: BEVGrid,
    target: BEVGrid,
    batch: int,
) -> dict[str, Callable[[int], Tensor]]:
    """Contender -> a run that takes `batch` frames to `target` and returns the last."""
    # One place for all results, as a loader's worker has it in the memory that it shares.
    out = torch.empty((1, len(maps[0]), *target.shape), dtype=torch.float16)
    out = out.contiguous(memory_format=torch.channels_last)

    def move(name: str, frame: int, matrix: np.ndarray) -> Tensor:
        found = made[name].read(frame)
        if "naive" in name:
            grids = {"source": source, "target": target}
            return naive(found.float(), **grids, matrix=matrix, dtype=torch.float16)
        return resample(
            found.numbers,
            scale=found.scale,
            zero=found.zero,
            from_grid=source,
            to_grid=target,
            matrix=matrix,
            out=out,
        )[0]

    def runner(name: str) -> Callable[[int], Tensor]:
        def run(count: int) -> Tensor:
            for i in range(batch):
                number = batch * count + i
                result = move(name, number % len(maps), augmentation(number))
            return result

        return run

    return {name: runner(name) for name in made}


def check(runs: dict[str, Callable[[int], Tensor]], inner: Tensor) -> dict[str, float]:
    """Contender -> relative L2 difference to the unpacked map through `fd3d.resample`, channel
    means removed, in the `inner` cells: at the edge torch's own chain means something else."""
    wanted = runs[KERNEL](0).float()[..., inner]
    spread = (wanted - wanted.mean(dim=2, keepdim=True)).norm()
    found = {}
    for name, run in runs.items():
        found[name] = float((run(0).float()[..., inner] - wanted).norm() / spread)
        # What keeps the same numbers must give the same result.
        lossy = {"naive": 2e-3, "balanced": 0.04, "int8": 0.04, "fast": 0.02}
        most = max([limit for word, limit in lossy.items() if word in name], default=0.0)
        if found[name] > most:
            raise SystemExit(f"error: {name} is {found[name]:.3g} away from {KERNEL}")
    return found


def measure(args: argparse.Namespace, maps: list[np.ndarray], work: Path, *, batch: int) -> dict:
    """One size: bytes and times of every contender, on its own grid and on half of it."""
    cells = maps[0].shape[-1]
    source = BEVGrid.square(half_extent=0.2 * cells, cells=cells)
    made = write_stores(maps, work)
    sizes = {
        name: sum(path.stat().st_size for path in store.files()) / len(maps)
        for name, store in made.items()
    }
    result = {
        "shape": list(maps[0].shape),
        "frames": len(maps),
        "bytes_a_frame": sizes,
        "disk_mb_s": round(disk_speed(made[KERNEL])),
        "targets": {},
    }
    for target_cells in (cells // 2, cells):
        target = BEVGrid.square(half_extent=source.x_max, cells=target_cells)
        runs = contenders(made, maps, source=source, target=target, batch=batch)
        last = augmentation(batch - 1)
        inner = well_inside(source=source, target=target, matrix=last)
        differences = check(runs, inner)
        tables = {
            "warm": interleaved(runs, rounds=args.rounds, items=batch),
            "cold": interleaved(
                runs, rounds=args.rounds, items=batch, before=lambda name: made[name].evict()
            ),
        }
        report(tables, sizes, f"{cells} -> {target_cells}, ms a frame")
        result["targets"][str(target_cells)] = {"difference": differences, "times": tables}
    return result


def disk_speed(store: stores.Store) -> float:
    """MB/s at which a store's evicted files come from the disk, one after the other."""
    store.evict()
    into = bytearray(max(path.stat().st_size for path in store.files()))
    read, milliseconds = 0, 0.0
    for path in store.files():
        with open(path, "rb", buffering=0) as file:
            milliseconds += once(lambda file=file: file.readinto(into))[0]
        read += path.stat().st_size
    return read / milliseconds / 1e3


def report(tables: dict[str, dict], sizes: dict[str, float], title: str) -> None:
    """Speed-ups: warm by processor time, which other work on the machine does not lengthen; cold
    by the clock, for waiting counts."""
    print(f"\n{title}\n{'':30}{'of raw':>8}{'warm':>9}{'quartiles':>17}{'processor':>11}", end="")
    print(f"{'speed-up':>10}{'cold':>9}{'quartiles':>17}{'speed-up':>10}")
    ways = {"warm": "median_processor_ms", "cold": "median_ms"}
    for name in tables["warm"]:
        warm, cold = tables["warm"][name], tables["cold"][name]
        faster = {k: tables[k][NAIVE][way] / tables[k][name][way] for k, way in ways.items()}
        print(
            f"{name:30}{sizes[name] / sizes[KERNEL]:8.3f}{warm['median_ms']:9.2f}"
            f"{warm['quartiles_ms'][0]:9.2f}{warm['quartiles_ms'][1]:8.2f}"
            f"{warm['median_processor_ms']:11.2f}{faster['warm']:9.1f}x{cold['median_ms']:9.2f}"
            f"{cold['quartiles_ms'][0]:9.2f}{cold['quartiles_ms'][1]:8.2f}{faster['cold']:9.1f}x"
        )


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    packages = ("torch", "numpy", "numba", "zarr", "numcodecs", "safetensors")
    packages += ("h5py", "lmdb", "webdataset")
    result = {
        "what": "a map from the disk, moved by a BEV augmentation (rotation up to 0.39 rad, scale "
        "0.95 to 1.05, flips) drawn for each frame, to float16 on the grid of comparison",
        "cold": "files evicted with posix_fadvise before each run; below the system may be caches",
        "rounds": args.rounds,
        **circumstances(device="cpu", threads=1, note=args.note, packages=packages),
        "sizes": {},
    }
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = args.work or Path(folder)
        if args.dataroot is not None:
            found = measure(args, full_maps(args, work), Path(folder) / "full", batch=1)
            found["maps"] = "bevdepth-r50h, weights from seed 0, one frame moved by some cells"
            result["sizes"]["full"] = found
        if args.tiny is not None:
            found = measure(args, tiny_maps(args.tiny), Path(folder) / "tiny", batch=16)
            found["maps"] = "a trained bevdepth-tiny-h"
            result["sizes"]["tiny"] = found
    result["load_after"] = os.getloadavg()[0]
    out = args.out or Path(__file__).parent / "results" / "cache-read-cpu.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
