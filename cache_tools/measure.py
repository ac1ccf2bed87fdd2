"""Running and storing a few frames in every preset, to plan a cache by (`cache_tools.plan`)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from cache_tools.build import build_cache
from cache_tools.expert import ExpertRun, spread
from cache_tools.layout import raw_frame_bytes
from cache_tools.plan import Measured, MeasuredPreset
from cache_tools.presets import PRESETS
from cache_tools.reader import CacheReader
from fd3d.distill.handover import dead_workers_told
from fd3d.distill.relift import Relift
from fd3d.distill.signals import LIFT
from fd3d.errors import UsageError
from fd3d.progress import Progress


def measure(run: ExpertRun, *, count: int, quiet: bool = True) -> Measured:
    """Run the expert on `count` frames spread over the split, and store, read and (with `lift`)
    splat them in each preset, in a temporary folder.

    Preset focal is among them where `run` was prepared for it.
    """
    if not 1 <= count <= len(run.keys):
        raise UsageError(f"--frames {count} is not possible: use 1 to {len(run.keys)}")
    rows = [[row] for row in spread(len(run.keys), count)]
    said, load_s, expert_s = [], 0.0, 0.0
    batches = iter(run.load(rows))
    with (
        dead_workers_told(),
        Progress(total=count, unit="frames", title="running", quiet=quiet) as progress,
    ):
        for _ in rows:
            start = time.perf_counter()
            batch = next(batches)
            loaded = time.perf_counter()
            said.append(run.compute(batch))
            load_s, expert_s = load_s + loaded - start, expert_s + time.perf_counter() - loaded
            progress.advance(1)
    keys = [run.keys[row] for (row,) in rows]
    presets = {}
    for preset in PRESETS:
        if preset == "focal" and run.focus is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            presets[preset] = _stored(run, preset, keys, said, Path(folder) / "pilot.zarr")
    return Measured(
        frames=count,
        load_s=load_s / count,
        expert_s=expert_s / count,
        raw_bytes=raw_frame_bytes(run.signals.values()),
        presets=presets,
    )


def _stored(
    run: ExpertRun,
    preset: str,
    keys: Sequence[str],
    said: Sequence[Mapping[str, Sequence[np.ndarray]]],
    folder: Path,
) -> MeasuredPreset:
    report = build_cache(
        out=folder,
        identity=run.identity,
        signals=run.signals,
        keys=keys,
        compute=lambda positions: said[positions[0]],
        preset=preset,
        shard_frames=1,
        batch=1,
        # A plan counts them.
        most_over_budget=1.0,
        quiet=True,
    )
    count = len(keys)
    reader = CacheReader(folder)
    frames = [reader.read(key) for key in keys]  # opens the files, compiles what is to be compiled
    start = time.perf_counter()
    for key in keys:
        reader.read(key)
    read_s = (time.perf_counter() - start) / count
    return MeasuredPreset(
        bytes={name: one.bytes / count for name, one in report.signals.items()},
        arrays=len(reader.manifest.arrays),
        encode_s=report.seconds["encode"] / count,
        write_s=report.seconds["write"] / count,
        read_s=read_s,
        relift_s=_relift_seconds(run, frames) if set(LIFT) <= set(run.signals) else None,
        errors={
            name: (one.mean_error, one.worst_error)
            for name, one in report.signals.items()
            if one.worst_error is not None
        },
        over_budget=sum(one.over_budget for one in report.signals.values()),
    )


def _relift_seconds(run: ExpertRun, frames: Sequence[Mapping[str, np.ndarray]]) -> float:
    relift = Relift(run.live.model)
    start = time.perf_counter()
    for frame in frames:
        relift({n: torch.from_numpy(frame[n])[None].to(run.device).float() for n in LIFT}).cpu()
    return (time.perf_counter() - start) / len(frames)
