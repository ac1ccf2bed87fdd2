"""The flags that name an expert and the frames it is to see, for the verbs that run one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cache_tools.expert import ExpertRun


# What plan and probe look at where nobody says how many.
FRAMES = 8


def add_expert_flags(verb: argparse.ArgumentParser) -> None:
    """Which expert, with which weights, over which frames."""
    what = verb.add_argument_group("the expert")
    what.add_argument("--expert", required=True, help="its architecture, such as bevdepth-r50h")
    weights = what.add_mutually_exclusive_group(required=True)
    weights.add_argument("--checkpoint", type=Path, help="its weights, a file")
    weights.add_argument(
        "--init-seed", type=int, help="random weights from this seed instead, for trying out"
    )
    what.add_argument(
        "--device",
        default="auto",
        help="where it runs: auto (the GPU if there is one), cpu, cuda:1 (default auto)",
    )
    frames = verb.add_argument_group("the frames")
    frames.add_argument("--dataroot", required=True, type=Path, help="folder of the data set")
    frames.add_argument("--version", required=True, help="such as v1.0-trainval")
    frames.add_argument("--split", required=True, help="such as train or val")
    frames.add_argument(
        "--workers", type=int, default=2, help="processes that read images, 0 = none (default 2)"
    )


def add_signals_flag(group: argparse._ActionsContainer) -> None:
    """What is stored of the expert."""
    group.add_argument(
        "--signals",
        required=True,
        help="comma-separated: bev (the map that its head reads), heatmap (class scores), "
        "detections (boxes), lift (what it splats, for --mode relift), pv (image-plane maps, for "
        "FD3D's gen_pv), replay (maps of augmented worlds, for --mode replay)",
    )
    group.add_argument(
        "--replays",
        type=int,
        default=0,
        help="BEV augmentations that the signal replay has of each frame; the expert runs once "
        "more for each (default 0)",
    )


def expert_run(
    args: argparse.Namespace,
    signals: Sequence[str],
    preset: str = "lossless",
    *,
    replays: int = 0,
) -> ExpertRun:
    """The expert and frames that the flags name."""
    # Networks and data loaders take seconds to import; verbs that run no expert do without.
    from cache_tools.expert import prepare

    return prepare(
        expert=args.expert,
        checkpoint=args.checkpoint,
        init_seed=args.init_seed,
        dataroot=args.dataroot,
        version=args.version,
        split=args.split,
        signals=signals,
        preset=preset,
        device=args.device,
        workers=args.workers,
        replays=replays,
    )
