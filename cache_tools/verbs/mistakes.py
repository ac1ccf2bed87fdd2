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
from fd3d.data.index import FrameIndex
from fd3d.distill.agreement import NEAR, count_mistakes
from fd3d.distill.points import on_grid
from fd3d.errors import UsageError

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
    verb.add_argument("--min-score", type=float, default=0.1, help="of detections [0.1]")


def _mistakes(args: argparse.Namespace) -> None:
    if not 0 <= args.min_score <= 1:
        raise UsageError(f"--min-score {args.min_score} is not possible: use a number from 0 to 1")
    reader = CacheReader(args.cache, allow_partial=True)
    if "detections" not in reader.specs:
        raise UsageError(f"{args.cache} holds no detections: build one with --signals detections")
    version = reader.manifest.identity.dataset_version
    index = FrameIndex.open(dataroot=args.dataroot, version=version)
    grids = [spec.grid for spec in reader.specs.values() if spec.grid is not None]
    frames = []
    for token in reader.tokens:
        if token not in reader:
            continue
        frame = index.frame(index.position(token))
        boxes = torch.from_numpy(frame.boxes_in("lidar")[frame.seen()].astype(np.float32))
        labels = torch.from_numpy(frame.labels[frame.seen()]).long()
        if grids and grids[0].frame == "lidar":
            inside = on_grid(boxes, grids[0])
            boxes, labels = boxes[inside], labels[inside]
        table = torch.from_numpy(reader.read(token, ["detections"])["detections"])
        frames.append((table, boxes, labels))
    counts = count_mistakes(frames, min_score=args.min_score)
    if args.json:
        classes = {name: asdict(one) for name, one in counts.items()}
        print(json.dumps({"frames": len(frames), "classes": classes}))
        return
    print(f"{args.cache}: {len(frames)} frames, detections of {args.min_score:g} or more")
    print(f"{'class':<22}{'right':>8}{'false':>8}{'missed':>8}")
    for name, one in counts.items():
        print(f"{name:<22}{one.right:>8}{one.false:>8}{one.missed:>8}")
