"""What a cache will cost, from a few measured frames: the one cost model.

Sizes and times of a frame are measured (`cache_tools.measure`); everything here is arithmetic on
them, for a split of any number of frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cache_tools.layout import shard_count

# Files of a cache that are not of a shard: metadata of the group and keys, manifest, copies.
_FIXED_FILES = 6


@dataclass(frozen=True, kw_only=True)
class MeasuredPreset:
    """A preset on the pilot's frames, numbers of one frame, seconds of one thread.

    bytes: by signal. arrays: Zarr arrays of the cache. encode_s, write_s, read_s: of all signals;
    read_s from memory, checked and decoded. relift_s: from decoded factors to the map, None
    without the signal `lift`. errors: signal -> (mean, worst) relative error. over_budget: frames
    over a budget, of any signal.
    """

    bytes: Mapping[str, float]
    arrays: int
    encode_s: float
    write_s: float
    read_s: float
    relift_s: float | None
    errors: Mapping[str, tuple[float, float]]
    over_budget: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The pilot: `frames` that were run, seconds of a frame waiting for inputs and in the expert,
    bytes of its signals as plain arrays."""

    frames: int
    load_s: float
    expert_s: float
    raw_bytes: int
    presets: Mapping[str, MeasuredPreset]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a cache of a whole split costs in one preset.

    bytes, files: on the disk; an epoch reads as many bytes. fits: into the free disk, None where
    that is not known. build_hours: one process. writer_bytes, worker_bytes: memory of the build
    for a packed shard, and of a loader worker for a decoded frame. epochs_to_win: of one student
    until building and reading have taken less time than running the expert in every step;
    students_to_win: the same in students of the planned epochs. Infinity where reading is slower.
    """

    bytes: int
    files: int
    fits: bool | None
    build_hours: float
    writer_bytes: int
    worker_bytes: int
    epochs_to_win: float
    students_to_win: float


def cost(
    found: Measured,
    preset: str,
    *,
    frames: int,
    shard_frames: int,
    epochs: int,
    free_bytes: int | None = None,
) -> Cost:
    """The cost of a cache of so many frames. Encoding and writing run beside loading and expert."""
    one = found.presets[preset]
    size = sum(one.bytes.values())
    total = round(size * frames)
    build_s = frames * max(found.load_s + found.expert_s, one.encode_s + one.write_s)
    saved_s = frames * (found.expert_s - one.read_s - (one.relift_s or 0.0))
    epochs_to_win = build_s / saved_s if saved_s > 0 else math.inf
    shards = shard_count(frames, shard_frames)
    return Cost(
        bytes=total,
        files=shards * (one.arrays + 1) + one.arrays + _FIXED_FILES,
        fits=None if free_bytes is None else total <= free_bytes,
        build_hours=build_s / 3600,
        writer_bytes=round(size * min(frames, shard_frames)),
        # The decoded frame, and the codes that it is decoded from.
        worker_bytes=round(1.5 * found.raw_bytes),
        epochs_to_win=epochs_to_win,
        students_to_win=epochs_to_win / epochs,
    )


def suggest(found: Measured, costs: Mapping[str, Cost]) -> str | None:
    """The smallest preset that keeps its budget in the pilot and fits; focal, which is not for
    every use, is not suggested. None where nothing fits."""
    good = [
        name
        for name, one in costs.items()
        if name != "focal" and one.fits is not False and not found.presets[name].over_budget
    ]
    return min(good, key=lambda name: costs[name].bytes, default=None)
