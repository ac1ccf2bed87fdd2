"""`fd3d-cache verify`, `repair`, `prune`: find damage, mend it, sweep what kills left."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cache_tools import layout
from cache_tools.prune import prune
from cache_tools.repair import repair
from cache_tools.rerun import Question, ask, question
from cache_tools.score import check_score, score_cache
from cache_tools.verbs.words import Verbs, sayer
from cache_tools.verify import Problem, VerifyReport, verify
from fd3d.errors import CheckFailed, UsageError

_VERIFY = """example:
  fd3d-cache verify train.zarr && echo sound
  fd3d-cache verify train.zarr --rerun 8 --checkpoint expert.safetensors --dataroot data/nuscenes
  fd3d-cache verify val.zarr --nds --dataroot data/nuscenes

Reads everything: each file's length and crc32c against its commit record, and each tile, which
has a crc32c of its own. Damaged files are named with their frames, exit code 1. --rerun asks the
expert again, --nds scores the boxes that its head reads from the decoded maps."""

_REPAIR = """example:
  fd3d-cache repair train.zarr && fd3d-cache build ... --out train.zarr

Manifest, frame keys and Zarr metadata are restored from the cache's own copy of them. Then every
byte is checked, and shards with damage lose their commit record: their frames no longer exist, and
the same build command makes them anew. Nothing else is touched. Exit code 1 while frames are
missing."""

_PRUNE = """examples:
  fd3d-cache prune train.zarr          # only lists
  fd3d-cache prune train.zarr --yes    # removes what is listed

What killed builds left: files half-written, files of shards without a valid record, leases and
unfinished folders of dead processes. Frames that can be read stay, and so does every file that is
not known to be the cache's. Refused while the cache is being built."""


def add(verbs: Verbs) -> None:
    """The verbs' flags, help and what runs them."""
    found = verbs.of_a_cache(
        "verify", text="check every byte of a cache", examples=_VERIFY, run=_verify
    )
    found.add_argument(
        "--rerun", type=int, metavar="K", help="also run the expert on K frames and compare"
    )
    found.add_argument(
        "--nds", action="store_true", help="also score the boxes that its head reads from `bev`"
    )
    found.add_argument("--dataroot", type=Path, help="with --rerun and --nds: the data set")
    weights = found.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, help="with --rerun: the expert's weights")
    weights.add_argument("--init-seed", type=int, help="with --rerun: the seed of random ones")
    found.add_argument(
        "--device", default="auto", help="with --rerun: where it runs (default: the GPU, if any)"
    )
    verbs.of_a_cache(
        "repair",
        text="mend a damaged cache as far as it goes without the expert",
        examples=_REPAIR,
        run=_repair,
    )
    found = verbs.of_a_cache(
        "prune", text="remove what killed builds left in a cache", examples=_PRUNE, run=_prune
    )
    found.add_argument("--yes", action="store_true", help="remove it; without, it is only listed")


def _verify(args: argparse.Namespace) -> None:
    if (args.rerun is not None or args.nds) and args.dataroot is None:
        raise UsageError("--rerun and --nds look at the frames: name their --dataroot")
    if args.rerun is not None and args.checkpoint is None and args.init_seed is None:
        raise UsageError("--rerun runs the expert: name its --checkpoint, or --init-seed")
    if args.rerun is None and (args.checkpoint or args.init_seed is not None):
        raise UsageError("--checkpoint and --init-seed belong to --rerun K: leave them out")
    if args.rerun is None and not args.nds and args.dataroot is not None:
        raise UsageError("--dataroot belongs to --rerun and --nds: leave it out")
    # What cannot be asked is said before hours of reading.
    asked = None
    if args.rerun is not None:
        asked = question(
            args.cache,
            count=args.rerun,
            dataroot=args.dataroot,
            checkpoint=args.checkpoint,
            init_seed=args.init_seed,
            device=args.device,
        )
    if args.nds:
        check_score(args.cache, dataroot=args.dataroot)
    say = sayer(args.json)
    say(f"Verifying {args.cache}: lengths, crc32c of every file, decoding of every frame")
    report = verify(args.cache, quiet=args.json)
    found = {"ok": report.ok, "complete": report.complete, **asdict(report)}
    if not args.json:
        _tell_problems(report)
    if report.ok:
        found |= _ask_again(args, asked, say)
    if args.json:
        print(json.dumps(found))
    if report.problems:
        raise CheckFailed(f"{len(report.problems)} files of {args.cache} are damaged")
    if not report.complete:
        raise CheckFailed(
            f"{args.cache} is not finished: {report.frames} of {report.expected} frames are there "
            f"(sound); run the build command again to go on"
        )
    if not found.get("rerun", {}).get("ok", True):
        raise CheckFailed(f"{args.cache} does not hold what its expert says now")
    say(f"sound: {report.frames} frames, {report.bytes / 1e6:.1f} MB")


