"""Train FD3D's distillation head once for a cache, to serve every apprentice that learns from it.

    accelerate launch recipes/train_head.py --cache runs/expert.zarr --val-cache runs/val.zarr \\
        --dataroot DATA --version v1.0-synthetic --out runs/head

The head reads the expert's cached map and the ground truth alone, so neither network runs and no
picture is opened. `--val-cache`, a cache of the validation split by the same expert, has the head's
own boxes scored at the end. `recipes/distill_bevdepth.py --distiller fd3d --head
runs/head/model.safetensors` uses it. Where apprentices work in another frame or on another
square than the expert, its map is brought to theirs: name one of them with `--model`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from torch import Tensor, nn

from cache_tools.source import CachedExpert
from fd3d import models
from fd3d.data.batch import Batch
from fd3d.data.index import FrameIndex
from fd3d.distill import matching
from fd3d.distill.align import comparison_grid, seen_cells
from fd3d.distill.handover import Handover, PairedFrames, collate_pairs
from fd3d.distill.head import DistillationHead
from fd3d.distill.head_file import save_head
from fd3d.distill.matching import head_losses
from fd3d.errors import exit_code
from recipes.distillers import head_config
from recipes.flags import add_run_arguments
from recipes.head_score import frames_of, open_val_cache, score_head
from recipes.training import fit, start


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", required=True, help="the .zarr that fd3d-cache build made")
    parser.add_argument(
        "--val-cache", default="", help="one of the validation split, to score the head on"
    )
    parser.add_argument(
        "--model",
        default="",
        help="an apprentice, which decides where the expert's map is compared (default: its own "
        "grid)",
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


def main(args: argparse.Namespace) -> None:
    expect = {"dataset_version": args.version, "split": args.split}
    source = CachedExpert(args.cache, expect=expect)
    val = open_val_cache(args, source.ids["expert"]) if args.val_cache else None
    index = FrameIndex.open(dataroot=args.dataroot, version=args.version)
    grid = source.grid
    if args.model:
        grid = comparison_grid(models.build(args.model).grid, source.grid)
    frames = frames_of(index, args.split, grid, args.seed)
    identity = {"dataset": f"{args.version}:{args.split}", "grid": str(grid), **source.ids}
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
        score_head(head, val, args, file="scores.json")
    print(
        f"made {out / 'model.safetensors'}\nnext: accelerate launch recipes/distill_bevdepth.py "
        f"--distiller fd3d --head {out / 'model.safetensors'} --cache {args.cache} ..."
    )


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(parse())))
