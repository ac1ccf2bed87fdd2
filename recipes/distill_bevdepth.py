"""Distil a BEVDepth apprentice from an expert, cached or live.

    accelerate launch recipes/distill_bevdepth.py --model bevdepth-tiny-l --distiller heatmap \
        --source cached --cache runs/expert.zarr --dataroot DATA --version v1.0-synthetic \
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
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cache_tools.hybrid import HybridSource
from cache_tools.score import head_of
from cache_tools.source import CachedExpert
from fd3d import models
from fd3d.data.batch import Batch
from fd3d.data.frames import FrameDataset
from fd3d.data.index import FrameIndex
from fd3d.distill.align import comparison_grid
from fd3d.distill.handover import Handover, PairedFrames, collate_pairs
from fd3d.distill.live import LiveSource, SignalSource
from fd3d.distill.losses.fd3d import ImagePlanes
from fd3d.distill.relift import Relift
from fd3d.distill.replay import check_count
from fd3d.distill.signals import AUGMENTED, MODES, LiveExpert
from fd3d.distill.trainee import Trainee
from fd3d.errors import UsageError, exit_code
from fd3d.models import checkpoints
from recipes.distillers import (
    add_distiller_arguments,
    build_distiller,
    check_distiller,
    identity_of,
    looks_at_objects,
    parameter_groups,
    signals_for,
    weights_of,
)
from recipes.flags import add_run_arguments
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


def make_source(args: argparse.Namespace, index: FrameIndex) -> SignalSource | None:
    """The source that the flags ask for; flags that contradict each other are refused."""
    check_distiller(args)
    if args.distiller != "none" and args.mode in AUGMENTED and not args.bev_augment:
        raise UsageError(f"--mode {args.mode} is of BEV augmentations: add --bev-augment")
    if args.replays and (args.mode != "replay" or args.source == "cached"):
        raise UsageError("--replays belongs to --mode replay with a live expert: leave it out")
    if args.bev_augment and args.distiller != "none" and args.mode == "clean":
        raise UsageError(
            "--bev-augment moves the world away from what the expert saw: use --mode relift and a "
            "cache with the signal lift, or leave it out"
        )
    if args.moved_flips and args.mode != "moved":
        raise UsageError("--moved-flips belongs to --mode moved: leave it out")
    names = signals_for(args)
    if args.mode == "relift":
        names = tuple("lift" if name == "bev" else name for name in names)
    if args.distiller == "none":
        if args.mode != "clean":
            raise UsageError(f"--distiller none has no --mode {args.mode}: leave it out")
        if args.cache or args.weight is not None:
            raise UsageError("--distiller none takes no --cache and no --weight: leave them out")
        return None
    if args.partial and args.source != "cached":
        raise UsageError("--partial is for a cache that is not finished: leave it out")
    if args.source == "live" and args.cache:
        raise UsageError("--source live runs the expert and reads no --cache: leave one out")
    if args.source == "live":
        return live_source(args, index, names)
    if not args.cache:
        raise UsageError(
            f"--source {args.source} needs --cache CACHE.zarr (fd3d-cache build makes it)"
        )
    cached = CachedExpert(
        args.cache,
        names=names,
        mode=args.mode,
        # What a live expert says is whole; a batch cannot be of both kinds.
        areas=looks_at_objects(args) and args.source == "cached",
        partial=args.partial or args.source == "hybrid",
        expect={
            "dataset_version": args.version,
            "split": args.split,
            **({"expert": args.expert} if args.expert else {}),
        },
    )
    if args.source == "cached":
        return cached
    return HybridSource(cached=cached, live=live_source(args, index, names))


def live_source(args: argparse.Namespace, index: FrameIndex, names: tuple[str, ...]) -> LiveSource:
    """The expert that runs in the step."""
    if not args.expert or not args.expert_checkpoint:
        raise UsageError(f"--source {args.source} needs --expert NAME and --expert-checkpoint FILE")
    model = models.build(args.expert)
    checkpoints.load(model, args.expert_checkpoint)
    digest = checkpoints.tensors_digest(model)
    view = FrameDataset(
        index=index, positions=index.split(args.split), image=model.image, truth=False
    )
    return LiveSource(
        expert=LiveExpert(model=model, names=names, mode=args.mode),
        frames=view,
        ids={"expert": f"{args.expert} {digest}", "mode": args.mode},
    )


def keep_present(args: argparse.Namespace, frames: FrameDataset, source: CachedExpert) -> list[str]:
    """Leave out the frames that the cache does not hold; their keys."""
    present = set(source.present)
    missing = [token for token in frames.tokens if token not in present]
    if not present & set(frames.tokens):
        raise UsageError(f"{args.cache} holds none of the frames yet: wait for its build")
    frames.positions = frames.positions[[token in present for token in frames.tokens]]
    return missing


def replays_of(args: argparse.Namespace, source: SignalSource | None) -> int:
    """How many augmentations of each frame the apprentice may meet in mode replay; 0 = any."""
    if source is None or args.mode != "replay":
        return 0
    return check_count(args.replays) if args.source == "live" else source.replays


def make_relift(args: argparse.Namespace, source: SignalSource | None) -> Relift | None:
    """What makes maps of the source's factors, in mode relift."""
    if source is None or args.mode != "relift":
        return None
    if args.source == "live":
        return Relift(source.expert.model)
    return Relift(head_of(source.reader))


