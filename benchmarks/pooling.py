"""What splatting costs: `fd3d.models.bevdepth.pooling.pool` against the form that builds a feature
for every frustum point, from the points' places to the map, with and without gradients.

    python benchmarks/pooling.py                       # full size of bevdepth-r50h, one CPU thread

Each run has a process of its own, whose memory is the highest it held beyond what it held before
(Linux). Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from fd3d import models
from fd3d.errors import exit_code
from fd3d.models.bevdepth.depth_net import Cameras
from fd3d.models.bevdepth.pooling import cells_of, point_table, pool, pool_reference
from fd3d.models.bevdepth.view_transform import frustum_points

# Degrees to the left of forward, and a focal length in pixels of 1600x900, about as in nuScenes.
DIRECTIONS = (55, 0, -55, 110, 180, -110)
FOCAL = 1266.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="bevdepth-r50h", help="whose sizes to take")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each contender")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--note", default="", help="what else ran on the machine, for the JSON")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pooling-cpu.json"))
    return parser.parse_args()


def ring(config) -> Cameras:
    """Six level cameras around the car, with the test view of the network's pictures."""
    scale = config.image.width / 1600
    rots = []
    for degrees in DIRECTIONS:
        angle = math.radians(degrees + 90)
        forward = torch.tensor([math.cos(angle), math.sin(angle), 0.0])
        down = torch.tensor([0.0, 0.0, -1.0])
        rots.append(torch.stack([torch.linalg.cross(down, forward), down, forward], dim=1))
    intrinsic = torch.tensor([[FOCAL, 0, 800], [0, FOCAL, 450], [0, 0, 1]])
    shift = torch.tensor([0.0, config.image.height - 900 * scale, 0.0])
    return Cameras(
        rots=torch.stack(rots)[None],
        trans=torch.zeros(1, 6, 3),
        intrins=intrinsic.expand(1, 6, 3, 3),
        post_rots=torch.diag(torch.tensor([scale, scale, 1.0])).expand(1, 6, 3, 3),
        post_trans=shift.expand(1, 6, 3),
    )


def inputs(name: str) -> tuple[Tensor, Tensor, Tensor, object]:
    """Frustum points, depth probabilities and context of one frame, and the config."""
    with torch.device("meta"):
        config = models.build(name).config
    generator = torch.Generator().manual_seed(0)
    shape = config.image.depth_shape
    depth = torch.randn(6, config.image.depth_bins, *shape, generator=generator).softmax(dim=1)
    context = torch.randn(6, config.context, *shape, generator=generator)
    context = context.contiguous(memory_format=torch.channels_last)
    return frustum_points(ring(config), config.image), depth, context, config


def splat(kind: str, points: Tensor, depth: Tensor, context: Tensor, config) -> Tensor:
    cells = cells_of(points, config.grid, config.heights)
    if kind == "naive":
        return pool_reference(depth, context, cells, config.grid)
    return pool(depth, context, point_table(cells, config.grid))


def _memory(field: str) -> int:
    """KiB of this process: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def contend(kind: str, gradients: bool, args: argparse.Namespace) -> dict[str, float]:
    """Seconds and MiB of one contender, in this process."""
    torch.set_num_threads(args.threads)
    points, depth, context, config = inputs(args.model)
    depth.requires_grad_(gradients)
    context.requires_grad_(gradients)
    weights = torch.randn(1, config.context, *config.grid.shape)

    def once() -> None:
        sums = splat(kind, points, depth, context, config)
        if gradients:
            sums.backward(weights)
            depth.grad = context.grad = None

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM falls back to VmRSS
    before = _memory("VmRSS")
    once()
    peak = _memory("VmHWM") - before
    times = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "best": min(times), "peak_mib": peak / 1024}


def agreement(name: str) -> dict[str, float]:
    """Largest difference of the maps and of either gradient, relative to the largest value."""
    points, depth, context, config = inputs(name)
    depth.requires_grad_()
    context.requires_grad_()
    weights = torch.randn(1, config.context, *config.grid.shape)
    found = {}
    for kind in ("naive", "table"):
        sums = splat(kind, points, depth, context, config)
        found[kind] = (sums.detach(), *torch.autograd.grad(sums, (depth, context), weights))
    return {
        what: ((one - other).abs().max() / one.abs().max()).item()
        for what, one, other in zip(
            ("map", "depth_gradient", "context_gradient"), *found.values(), strict=True
        )
    }


def main(args: argparse.Namespace) -> None:
    spawn = multiprocessing.get_context("spawn")
    rows = []
    for gradients in (False, True):
        for kind in ("naive", "table"):
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                row = process.submit(contend, kind, gradients, args).result()
            rows.append({"kind": kind, "gradients": gradients, **row})
            print(
                f"{kind:>6} {'with' if gradients else 'without'} gradients: "
                f"{row['seconds']:.3f} s, {row['peak_mib']:.0f} MiB more"
            )
    ratios = {}
    for gradients, word in ((False, "forward"), (True, "with_gradients")):
        naive, table = (row for row in rows if row["gradients"] == gradients)
        ratios[word] = {key: naive[key] / table[key] for key in ("seconds", "peak_mib")}
        print(
            f"{word}: {ratios[word]['seconds']:.1f} times faster, {ratios[word]['peak_mib']:.1f} "
            "times less memory"
        )
    errors = agreement(args.model)
    print("largest relative differences:", {name: f"{value:.1e}" for name, value in errors.items()})
    record = {
        "model": args.model,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": args.threads,
            "torch": torch.__version__,
            "note": args.note,
        },
        "runs": rows,
        "naive_over_table": ratios,
        "largest_relative_difference": errors,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"made {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(parse())))
