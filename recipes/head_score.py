"""What a distillation head finds by itself: its boxes from a cache's maps, scored."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from cache_tools.score import scores_of
from cache_tools.source import CachedExpert
from fd3d.data.batch import Detections, collate
from fd3d.data.frames import FrameDataset
from fd3d.data.images import ImageSpec
from fd3d.data.index import FrameIndex
from fd3d.distill.handover import Handover
from fd3d.distill.head import DistillationHead, HeadOutputs, decode
from fd3d.durable import write_json
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid

# Boxes kept of a frame: the best pairs of query and class, as DETR3D decodes.
_MOST = 300


def open_val_cache(args: argparse.Namespace, expert: str) -> CachedExpert:
    """The cache of --val-cache; one of another expert than the training's is refused."""
    val = CachedExpert(args.val_cache, expect={"dataset_version": args.version, "split": "val"})
    if val.ids["expert"] != expert:
        raise UsageError(
            f"{args.val_cache} is of expert {val.ids['expert'][:40]}, the training is of "
            f"{expert[:40]}: build it with the same checkpoint"
        )
    return val


def frames_of(index: FrameIndex, split: str, grid: BEVGrid, seed: int = 0) -> FrameDataset:
    """The truth of a split in the frame of `grid`; no picture is opened."""
    return FrameDataset(
        index=index,
        positions=index.split(split),
        # Names the frame that boxes are placed in.
        image=ImageSpec(height=16, width=16, frame=grid.frame, moments=1),
        truth=True,
        pictures=False,
        seed=seed,
    )


def detections(said: HeadOutputs, head: DistillationHead) -> list[Detections]:
    """Each frame's boxes by the last layer, best first, in the frame of the head's grid."""
    boxes = decode(said.codes[-1], head.grid)
    found = []
    for row, logits in enumerate(said.logits[-1]):
        scores, place = logits.sigmoid().flatten().topk(min(_MOST, logits.numel()))
        found.append(
            Detections(
                boxes=boxes[row][place // logits.shape[1]],
                scores=scores,
                labels=place % logits.shape[1],
                frame=head.grid.frame,
            )
        )
    return found


@torch.no_grad()
def detect(
    head: DistillationHead, source: CachedExpert, frames: FrameDataset
) -> dict[str, Detections]:
    """Detections of the frames of a cache by token."""
    head = head.cpu().eval()
    handover = Handover(source=source, frames=1, workers=0, grid=head.grid, device="cpu")
    found: dict[str, Detections] = {}
    for token, frame in zip(frames.tokens, frames, strict=True):
        loaded = handover.load([token], [frame])
        maps = handover.signals(loaded, collate([frame]))
        found[token] = detections(head(maps["bev"]), head)[0]
    return found


def score_head(
    head: DistillationHead, val: CachedExpert, args: argparse.Namespace, *, file: str
) -> None:
    """Score the head's boxes on the validation split, into a file in --out, and say how it does."""
    index = FrameIndex.open(dataroot=args.dataroot, version=args.version)
    found = detect(head, val, frames_of(index, "val", head.grid))
    values = scores_of(found, dataroot=args.dataroot, version=args.version, split="val").to_dict()
    write_json(Path(args.out) / file, values)
    print(f"the head's own boxes on val: NDS {values['nds']:.3f}, mAP {values['map']:.3f}")
