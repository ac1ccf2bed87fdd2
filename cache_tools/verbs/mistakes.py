"""`fd3d-cache mistakes`: what an expert missed and what it made up, from its cached detections."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from cache_tools.reader import CacheReader
from cache_tools.verbs.words import Verbs
from fd3d import models
from fd3d.data.index import FrameIndex
from fd3d.distill.agreement import NEAR, count_mistakes
from fd3d.distill.points import on_grid
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid

_MISTAKES = f"""examples:
  fd3d-cache mistakes train.zarr --dataroot data/nuscenes
  fd3d-cache mistakes train.zarr --dataroot data/nuscenes --min-score 0.3 --json

The expert is not run. A detection is right when its centre lies within {NEAR:g} m of a true box of
its class that no surer one has taken; true boxes without a point, or outside of the expert's grid,
do not count. recipes/distill_bevdepth.py --doubt lets such places teach less."""


def add(verbs: Verbs) -> None:
    """The verb's flags, help and what runs it."""
    verb = verbs.of_a_cache(
        "mistakes",
        text="the expert's false detections and misses by class, from the cache alone",
        examples=_MISTAKES,
        run=_mistakes,
    )
    verb.add_argument("--dataroot", type=Path, required=True, help="the data set, for the truth")
    verb.add_argument("--min-score", type=float, default=0.1, help="of detections (default 0.1)")


def _mistakes(args: argparse.Namespace) -> None:
    if not 0 <= args.min_score <= 1:
        raise UsageError(f"--min-score {args.min_score} is not possible: use a number from 0 to 1")
    reader = CacheReader(args.cache, allow_partial=True)
    if "detections" not in reader.specs:
        raise UsageError(f"{args.cache} holds no detections: build one with --signals detections")
    version = reader.manifest.identity.dataset_version
    index = FrameIndex.open(dataroot=args.dataroot, version=version)
    grid = _grid(reader)
    frames = []
    for token in reader.tokens:
        if token not in reader:
            continue
        frame = index.frame(index.position(token))
        counted = frame.seen()
        if grid is not None:
            counted &= on_grid(torch.from_numpy(frame.boxes_in(grid.frame)), grid).numpy()
        boxes = torch.from_numpy(frame.boxes_in("lidar")[counted].astype(np.float32))
        labels = torch.from_numpy(frame.labels[counted]).long()
        table = torch.from_numpy(reader.read(token, ["detections"])["detections"])
        frames.append((table, boxes, labels))
    counts = count_mistakes(frames, min_score=args.min_score)
    if args.json:
        classes = {name: asdict(one) for name, one in counts.items()}
        print(json.dumps({"frames": len(frames), "classes": classes}))
        return
    of = "" if len(frames) == len(reader) else f" of {len(reader)}, as far as it is built"
    print(f"{args.cache}: {len(frames)} frames{of}, detections of {args.min_score:g} or more")
    print(f"{'class':<22}{'right':>8}{'false':>8}{'missed':>8}")
    for name, one in counts.items():
        print(f"{name:<22}{one.right:>8}{one.false:>8}{one.missed:>8}")


def _grid(reader: CacheReader) -> BEVGrid | None:
    """Where the expert looks: the grid of its maps, cached or not; None of experts elsewhere."""
    grids = [spec.grid for spec in reader.specs.values() if spec.grid is not None]
    if grids:
        return grids[0]
    name = reader.manifest.identity.expert
    return models.build(name).grid if name in models.names() else None
