"""Train FD3D's distillation head once for a cache, to serve every apprentice that learns from it.

    accelerate launch recipes/train_head.py --cache runs/expert.zarr --val-cache runs/val.zarr \\
        --dataroot DATA --version v1.0-synthetic --out runs/head

The head reads the expert's cached map and the ground truth alone, so neither network runs and no
picture is opened. `--val-cache`, a cache of the validation split by the same expert, has the head's
own boxes scored at the end. `recipes/distill_bevdepth.py --distiller fd3d --head
runs/head/model.safetensors` uses it. Where apprentices work in another frame than the expert, the
map is compared in theirs: name it with `--frame`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cache_tools.score import scores_of
from cache_tools.source import CachedExpert
from fd3d.data.batch import Batch, Detections, collate
from fd3d.data.frames import FrameDataset
from fd3d.data.images import ImageSpec
from fd3d.data.index import FrameIndex
from fd3d.distill import matching
from fd3d.distill.align import seen_cells
from fd3d.distill.handover import Handover, PairedFrames, collate_pairs
from fd3d.distill.head import DistillationHead, HeadOutputs, decode
from fd3d.distill.head_file import save_head
from fd3d.distill.matching import head_losses
from fd3d.durable import write_json
from fd3d.errors import UsageError, exit_code
from fd3d.grid import BEVGrid
from recipes.distillers import head_config
from recipes.flags import add_run_arguments
from recipes.training import fit, start

# Boxes kept of a frame: the best pairs of query and class, as DETR3D decodes.
_MOST = 300


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", required=True, help="the .zarr that fd3d-cache build made")
    parser.add_argument(
        "--val-cache", default="", help="one of the validation split, to score the head on"
    )
    parser.add_argument(
        "--frame",
        choices=("lidar", "ego"),
        default="",
        help="that the apprentices work in (default: the expert's own)",
    )
    add_run_arguments(parser, network=False)
    return parser.parse_args(argv)


class HeadTrainee(nn.Module):
    """The head and its losses, as the module that a training step runs."""

    def __init__(self, head: DistillationHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, expert: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Named scalar loss terms from the expert's maps "bev" (B, C, Y, X), "valid" where not all
        of it counts, and the truth."""
        return head_losses(self.head(expert["bev"]), batch, self.head.grid, seen_cells(expert))


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


def open_cache(args: argparse.Namespace, path: str, split: str) -> CachedExpert:
    return CachedExpert(path, expect={"dataset_version": args.version, "split": split})


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


def main(args: argparse.Namespace) -> None:
    source = open_cache(args, args.cache, args.split)
    val = open_cache(args, args.val_cache, "val") if args.val_cache else None
    if val and val.ids["expert"] != source.ids["expert"]:
        raise UsageError(
            f"{args.val_cache} is of expert {val.ids['expert'][:40]}, {args.cache} of "
            f"{source.ids['expert'][:40]}: build both with the same checkpoint"
        )
    index = FrameIndex.open(dataroot=args.dataroot, version=args.version)
    grid = replace(source.grid, frame=args.frame) if args.frame else source.grid
    frames = frames_of(index, args.split, grid, args.seed)
    identity = {"dataset": f"{args.version}:{args.split}", "frame": grid.frame, **source.ids}
    accelerator = start(args, identity)
    channels = source.specs["bev"].shape[0]
    head = DistillationHead(channels=channels, grid=grid, config=head_config(channels))
    handover = Handover(
        source=source,
        frames=args.batch,
        workers=args.workers,
        grid=grid,
        device=accelerator.device,
    )
    out = Path(args.out)
    accelerator.print(f"training a distillation head on {len(frames)} frames, into {out}")

    def inputs(item: tuple) -> tuple:
        batch, loaded = item
        return handover.signals(loaded, batch), batch.to(accelerator.device)

    fit(
        args=args,
        accelerator=accelerator,
        module=HeadTrainee(head),
        dataset=PairedFrames(frames=frames, load=handover.load),
        collate=collate_pairs,
        inputs=inputs,
        weights=matching.WEIGHTS,
        export=lambda trained, record: save_head(
            out / "model.safetensors", trained.head, signals_id=source.signals_id, record=record
        ),
    )
    if not accelerator.is_main_process:
        return
    if val:
        found = detect(head, val, frames_of(index, "val", grid))
        values = scores_of(
            found, dataroot=args.dataroot, version=args.version, split="val"
        ).to_dict()
        write_json(out / "scores.json", values)
        print(f"the head's own boxes on val: NDS {values['nds']:.3f}, mAP {values['map']:.3f}")
    print(
        f"made {out / 'model.safetensors'}\nnext: accelerate launch recipes/distill_bevdepth.py "
        f"--distiller fd3d --head {out / 'model.safetensors'} --cache {args.cache} ..."
    )


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(parse())))
