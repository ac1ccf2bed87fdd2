"""A small cache for tests: the "expert" draws a frame's signals from its position as the seed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np

from cache_tools.build import BuildReport, build_cache
from cache_tools.manifest import Identity
from fd3d.distill.signals import SignalSpec
from fd3d.grid import BEVGrid

CELLS = 40  # not a multiple of the tile, so that edge tiles are met
GRID = BEVGrid.square(half_extent=16.0, cells=CELLS)
SIGNALS = {
    "bev": SignalSpec(name="bev", shape=(6, CELLS, CELLS), dtype="float16", grid=GRID),
    "heatmap": SignalSpec(name="heatmap", shape=(3, CELLS, CELLS), dtype="float16", grid=GRID),
    "detections": SignalSpec(name="detections", shape=(20, 11), dtype="float32", ragged=True),
}
IDENTITY = Identity(
    expert="drawn",
    tensors="0123456789abcdef",
    preprocessing={"height": 64, "resize": [0.1, 0.2]},
    mode="clean",
    dataset_version="v0-drawn",
    split="val",
)


def keys(count: int) -> list[str]:
    return [f"frame-{i:03d}" for i in range(count)]


def values(position: int) -> dict[str, np.ndarray]:
    """The signals of one frame in float32, as an expert would give them."""
    rng = np.random.default_rng(position)
    bev = rng.normal(size=(6, CELLS, CELLS)) * rng.uniform(0.1, 3, (6, 1, 1)) + 1.5
    bev[0] = np.maximum(bev[0], 0)
    bev[1] = 0.0
    return {
        "bev": bev.astype(np.float32),
        "heatmap": rng.uniform(size=(3, CELLS, CELLS)).astype(np.float32) ** 4,
        "detections": rng.normal(size=(int(rng.integers(0, 21)), 11)).astype(np.float32),
    }


def focus(position: int) -> np.ndarray:
    """(CELLS, CELLS) bool: a few cells of the frame, for preset focal; none in every fifth."""
    rng = np.random.default_rng([position, 1])
    return rng.uniform(size=(CELLS, CELLS)) < (0.001 if position % 5 else 0)


def compute(positions) -> dict[str, list[np.ndarray]]:
    """Like batched arithmetic, every value depends a little on the batch that it was in."""
    frames = [values(position) for position in positions]
    for frame in frames:
        frame["bev"][2] += 0.01 * len(positions) + 0.001 * positions[0]
    found = {name: [frame[name] for frame in frames] for name in SIGNALS}
    return {**found, "focus": [focus(position) for position in positions]}


def build(out: Path, *, frames: int = 11, **changes) -> BuildReport:
    arguments = {
        "out": out,
        "identity": IDENTITY,
        "signals": SIGNALS,
        "keys": keys(frames),
        "compute": compute,
        "shard_frames": 4,
        "batch": 3,
        "quiet": True,
        **changes,
    }
    return build_cache(**arguments)


# What a build does to the disk goes through these; each call is a point to be killed at.
_TOUCHES = ("replace", "rename", "fsync", "unlink", "mkdir")


def build_and_die(out: Path, at_touch: int, after: bool, count_file: Path | None = None) -> None:
    """Build, and kill this process (SIGKILL) before or after its `at_touch`-th change of the
    disk; with `count_file`, write there how many there were in a build that was left alone."""
    count = 0

    def watched(original):
        def touch(*args, **kwargs):
            nonlocal count
            count += 1
            mine = count
            if mine == at_touch and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return original(*args, **kwargs)
            finally:
                if mine == at_touch:
                    os.kill(os.getpid(), signal.SIGKILL)

        return touch

    for name in _TOUCHES:
        setattr(os, name, watched(getattr(os, name)))
    build(out)
    if count_file is not None:
        count_file.write_text(str(count))
