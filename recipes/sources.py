"""From the flags of a distilling recipe to its source of signals, and what goes with one."""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path

import torch
from torch import nn

from cache_tools import lease
from cache_tools.hybrid import HybridSource
from cache_tools.manifest import load as load_manifest
from cache_tools.score import head_of
from cache_tools.source import CachedExpert
from fd3d import models
from fd3d.data.frames import FrameDataset
from fd3d.data.index import FrameIndex
from fd3d.distill.align import comparison_grid
from fd3d.distill.handover import Handover
from fd3d.distill.live import LiveSource, SignalSource
from fd3d.distill.pv import ImagePlanes
from fd3d.distill.relift import Relift
from fd3d.distill.replay import check_count
from fd3d.distill.signals import AUGMENTED, PV, LiveExpert
from fd3d.errors import UsageError
from fd3d.models import checkpoints
from recipes.distillers import check_distiller, looks_at_objects, signals_for


def make_source(args: argparse.Namespace, index: FrameIndex) -> SignalSource | None:
    """The source that the flags ask for; flags that contradict each other are refused."""
    check_distiller(args)
    if args.distiller != "none" and args.mode in AUGMENTED and not args.bev_augment:
        raise UsageError(f"--mode {args.mode} is of BEV augmentations: add --bev-augment")
    if args.replays and (args.mode != "replay" or args.source != "live"):
        raise UsageError("--replays belongs to --mode replay with --source live: leave it out")
    if args.bev_augment and args.distiller != "none" and args.mode == "clean":
        raise UsageError(
            "--bev-augment moves the world away from what the expert saw: use --mode relift and a "
            "cache with the signal lift, --mode moved, or leave it out"
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
        if args.source != "cached" or args.expert or args.expert_checkpoint or args.partial:
            raise UsageError("--distiller none has no expert: leave out what names its signals")
        return None
    if args.source == "cached" and args.expert_checkpoint:
        raise UsageError(
            "--source cached runs no expert: leave --expert-checkpoint out, or use --source hybrid"
        )
    if args.partial and args.source != "cached":
        raise UsageError("--partial is for a cache that is not finished: leave it out")
    if args.source == "live" and args.cache:
        raise UsageError("--source live runs the expert and reads no --cache: leave one out")
    check_planes(args, names)
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


def check_planes(args: argparse.Namespace, names: tuple[str, ...]) -> None:
    """Signals without image planes, where FD3D was not told to do without, raise `UsageError`."""
    if args.distiller != "fd3d" or "pv" not in names:
        return
    without = "leave FD3D's term in the image planes out with --terms gen_bev,focal"
    if args.mode in AUGMENTED:
        raise UsageError(f"--mode {args.mode} has the signal bev alone: {without}")
    if args.cache and not set(PV) <= set(load_manifest(Path(args.cache)).signals):
        raise UsageError(
            f"{args.cache} does not hold the signal pv: build a cache with --signals "
            f"{','.join(sorted(names))}, or {without}"
        )


def check_frame(args: argparse.Namespace, model: nn.Module) -> None:
    """An apprentice that is augmented in another frame than the expert's raises `UsageError`."""
    if args.mode in ("relift", *AUGMENTED) and args.bev_augment and model.grid.frame != "lidar":
        raise UsageError(
            f"{model.name} is augmented in the ego frame, which mode {args.mode} does not follow: "
            "use --mode moved, or leave --bev-augment out"
        )


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
    builders = lease.holders(source.reader.path)
    if builders and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(
            f"{args.cache} is being built by {', '.join(map(str, builders))}, and processes that "
            "open it at different moments would train on different frames: wait, or use one process"
        )
    present = set(source.present)
    missing = [token for token in dict.fromkeys(frames.tokens) if token not in present]
    if not present & set(frames.tokens):
        raise UsageError(f"{args.cache} holds none of the frames yet: wait for its build")
    frames.positions = frames.positions[[token in present for token in frames.tokens]]
    return missing


def replays_of(args: argparse.Namespace, source: SignalSource | None) -> int:
    """How many augmentations of each frame the apprentice may meet in mode replay; 0 = any."""
    if source is None or args.mode != "replay":
        return 0
    if args.source != "live":
        return source.replays
    if not args.replays:
        raise UsageError("--mode replay with --source live needs --replays N, say 8")
    return check_count(args.replays)


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
    grid = comparison_grid(model.grid, expert.grid)
    if grid != expert.grid:
        raise UsageError(
            f"the expert's map on {expert.grid} has to be brought to {grid} for {model.name}, and "
            "its head does not read it there: leave --place shared out"
        )
    # The live expert's own stays as it is.
    return copy.deepcopy(expert.pts_bbox_head.shared_conv)
