"""`fd3d-cache build`: run an expert over a split and store its signals."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from cache_tools import layout, manifest
from cache_tools.build import build_cache, missing_shards
from cache_tools.manifest import Manifest, short
from cache_tools.parts import Part, parse_part
from cache_tools.presets import PRESETS
from cache_tools.verbs.expert_flags import add_expert_flags, add_signals_flag, expert_run
from cache_tools.verbs.words import Verbs, names_in, sayer, tell_build
from cache_tools.writer import check_out
from fd3d.distill.signals import check_signals
from fd3d.errors import UsageError

_BUILD = """examples:
  a trained expert, all signals, a seventh to a quarter of the size of float16:
    fd3d-cache build --expert bevdepth-r50h --checkpoint expert.safetensors \\
      --dataroot data/nuscenes --version v1.0-trainval --split train \\
      --out train.zarr --signals bev,detections,heatmap --preset balanced

  to try the machinery without a checkpoint, random weights:
    fd3d-cache build --expert bevdepth-tiny-h --init-seed 0 --dataroot data/synthetic \\
      --version v1.0-synthetic --split val --out try.zarr --signals bev

  a job array of four, at once or one after the other, into one folder:
    fd3d-cache build ... --out train.zarr --part $SLURM_ARRAY_TASK_ID/4    # 1/4 to 4/4

The same command run again finishes a build that was stopped, by whatever; with --part, whichever
number of parts it was begun with. --out is never overwritten: a cache of anything else there is
refused and both ids are named."""


def add(verbs: Verbs) -> None:
    """The verb's flags, help and what runs it."""
    build = verbs.new(
        "build",
        help="run an expert over a split and store its signals",
        text="Run an expert once over a split and store its signals.",
        examples=_BUILD,
        run=_build,
    )
    add_expert_flags(build)
    build.add_argument(
        "--batch",
        type=int,
        default=2,
        help="frames at a time; keep it when a build goes on (default 2)",
    )
    store = build.add_argument_group("the cache")
    store.add_argument("--out", required=True, type=Path, help="its folder, such as train.zarr")
    add_signals_flag(store)
    store.add_argument(
        "--preset",
        choices=PRESETS,
        default="lossless",
        help="lossless: float16; balanced: int8 with a budget of 4 %% relative error a frame, a "
        "seventh to a quarter of float16; tiny: 8 %%, two thirds of that; fast: 2 %%, up to half "
        "of float16, unpacked several times faster; focal: as balanced at objects, block means "
        "elsewhere (default lossless)",
    )
    store.add_argument(
        "--shard-frames",
        type=int,
        default=16,
        help="frames in a file, held in memory while it is made; a kill costs at most so many "
        "(default 16)",
    )
    store.add_argument(
        "--part",
        default="1/1",
        metavar="I/N",
        help="build every N-th shard only, beginning with the I-th, beside other processes that "
        "build the others (default 1/1)",
    )
    store.add_argument(
        "--base",
        type=Path,
        help="a cache of fewer frames by the same expert: its shards are shared, not built again",
    )
    store.add_argument(
        "--pilot",
        type=int,
        help="frames that are run first, to see that they keep the preset's budget; 0 = none "
        "(default 64, at most a twentieth of the split; lossless has no budget)",
    )
    build.add_argument(
        "--dry-run", action="store_true", help="say what would happen, write nothing"
    )


def _build(args: argparse.Namespace) -> None:
    part = parse_part(args.part)
    signals = check_signals(names_in(args.signals))
    run = expert_run(args, signals, args.preset, replays=args.replays)
    from cache_tools.append import appended_keys, shared_shards
    from cache_tools.pilot import check_pilot, pilot_frames, run_pilot

    if args.base is not None:
        run = run.in_order(appended_keys(args.base, run.keys))

    wanted = manifest.make(
        identity=run.identity,
        signals=run.signals,
        keys=run.keys,
        preset=args.preset,
        shard_frames=args.shard_frames,
    )
    shared = ()
    if args.base is not None:
        shared = shared_shards(args.base, wanted, run.keys)
        if not shared:
            raise UsageError(
                f"{args.base} shares no shard with this build (it has other frames, or too few of "
                "them): leave --base out"
            )
    check_out(args.out, wanted)
    say = sayer(args.json)
    there = wanted.shards - len(missing_shards(args.out, wanted))
    verb = "Would build" if args.dry_run else "Building"
    say(
        f"{verb} {args.out}: {wanted.frames} frames of split {args.split} ({args.version}) with "
        f"{args.expert}, signals {','.join(signals)}, preset {args.preset}, {wanted.shards} shards "
        f"({there} there already), cache id {short(wanted.cache_id)}"
    )
    if shared:
        say(f"{len(shared)} of the shards are shared with {args.base}, where they are sound")
    if not part.whole:
        say(f"part {part}: {_owned(wanted, part)} of the shards")
    if args.dry_run:
        raw = layout.raw_frame_bytes(run.signals.values())
        say(f"at most {raw * wanted.frames / 1e6:.1f} MB as plain arrays; nothing was written")
        if args.json:
            print(json.dumps(_plan(args, wanted, part, there, raw)))
        return
    # A build that goes on was looked at when it began.
    new = args.preset != "lossless" and not there
    count = pilot_frames(args.pilot, wanted.frames) if new else 0
    if count:
        say(f"a pilot first: {count} frames over the split, to see that they keep the budget")
        check_pilot(run_pilot(run, preset=args.preset, count=count, quiet=args.json))
    report = build_cache(
        out=args.out,
        identity=run.identity,
        signals=run.signals,
        keys=run.keys,
        bev_part=run.bev_part,
        compute=run.compute,
        load=run.load,
        preset=args.preset,
        shard_frames=args.shard_frames,
        batch=args.batch,
        part=part,
        base=args.base,
        quiet=args.json,
    )
    if args.json:
        rest = {"complete": report.complete, "part": str(part), "ratio": report.ratio}
        print(json.dumps({**asdict(report), **rest}))
    else:
        tell_build(report, args.out)


def _owned(wanted: Manifest, part: Part) -> int:
    return sum(part.owns(shard) for shard in range(wanted.shards))


def _plan(args: argparse.Namespace, wanted: Manifest, part: Part, there: int, raw: int) -> dict:
    return {
        "out": str(args.out),
        "frames": wanted.frames,
        "shards": wanted.shards,
        "part": str(part),
        "shards_of_part": _owned(wanted, part),
        "shards_there": there,
        "signals_id": wanted.signals_id,
        "cache_id": wanted.cache_id,
        "raw_fp16_bytes_at_most": raw * wanted.frames,
    }
