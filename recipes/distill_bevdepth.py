"""Distil a BEVDepth apprentice from an expert, cached or live.

    accelerate launch recipes/distill_bevdepth.py --model bevdepth-tiny-l --distiller heatmap \\
        --source cached --cache runs/expert.zarr --dataroot DATA --version v1.0-synthetic \\
        --out runs/distilled

`--source cached` reads what `fd3d-cache build` stored; `--source live` runs the expert in every
step (the control experiment, at the usual price), `--source hybrid` for frames that an unfinished
cache lacks. `--mode relift` allows `--bev-augment`: the expert's factors, from a cache with the
signal `lift`, are splatted under the apprentice's own augmentation; docs/distillation.md has the
other modes. Everything else is as in recipes/train.py; with
`--distiller none` it is the same training. The apprentice uses the expert's choice of adjacent
frame, because the expert's velocity channels mean the displacement to just that frame.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from torch import nn

from cache_tools.checksums import file_digest
from fd3d import models
from fd3d.data.batch import Batch
from fd3d.distill.handover import Handover, PairedFrames, collate_pairs
from fd3d.distill.head_file import save_head
from fd3d.distill.live import SignalSource
from fd3d.distill.pv import ImagePlanes
from fd3d.distill.relift import Relift
from fd3d.distill.signals import MODES
from fd3d.distill.trainee import Trainee
from fd3d.errors import exit_code
from fd3d.models import checkpoints
from recipes.distillers import (
    add_distiller_arguments,
    build_distiller,
    identity_of,
    parameter_groups,
    weights_of,
)
from recipes.flags import add_run_arguments
from recipes.head_score import open_val_cache, score_head
from recipes.sources import (
    check_frame,
    expert_convolution,
    image_planes,
    keep_present,
    make_handover,
    make_relift,
    make_source,
    replays_of,
)
from recipes.training import fit, new_model, start, tell, training_frames


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="apprentice: " + ", ".join(models.names()))
    add_distiller_arguments(parser)
    parser.add_argument("--source", choices=("cached", "live", "hybrid"), default="cached")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="clean",
        help="what the expert's map means under BEV augmentation; clean: there is none",
    )
    parser.add_argument(
        "--bev-augment", action="store_true", help="random rotation, scale and flips of the BEV"
    )
    parser.add_argument(
        "--replays",
        type=int,
        default=0,
        help="replay with a live expert: augmentations of each frame (a cache has its own number)",
    )
    parser.add_argument(
        "--moved-flips",
        action="store_true",
        help="moved: mirror too, though the map's yaw and velocity channels then lie",
    )
    parser.add_argument("--cache", default="", help="the .zarr that fd3d-cache build made")
    parser.add_argument(
        "--partial",
        action="store_true",
        help="train on the frames that an unfinished cache holds so far; the others are listed",
    )
    parser.add_argument("--expert", default="", help="live: the expert's model name")
    parser.add_argument("--expert-checkpoint", default="", help="live: the expert's weights")
    parser.add_argument(
        "--init-head",
        default="",
        help="checkpoint whose head starts the apprentice's (part of the released baseline)",
    )
    add_run_arguments(parser)
    return parser.parse_args(argv)


def make_distiller(
    args: argparse.Namespace,
    model: nn.Module,
    source: SignalSource | None,
    maps: SignalSource | Handover | Relift | None,
    planes: ImagePlanes | None = None,
    expert_conv: nn.Module | None = None,
) -> nn.Module | None:
    """The distiller for what `source` yields, whose map arrives as `maps` says."""
    if source is None:
        return None
    return build_distiller(
        args,
        model,
        expert_channels=maps.specs["bev"].shape[0],
        expert_grid=maps.grid,
        planes=planes,
        expert_conv=expert_conv,
        signals_id=source.ids.get("signals_id", ""),
        expert=source.ids.get("expert", ""),
    )


def main(args: argparse.Namespace) -> None:
    model = new_model(args)
    if args.init_head:
        checkpoints.load_part(model, args.init_head, prefix="pts_bbox_head.")
    frames = training_frames(
        args,
        model.image,
        bev_augment=args.bev_augment,
        bev_flips=args.mode != "moved" or args.moved_flips,
    )
    source = make_source(args, frames.index)
    check_frame(args, model)
    frames.replays = replays_of(args, source)
    missing = keep_present(args, frames, source) if args.partial and source else []
    relift = make_relift(args, source)
    val = open_val_cache(args, source.ids["expert"]) if args.val_cache else None
    # Before the seed, as they build networks to ask.
    planes = image_planes(args, model, source)
    expert_conv = expert_convolution(args, model, source, relift)
    # Refuses maps that cannot be compared.
    make_distiller(args, model, source, relift or source, planes, expert_conv)
    identity = {
        "model": args.model,
        "dataset": f"{args.version}:{args.split}",
        "distiller": args.distiller,
        "source": args.source if source else "none",
        **(source.ids if source else {}),
        **identity_of(args),
        **({"bev_augment": True} if args.bev_augment else {}),
        **({"moved_flips": True} if args.moved_flips else {}),
        **({"init_head": file_digest(Path(args.init_head))} if args.init_head else {}),
        **({"replays": frames.replays} if frames.replays else {}),
    }
    accelerator = start(args, identity)
    # Built behind the seed: the apprentice's weights depend on --seed alone, not on the distiller.
    model = new_model(args)
    if args.init_head:
        checkpoints.load_part(model, args.init_head, prefix="pts_bbox_head.")
    if relift is not None:
        relift.model.to(accelerator.device)
    handover = make_handover(args, model, source, relift, accelerator.device)
    distiller = make_distiller(args, model, source, handover, planes, expert_conv)
    if source and args.source != "cached":
        source.expert.model.to(accelerator.device)
    out = Path(args.out)
    if missing and accelerator.is_main_process:
        (out / "missing_frames.txt").write_text("\n".join(missing) + "\n")
        print(f"{args.cache} lacks {len(missing)} frames, listed in {out / 'missing_frames.txt'}")
    accelerator.print(
        f"training {args.model} on {len(frames)} frames of {args.version}:{args.split} with "
        f"distiller {args.distiller} from {identity['source']} signals, into {out}"
    )

    if args.source == "hybrid" and source:
        live = len(set(frames.tokens) - set(source.present))
        accelerator.print(f"the expert runs for {live} frames, which {args.cache} lacks")

    def inputs(item: tuple[Batch, Any]) -> tuple:
        batch, loaded = item
        signals = handover.signals(loaded, batch) if handover else None
        return batch.to(accelerator.device), signals

    def export(trained: Trainee, record: dict) -> None:
        checkpoints.save(out / "model.safetensors", trained.model, record)
        if getattr(trained.distiller, "learns", False):
            of = source.ids.get("signals_id", "")
            head = trained.distiller.head
            save_head(out / "head.safetensors", head, signals_id=of, record=record)

    summary = fit(
        args=args,
        accelerator=accelerator,
        module=Trainee(model, distiller),
        dataset=PairedFrames(frames=frames, load=handover.load if handover else None),
        collate=collate_pairs,
        inputs=inputs,
        weights=weights_of(args),
        groups=lambda module: parameter_groups(args, module),
        export=export,
    )
    if val and accelerator.is_main_process:
        score_head(distiller.head, val, args, file="head_scores.json")
    tell(args, accelerator, summary)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(parse())))
