"""`fd3d-cache plan`: bytes, hours and memory of a cache before it is built."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from cache_tools.plan import Cost, Measured, cost, suggest
from cache_tools.verbs.expert_flags import FRAMES, add_expert_flags, add_signals_flag, expert_run
from cache_tools.verbs.words import Verbs, names_in, sayer
from fd3d.distill.signals import check_signals
from fd3d.errors import UsageError

_PLAN = """example:
  fd3d-cache plan --expert bevdepth-r50h --checkpoint expert.safetensors \\
    --dataroot data/nuscenes --version v1.0-trainval --split train \\
    --signals bev,detections --out caches/train.zarr

Runs a few frames of the split, stores them in every preset in a temporary folder, and multiplies.
Nothing is written to --out; its free disk is looked at."""


def add(verbs: Verbs) -> None:
    """The verb's flags, help and what runs it."""
    text = "what a cache will cost in each preset, from a few frames"
    plan = verbs.new("plan", help=text, text=text, examples=_PLAN, run=_plan)
    add_expert_flags(plan)
    add_signals_flag(plan)
    plan.add_argument("--frames", type=int, help="how many are run first (default 8)")
    plan.add_argument("--epochs", type=int, default=24, help="of an apprentice (default 24)")
    plan.add_argument("--shard-frames", type=int, default=16, help="frames in a file (default 16)")
    plan.add_argument("--out", type=Path, help="where the cache would go, for the free disk")


def _plan(args: argparse.Namespace) -> None:
    for name in ("epochs", "shard_frames"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be 1 or more")
    signals = check_signals(names_in(args.signals))
    from cache_tools.measure import measure

    # Maps of augmented worlds have no preset focal.
    coarsest = "tiny" if args.replays else "focal"
    run = expert_run(args, signals, coarsest, replays=args.replays)
    say = sayer(args.json)
    count = min(FRAMES, len(run.keys)) if args.frames is None else args.frames
    say(
        f"Running {count} of {len(run.keys)} frames of split {args.split} ({args.version}) "
        f"with {args.expert}, to plan by"
    )
    found = measure(run, count=count, quiet=args.json)
    costs = {
        preset: cost(
            found,
            preset,
            frames=len(run.keys),
            shard_frames=args.shard_frames,
            epochs=args.epochs,
            free_bytes=_free(args.out),
        )
        for preset in found.presets
    }
    if args.json:
        rows = {name: _plain(asdict(one)) for name, one in costs.items()}
        words = {"frames": len(run.keys), "measured": asdict(found), "costs": rows}
        print(json.dumps({**words, "suggested": suggest(found, costs)}))
        return
    _tell(found, costs, len(run.keys), args.epochs)


def _tell(found: Measured, costs: Mapping[str, Cost], frames: int, epochs: int) -> None:
    print(
        f"measured on {found.frames} frames: loading {found.load_s:.3f} s, expert "
        f"{found.expert_s:.3f} s a frame; as plain arrays {found.raw_bytes / 1e6:.2f} MB"
    )
    print(
        f"{'':10}{'MB/frame':>9}{'of raw':>8}{'worst error':>12}{'encode s':>9}{'read s':>8}"
        f" |{'GB':>9}{'files':>8}{'hours':>7}{'epochs':>8}{'students':>9}{'writer MB':>10}"
    )
    for name, one in found.presets.items():
        size, plan = sum(one.bytes.values()), costs[name]
        worst = max((error for _, error in one.errors.values()), default=0.0)
        read = one.read_s + (one.relift_s or 0.0)
        notes = [] if plan.fits is not False else ["does not fit into the free disk"]
        notes += [f"{one.over_budget} frames over the budget"] if one.over_budget else []
        print(
            f"{name:10}{size / 1e6:9.3f}{size / found.raw_bytes:8.3f}{100 * worst:11.2f}%"
            f"{one.encode_s + one.write_s:9.3f}{read:8.3f} |{plan.bytes / 1e9:9.2f}"
            f"{plan.files:8}{plan.build_hours:7.2f}{plan.epochs_to_win:8.1f}"
            f"{plan.students_to_win:9.2f}{plan.writer_bytes / 1e6:10.1f}  {', '.join(notes)}"
        )
    print(
        "left of the bar: measured (read s: with `lift`, also splatting and the BEV encoder);\n"
        f"right: arithmetic for {frames} frames. An epoch reads the whole cache. epochs, students\n"
        f"(of {epochs} epochs): until the cache has cost less time than a live expert in every\n"
        f"step; a loader worker holds {1.5 * found.raw_bytes / 1e6:.0f} MB"
    )
    best = suggest(found, costs)
    print(f"suggested: --preset {best}" if best else "no preset fits: free some disk")


def _plain(values: dict) -> dict:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _free(out: Path | None) -> int | None:
    if out is None:
        return None
    there = next((path for path in (out, *out.absolute().parents) if path.exists()), Path("/"))
    return shutil.disk_usage(there).free