def make_handover(
    args: argparse.Namespace,
    model: nn.Module,
    source: SignalSource | None,
    relift: Relift | None,
    device: torch.device,
) -> Handover | None:
    """The way from the loader's workers to the trainer, and the grid that it brings maps to."""
    if source is None:
        return None
    cached = args.source == "cached"
    grid = comparison_grid(model.grid, (relift or source).grid)
    if cached and args.distiller == "l2" and args.compare == "apprentice":
        grid = model.grid
    return Handover(
        source=source,
        frames=args.batch,
        # What a live source loads are the expert's images, which travel as the apprentice's do.
        workers=args.workers if cached else 0,
        grid=grid,
        device=device,
        relift=relift,
        follow=args.mode == "moved",
        live=not cached,
    )


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
    )


def image_planes(
    args: argparse.Namespace, model: nn.Module, source: SignalSource | None
) -> ImagePlanes | None:
    """The image maps of both networks, where the distiller compares them."""
    if source is None or "pv" not in signals_for(args):
        return None
    if args.source == "live":
        expert = source.expert.model
    else:
        expert = models.build(source.reader.manifest.identity.expert)
    return ImagePlanes(
        apprentice=model.image,
        expert=expert.image,
        channels=model.config.neck,
        expert_channels=expert.config.neck,
    )


def expert_convolution(
    args: argparse.Namespace,
    model: nn.Module,
    source: SignalSource | None,
    relift: Relift | None,
) -> nn.Module | None:
    """The first convolution of the expert's head, where maps behind it are compared."""
    if source is None or args.place != "shared":
        return None
    if args.mode == "moved":
        raise UsageError(
            "the expert's head does not read a map that was moved: use --mode relift, or leave "
            "--place shared out"
        )
    if relift is not None:
        expert = relift.model
    elif args.source == "cached":
        expert = head_of(source.reader)
    else:
        expert = source.expert.model
    if expert.grid.frame != model.grid.frame:
        raise UsageError(
            f"the expert's map lies in the {expert.grid.frame} frame and has to be turned for "
            f"{model.name}, which its head does not read: leave --place shared out"
        )
    # The live expert's own stays as it is.
    return copy.deepcopy(expert.pts_bbox_head.shared_conv)


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
    frames.replays = replays_of(args, source)
    missing = keep_present(args, frames, source) if args.partial and source else []
    relift = make_relift(args, source)
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

    def inputs(item: tuple[Batch, Any]) -> tuple:
        batch, loaded = item
        signals = handover.signals(loaded, batch) if handover else None
        return batch.to(accelerator.device), signals

    summary = fit(
        args=args,
        accelerator=accelerator,
        module=Trainee(model, distiller),
        dataset=PairedFrames(frames=frames, load=handover.load if handover else None),
        collate=collate_pairs,
        inputs=inputs,
        weights=weights_of(args),
        groups=lambda module: parameter_groups(args, module),
        export=lambda trained, record: checkpoints.save(
            out / "model.safetensors", trained.model, record
        ),
    )
    tell(args, accelerator, summary)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(parse())))
