"""What it costs to bring an expert's map from a loader worker to the trainer.

    python benchmarks/handover.py
    python benchmarks/handover.py --dataroot DATA --cache EXPERT.zarr   # also the tiny pair's waits

First part: one worker holds a map of 256 x 128 x 128 float16 (8.4 MB, numbers drawn at random) and
hands it over again and again, through the ring and in torch's own way (collated tensors in new
shared memory), in turn. Timed in the trainer, with the batch ready: from asking the loader to the
float32 map. Second part: `recipes/distill_bevdepth.py` with and without a cache, in turn; its
summaries say how long a step waited for the loader. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fd3d.distill.handover import Handover
from fd3d.distill.signals import SignalSpec
from fd3d.grid import BEVGrid

ROOT = Path(__file__).parents[1]
GRID = BEVGrid.square(half_extent=51.2, cells=128)
CHANNELS = 256
READY = 0.05  # seconds after which a worker has surely filled its next batch


class OneMap:
    """A source that always gives the same map; reading and decoding cost nothing."""

    def __init__(self) -> None:
        self.grid, self.ids = GRID, {}
        shape = (CHANNELS, *GRID.shape)
        self.specs = {"bev": SignalSpec(name="bev", shape=shape, dtype="float16", grid=GRID)}
        self._map = np.random.default_rng(0).normal(size=shape).astype(np.float16)

    def load(self, token: str, frame: object = None) -> dict[str, np.ndarray]:
        return {"bev": self._map}


class Loaded(Dataset):
    """What `load` gives for each of `count` batches of one frame."""

    def __init__(self, load: Callable, count: int) -> None:
        self._load, self._count = load, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int):
        return self._load(["frame"], [None])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=40, help="batches of each way")
    parser.add_argument("--dataroot", help="a synthetic data set, for the second part")
    parser.add_argument("--cache", help="its training split as `bevdepth-tiny-h` sees it")
    parser.add_argument("--steps", type=int, default=100, help="of each training")
    parser.add_argument("--repeats", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--note", default="", help="what else ran on the machine, for the JSON")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/handover-cpu.json")
    args = parser.parse_args()
    if bool(args.dataroot) != bool(args.cache):
        parser.error("--dataroot and --cache belong together")
    return args


def spread(values: list[float]) -> dict[str, float | list[float]]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median_ms": round(middle, 3), "quartiles_ms": [round(low, 3), round(high, 3)]}


def time_ways(rounds: int) -> dict[str, dict]:
    """Milliseconds of the trainer for one map, by the way in which it came."""
    source = OneMap()
    ring = Handover(source=source, frames=1, workers=1)

    def stacked(tokens: list[str], _: list) -> torch.Tensor:
        return torch.stack([torch.from_numpy(source.load(token)["bev"]) for token in tokens])

    def loader(load: Callable):
        return iter(DataLoader(Loaded(load, rounds + 3), batch_size=None, num_workers=1))

    ways = {
        "ring": (loader(ring.load), lambda loaded: ring.signals(loaded)["bev"]),
        "torch's own": (loader(stacked), lambda loaded: loaded.float()),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for count in range(rounds + 3):
        for name, (batches, take) in ways.items():
            time.sleep(READY)
            began = time.perf_counter()
            found = take(next(batches))
            passed = 1e3 * (time.perf_counter() - began)
            assert found.dtype == torch.float32 and found.shape[1] == CHANNELS
            if count >= 3:
                times[name].append(passed)
    kept = torch.empty(1, CHANNELS, *GRID.shape)
    stored = torch.from_numpy(source.load("frame")["bev"])[None]
    floor = []
    for _ in range(rounds):
        began = time.perf_counter()
        kept.copy_(stored)
        floor.append(1e3 * (time.perf_counter() - began))
    return {
        **{name: spread(one) for name, one in times.items()},
        "cast to float32 alone": spread(floor),
    }


def time_waits(args: argparse.Namespace) -> dict[str, dict]:
    """Milliseconds of a step of 2 frames, and of them those spent waiting for the loader."""
    kinds = {
        f"{name}, {workers} workers": ["--workers", str(workers), *flags]
        for workers in (0, 1)
        for name, flags in (
            ("no distillation", ["--distiller", "none"]),
            ("l2 from the cache", ["--distiller", "l2", "--cache", args.cache]),
        )
    }
    found: dict[str, list[dict]] = {name: [] for name in kinds}
    common = ["--model", "bevdepth-tiny-l", "--dataroot", args.dataroot, "--batch", "2"]
    common += ["--version", "v1.0-synthetic", "--keep-images-mb", "1500", "--cpu"]
    common += ["--steps", str(args.steps), "--compare", "apprentice"]
    for _ in range(args.repeats):
        for name, flags in kinds.items():
            with tempfile.TemporaryDirectory() as out:
                command = ["recipes/distill_bevdepth.py", *common, *flags, "--out", out + "/run"]
                subprocess.run(
                    [sys.executable, *command],
                    cwd=ROOT,
                    check=True,
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
                )
                found[name].append(json.loads(Path(out, "run", "summary.json").read_text()))
    return {
        name: {
            key: [round(1e3 * run[key], 2) for run in runs]
            for key in ("seconds_per_step", "wait_per_step")
        }
        for name, runs in found.items()
    }


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    result = {
        "what": f"one map of {CHANNELS} x {GRID.ny} x {GRID.nx} float16 from a worker to the "
        "trainer's float32, drawn numbers",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "rounds": args.rounds,
        "note": args.note,
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
        "handover": time_ways(args.rounds),
    }
    for name, row in result["handover"].items():
        low, high = row["quartiles_ms"]
        print(f"{name:24}{row['median_ms']:8.2f} ms  (quartiles {low:.2f} to {high:.2f})")
    if args.cache:
        result["steps_ms"] = time_waits(args)
        for name, row in result["steps_ms"].items():
            print(f"{name:32} step {row['seconds_per_step']} ms, waits {row['wait_per_step']} ms")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"made {args.out}")


if __name__ == "__main__":
    main()
