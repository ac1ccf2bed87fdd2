"""How fast a stored map becomes the target of a loss: `fd3d.resample` against torch's own chain.

    python benchmarks/resample.py                    # one CPU thread
    python benchmarks/resample.py --device cuda      # the CuPy kernels; not yet run on a GPU

Each round times every contender once, in turn, so that a busy moment of the machine hits all
alike. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fd3d import cuda
from fd3d.augment import BEVAugmentation
from fd3d.grid import BEVGrid
from fd3d.resample import fused, resample

SOURCE = BEVGrid.square(half_extent=51.2, cells=256)
MATRIX = BEVAugmentation(rotate=0.3, scale=1.05, flip_x=True).matrix()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")
    parser.add_argument("--channels", type=int, default=256, help="of the map")
    parser.add_argument("--frames", type=int, default=1, help="in a batch")
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each contender")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--note", default="", help="what else ran on the machine, for the JSON")
    parser.add_argument("--out", type=Path, help="JSON file [benchmarks/results/resample-DEVICE]")
    return parser.parse_args()


def naive(stored: Tensor, scale: Tensor, zero: Tensor, target: BEVGrid, dtype: torch.dtype):
    """Dequantise to float32, `grid_sample` on the fine grid, `avg_pool2d`, cast."""
    value = stored.float() * scale.view(1, -1, 1, 1) + zero.view(1, -1, 1, 1)
    # On a square around the origin torch's coordinates are metres / half extent.
    back = np.linalg.inv(MATRIX)[:2, [0, 1, 3]] / [1.0, 1.0, SOURCE.x_max]
    theta = torch.tensor(back, dtype=torch.float32, device=stored.device)
    where = functional.affine_grid(
        theta.expand(len(stored), 2, 3), list(value.shape), align_corners=False
    )
    moved = functional.grid_sample(value, where, align_corners=False)
    ratio = SOURCE.nx // target.nx
    return (functional.avg_pool2d(moved, ratio) if ratio > 1 else moved).to(dtype)


def contenders(args: argparse.Namespace, target: BEVGrid) -> dict[str, Callable[[], Tensor]]:
    """Name -> a run that returns the map in half precision."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.frames, args.channels, *SOURCE.shape)
    planar = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    planar = planar.to(args.device)
    last = planar.contiguous(memory_format=torch.channels_last)
    scale = torch.rand(args.channels, generator=generator).to(args.device)
    zero = torch.randn(args.channels, generator=generator).to(args.device)

    def ours(stored: Tensor, path: str) -> Callable[[], Tensor]:
        out = torch.empty(
            (*shape[:2], *target.shape),
            dtype=torch.float16,
            device=args.device,
            memory_format=torch.channels_last if stored is last else torch.contiguous_format,
        )
        return lambda: resample(
            stored,
            scale=scale,
            zero=zero,
            from_grid=SOURCE,
            to_grid=target,
            matrix=MATRIX,
            out=out,
            path=path,
        )[0]

    # Reading a map and writing the result is at least a copy of half as many bytes.
    size = (last.nbytes + 2 * args.frames * args.channels * target.nx * target.ny) // 2
    # Written to beforehand: untouched zeros are one page of memory, mapped many times.
    one, other = (torch.ones(size, dtype=torch.uint8, device=args.device) for _ in range(2))
    runs = {
        "naive torch": lambda: naive(planar, scale, zero, target, torch.float16),
        "naive torch, channels last": lambda: naive(last, scale, zero, target, torch.float16),
        "torch path, channels last": ours(last, "torch"),
    }
    fast = "cupy" if args.device == "cuda" else "numba"
    if (cuda.missing() is None) if fast == "cupy" else fused.found():
        runs[f"{fast} path, channels last"] = ours(last, fast)
        runs[f"{fast} path, planar"] = ours(planar, fast)
    runs["memory floor"] = lambda: other.copy_(one)
    return runs


def once(run: Callable[[], Tensor], device: str) -> tuple[float, float]:
    """Milliseconds of wall clock (GPU: between events) and of processor time."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end), float("nan")
    wall, busy = time.perf_counter(), time.process_time()
    run()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - busy)


def measure(runs: dict[str, Callable[[], Tensor]], rounds: int, device: str) -> dict[str, dict]:
    """Name -> times in ms of each contender, after one round that is not counted."""
    times: dict[str, list] = {name: [] for name in runs}
    for count in range(rounds + 1):
        for name, run in runs.items():
            found = once(run, device)
            if count:
                times[name].append(found)
    table = {}
    for name, pairs in times.items():
        wall, busy = (sorted(one) for one in zip(*pairs, strict=True))
        low, middle, high = statistics.quantiles(wall, n=4, method="inclusive")
        table[name] = {
            "median_ms": round(middle, 3),
            "quartiles_ms": [round(low, 3), round(high, 3)],
            "min_ms": round(wall[0], 3),
            "median_processor_ms": None if device == "cuda" else round(statistics.median(busy), 3),
        }
    return table


def disagreement(runs: dict[str, Callable[[], Tensor]], target: BEVGrid) -> float:
    """Largest difference to the naive chain where both read only inside the map, relative to the
    largest value: the outermost half cell is the one thing that they treat differently."""
    first = next(iter(runs.values()))().float()
    worst = 0.0
    rows, cols = np.mgrid[: target.ny, : target.nx]
    points = np.stack([cols, rows, np.ones_like(cols)], axis=-1) @ target.cell_to_metres().T
    back = points @ np.linalg.inv(MATRIX)[:2, [0, 1, 3]].T
    inner = torch.from_numpy(np.abs(back).max(axis=-1) < SOURCE.x_max - 3 * target.cell_x)
    for name, run in runs.items():
        if name != "memory floor":
            wrong = (run().float() - first).abs().amax(dim=(0, 1)).cpu()
            worst = max(worst, float(wrong[inner].max() / first.abs().max()))
    return worst


def report(table: dict[str, dict], title: str) -> None:
    naive_ms, floor = table["naive torch"]["median_ms"], table["memory floor"]["median_ms"]
    print(f"\n{title}\n{'':28}{'median':>9}{'quartiles':>18}{'speed-up':>10}{'of floor':>10}")
    for name, row in table.items():
        low, high = row["quartiles_ms"]
        print(
            f"{name:28}{row['median_ms']:9.2f}{low:9.2f}{high:9.2f}"
            f"{naive_ms / row['median_ms']:9.1f}x{row['median_ms'] / floor:9.1f}x"
        )


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> None:
    args = parse()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda needs a CUDA device and a build of torch with CUDA")
    if args.device == "cuda" and cuda.missing():
        print(f"{cuda.missing()}; timing torch alone")
    torch.set_num_threads(args.threads)
    result = {
        "what": f"int8 map of {args.channels} channels, {SOURCE}, turned 0.3 rad, scaled 1.05 and "
        "flipped, to float16",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} thread used",
        "frames": args.frames,
        "rounds": args.rounds,
        "note": args.note,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: installed(name) for name in ("torch", "numpy", "numba", "cupy")},
        "load_before": os.getloadavg()[0],
        "targets": {},
    }
    for cells in (128, 256):
        target = BEVGrid.square(half_extent=SOURCE.x_max, cells=cells)
        runs = contenders(args, target)
        wrong = disagreement(runs, target)
        table = measure(runs, args.rounds, args.device)
        report(table, f"256 -> {cells}, ms; largest difference to naive torch {wrong:.1e}")
        result["targets"][str(cells)] = {"difference_to_naive": wrong, "times": table}
    result["load_after"] = os.getloadavg()[0]
    out = args.out or Path(__file__).parent / "results" / f"resample-{args.device}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
