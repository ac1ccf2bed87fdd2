"""How fast a stored map becomes the target of a loss: `fd3d.resample` against torch's own chain.

    python benchmarks/resample.py                    # one CPU thread
    python benchmarks/resample.py --device cuda      # the CuPy kernels; not yet run on a GPU

Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from timing import circumstances, interleaved
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


def naive(
    value: Tensor, *, source: BEVGrid, target: BEVGrid, matrix: np.ndarray, dtype: torch.dtype
) -> Tensor:
    """A float32 map by torch's own chain: `grid_sample` on the fine grid, `avg_pool2d`, cast."""
    # On a square around the origin torch's coordinates are metres / half extent.
    back = np.linalg.inv(matrix)[:2, [0, 1, 3]] / [1.0, 1.0, source.x_max]
    theta = torch.tensor(back, dtype=torch.float32, device=value.device)
    where = functional.affine_grid(
        theta.expand(len(value), 2, 3), list(value.shape), align_corners=False
    )
    moved = functional.grid_sample(value, where, align_corners=False)
    ratio = source.nx // target.nx
    return (functional.avg_pool2d(moved, ratio) if ratio > 1 else moved).to(dtype)


def contenders(args: argparse.Namespace, target: BEVGrid) -> dict[str, Callable[[int], Tensor]]:
    """Name -> a run that returns the map in half precision."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.frames, args.channels, *SOURCE.shape)
    planar = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    planar = planar.to(args.device)
    last = planar.contiguous(memory_format=torch.channels_last)
    scale = torch.rand(args.channels, generator=generator).to(args.device)
    zero = torch.randn(args.channels, generator=generator).to(args.device)

    def chain(stored: Tensor) -> Callable[[int], Tensor]:
        def run(_: int) -> Tensor:
            value = stored.float() * scale.view(1, -1, 1, 1) + zero.view(1, -1, 1, 1)
            return naive(value, source=SOURCE, target=target, matrix=MATRIX, dtype=torch.float16)

        return run

    def ours(stored: Tensor, path: str) -> Callable[[int], Tensor]:
        out = torch.empty(
            (*shape[:2], *target.shape),
            dtype=torch.float16,
            device=args.device,
            memory_format=torch.channels_last if stored is last else torch.contiguous_format,
        )
        return lambda _: resample(
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
        "naive torch": chain(planar),
        "naive torch, channels last": chain(last),
        "torch path, channels last": ours(last, "torch"),
    }
    fast = "cupy" if args.device == "cuda" else "numba"
    if (cuda.missing() is None) if fast == "cupy" else fused.found():
        runs[f"{fast} path, channels last"] = ours(last, fast)
        runs[f"{fast} path, planar"] = ours(planar, fast)
    runs["memory floor"] = lambda _: other.copy_(one)
    return runs


def well_inside(*, source: BEVGrid, target: BEVGrid, matrix: np.ndarray) -> Tensor:
    """(Y', X') bool: cells of `target` that read only inside of `source`."""
    rows, cols = np.mgrid[: target.ny, : target.nx]
    points = np.stack([cols, rows, np.ones_like(cols)], axis=-1) @ target.cell_to_metres().T
    back = points @ np.linalg.inv(matrix)[:2, [0, 1, 3]].T
    return torch.from_numpy(np.abs(back).max(axis=-1) < source.x_max - 3 * target.cell_x)


def disagreement(runs: dict[str, Callable[[int], Tensor]], target: BEVGrid) -> float:
    """Largest difference to the naive chain where both read only inside the map, relative to the
    largest value: the outermost half cell is the one thing that they treat differently."""
    first = next(iter(runs.values()))(0).float()
    worst = 0.0
    inner = well_inside(source=SOURCE, target=target, matrix=MATRIX)
    for name, run in runs.items():
        if name != "memory floor":
            wrong = (run(0).float() - first).abs().amax(dim=(0, 1)).cpu()
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
        "frames": args.frames,
        "rounds": args.rounds,
        **circumstances(
            device=args.device,
            threads=args.threads,
            note=args.note,
            packages=("torch", "numpy", "numba", "cupy"),
        ),
        "targets": {},
    }
    for cells in (128, 256):
        target = BEVGrid.square(half_extent=SOURCE.x_max, cells=cells)
        runs = contenders(args, target)
        wrong = disagreement(runs, target)
        table = interleaved(runs, rounds=args.rounds, device=args.device)
        report(table, f"256 -> {cells}, ms; largest difference to naive torch {wrong:.1e}")
        result["targets"][str(cells)] = {"difference_to_naive": wrong, "times": table}
    result["load_after"] = os.getloadavg()[0]
    out = args.out or Path(__file__).parent / "results" / f"resample-{args.device}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
