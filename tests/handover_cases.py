"""Sources for the hand-over's tests: what a cached expert gives, drawn from the frame's number.

In a file of their own, so that spawned workers can import them.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from fd3d.data.batch import Batch
from fd3d.distill.handover import Handover, PairedFrames, collate_pairs
from fd3d.distill.signals import SignalSpec
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid

GRID = BEVGrid.square(half_extent=16.0, cells=24)
HALF = BEVGrid.square(half_extent=16.0, cells=12)
FRAMES = 10


class DrawnSource:
    """Two maps and a table for each frame; `fatal` kills the worker, `broken` raises in it."""

    def __init__(self, *, fatal: int = -1, broken: int = -1) -> None:
        self.fatal, self.broken = fatal, broken
        self.grid, self.ids = GRID, {"expert": "drawn"}
        maps = {
            name: SignalSpec(name=name, shape=(channels, *GRID.shape), dtype="float16", grid=GRID)
            for name, channels in (("bev", 5), ("heatmap", 3))
        }
        table = SignalSpec(name="detections", shape=(20, 11), dtype="float32", ragged=True)
        self.specs = {**maps, "detections": table}

    def load(self, token: str, frame: object = None) -> dict[str, np.ndarray]:
        number = int(token)
        if number == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == self.broken:
            raise UsageError(f"frame {token} cannot be read: mend it")
        rng = np.random.default_rng(number)
        found = {
            name: rng.normal(size=self.specs[name].shape).astype(np.float16)
            for name in ("bev", "heatmap")
        }
        rows = int(rng.integers(0, 5))
        return {**found, "detections": rng.normal(size=(rows, 11)).astype(np.float32)}

    def signals(self, loaded, device="cpu"):
        found = {
            name: torch.stack([torch.from_numpy(frame[name]) for frame in loaded]).float()
            for name in ("bev", "heatmap")
        }
        return {**found, "detections": [torch.from_numpy(f["detections"]) for f in loaded]}


@dataclass
class PlainFrames:
    """Frames with nothing but their token and its number."""

    count: int = FRAMES

    @property
    def tokens(self) -> list[str]:
        return [str(number) for number in range(self.count)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Batch:
        blank = torch.full((1, 1), float(row))
        names = ("images", "rots", "trans", "intrins", "post_rots", "post_trans", "dt")
        return Batch(tokens=(str(row),), **dict.fromkeys(names, blank))


def loader_for(handover: Handover, *, batch: int, workers: int, start: str | None = None):
    return DataLoader(
        PairedFrames(frames=PlainFrames(), load=handover.load),
        batch_size=batch,
        num_workers=workers,
        collate_fn=collate_pairs,
        multiprocessing_context=start,
    )


def taken(handover: Handover, loader: DataLoader) -> list[tuple]:
    """(tokens, signals) of every batch, the signals copied out of memory that is used again."""
    found = []
    for batch, loaded in loader:
        signals = handover.signals(loaded)
        copied = {
            name: value.clone() if isinstance(value, torch.Tensor) else value
            for name, value in signals.items()
        }
        found.append((batch.tokens, copied))
    return found


def holders(trainer: int) -> set[int]:
    """The processes that hold shared memory which process `trainer` made, named or not."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        # Processes of others, and those that end meanwhile.
        with suppress(OSError):
            if f"/torch_{trainer}_" in maps.read_text():
                found.add(int(maps.parent.name))
    return found


def orphan_a_waiting_worker() -> None:
    """Start a worker that soon waits for a slot, print the number of holders of the memory and
    the worker's process number, die without a word."""
    handover = Handover(source=DrawnSource(), frames=1, workers=1, slots=2)
    batches = iter(loader_for(handover, batch=1, workers=1))
    # Two batches fetched and neither given back: the worker waits with the third.
    next(batches), next(batches)
    print(len(holders(os.getpid())), batches._workers[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
