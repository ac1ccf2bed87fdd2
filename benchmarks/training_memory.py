"""Memory and time of a training step of one frame, with and without activation checkpointing
(`fd3d.models.recompute`), at full size.

    python benchmarks/training_memory.py                   # both networks of the paper's pair

Each run has a process of its own. "held" is what autograd keeps for the backward pass, which is the
same on any device; "peak" is the highest the process held beyond what it held before the first
pass, weights and optimizer left out (Linux). Pictures are noise. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from timing import circumstances
from torch import Tensor

from fd3d import models
from fd3d.data.batch import Batch
from fd3d.efficiency import blank_batch
from fd3d.errors import exit_code
from fd3d.models.recompute import save_memory

MIB = 2**20


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["bevdepth-r50l", "bevdepth-r50h"])
    parser.add_argument("--note", default="", help="what else ran on the machine, for the JSON")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/training-memory-cpu.json")
    )
    return parser.parse_args()


def noise_batch(model: torch.nn.Module) -> Batch:
    """One frame of noise, with a few boxes and depths to learn."""
    batch, generator = blank_batch(model), torch.Generator().manual_seed(0)
    boxes = torch.rand(8, 9, generator=generator) * 4 + 0.5
    boxes[:, :2] = torch.rand(8, 2, generator=generator) * 80 - 40
    return replace(
        batch,
        images=torch.randn(batch.images.shape, generator=generator),
        depth=torch.rand(1, 6, *model.image.depth_shape, generator=generator) * 50 + 2,
        boxes=(boxes,),
        labels=(torch.arange(8),),
    )


def measure(name: str, saving: bool) -> dict:
    """One step of a model with random weights."""
    torch.manual_seed(0)
    model = models.build(name).train()
    if saving:
        save_memory(model)
    batch = noise_batch(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        terms = model.loss(model(batch), batch)
    sum(terms.values()).backward()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    weights = {value.untyped_storage().data_ptr() for value in model.parameters()}
    kept = sum(size for place, size in held.items() if place not in weights)
    return {
        "held_mib": round(kept / MIB),
        "peak_mib": round((peak[0] - before) / MIB),
        "seconds": round(seconds, 1),
    }


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(args: argparse.Namespace) -> None:
    rows = []
    for name in args.models:
        for saving in (False, True):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                row = pool.submit(measure, name, saving).result()
            rows.append({"model": name, "save_memory": saving, **row})
            print(json.dumps(rows[-1]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "what": "one training step of one frame of noise, float32",
        **circumstances(
            device="cpu", threads=torch.get_num_threads(), note=args.note, packages=("torch",)
        ),
        "rows": rows,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"made {args.out}")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(parse())))