def _ask_again(
    args: argparse.Namespace, asked: Question | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """What --rerun and --nds found, for JSON; people are told."""
    found = {}
    if asked is not None:
        again = ask(asked, quiet=args.json)
        found["rerun"] = {"ok": again.ok, **asdict(again)}
        for name, error in again.worst.items():
            say(
                f"{name}: {100 * error:.2f} % from what the expert says now, at most "
                f"{100 * again.allowed[name]:.2f} % ({len(again.tokens)} frames)"
            )
    if args.nds:
        scores = score_cache(args.cache, dataroot=args.dataroot, quiet=args.json)
        found["scores"] = scores.to_dict()
        say(f"boxes read from bev: NDS {scores.nds:.4f}, mAP {scores.map:.4f}")
    return found


def _repair(args: argparse.Namespace) -> None:
    say = sayer(args.json)
    say(f"Repairing {args.cache}: metadata, then every byte of every frame")
    report = repair(args.cache, quiet=args.json)
    if args.json:
        print(json.dumps({"complete": report.complete, **asdict(report)}))
    else:
        for name in report.restored:
            print(f"restored: {name}")
        _tell_damage(report.problems)
        for shard in report.shards:
            print(f"forgotten: {layout.record_file(shard)}")
    if report.frames < report.expected:
        raise CheckFailed(
            f"{args.cache} has {report.frames} of {report.expected} frames, all sound: run the "
            "build command again to make the others"
        )
    if not report.complete:
        raise CheckFailed(
            f"{args.cache} has all of its frames, but no build mends what is named above: build "
            "it again in another --out, or restore those files from a copy"
        )
    say(f"sound: {report.frames} frames")


def _prune(args: argparse.Namespace) -> None:
    report = prune(args.cache, remove=args.yes)
    if args.json:
        print(json.dumps({"bytes": report.bytes, **asdict(report)}))
        return
    verb = "removed" if report.removed else "would remove"
    for one in report.found:
        print(f"{verb}: {one.file} ({one.bytes} bytes), {one.why}")
    for name in report.left_alone:
        print(f"not ours, left alone: {name}")
    if not report.found:
        print(f"nothing to prune in {args.cache}")
    elif report.removed:
        print(f"{len(report.found)} removed, {report.bytes / 1e6:.1f} MB")
    else:
        size = f"{report.bytes / 1e6:.1f} MB"
        print(f"{len(report.found)} to remove, {size}; nothing was changed, --yes removes them")


def _tell_problems(report: VerifyReport) -> None:
    _tell_damage(report.problems)
    if report.problems:
        print(f"to mend: fd3d-cache repair {report.path}, then build again")
    for name in report.leftovers:
        print(f"left over, harmless: {name}")


def _tell_damage(problems: Sequence[Problem]) -> None:
    for problem in problems:
        more = f" and {len(problem.tokens) - 3} more" if len(problem.tokens) > 3 else ""
        frames = f"; frames {', '.join(problem.tokens[:3])}{more}" if problem.tokens else ""
        print(f"damaged: {problem.file} {problem.what}{frames}")
