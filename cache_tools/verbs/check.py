"""`fd3d-cache verify` and `repair`: find damage, and mend what can be mended."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from cache_tools import layout
from cache_tools.repair import repair
from cache_tools.verbs.words import Verbs, sayer
from cache_tools.verify import Problem, VerifyReport, verify
from fd3d.errors import CheckFailed

_VERIFY = """example:
  fd3d-cache verify train.zarr && echo sound

Reads everything: each file's length and crc32c against its commit record, and each tile, which
has a crc32c of its own. Damaged files are named with their frames, exit code 1."""

_REPAIR = """example:
  fd3d-cache repair train.zarr && fd3d-cache build ... --out train.zarr

Manifest, frame keys and Zarr metadata are restored from the cache's own copy of them. Then every
byte is checked, and shards with damage lose their commit record: their frames no longer exist, and
the same build command makes them anew. Nothing else is touched. Exit code 1 while frames are
missing."""


def add(verbs: Verbs) -> None:
    """The verbs' flags, help and what runs them."""
    verbs.of_a_cache("verify", text="check every byte of a cache", examples=_VERIFY, run=_verify)
    verbs.of_a_cache(
        "repair",
        text="mend a damaged cache as far as it goes without the expert",
        examples=_REPAIR,
        run=_repair,
    )


def _verify(args: argparse.Namespace) -> None:
    say = sayer(args.json)
    say(f"Verifying {args.cache}: lengths, crc32c of every file, decoding of every frame")
    report = verify(args.cache, quiet=args.json)
    if args.json:
        print(json.dumps({"ok": report.ok, "complete": report.complete, **asdict(report)}))
    else:
        _tell_problems(report)
    if report.problems:
        raise CheckFailed(f"{len(report.problems)} files of {args.cache} are damaged")
    if not report.complete:
        raise CheckFailed(
            f"{args.cache} is not finished: {report.frames} of {report.expected} frames are there "
            f"(sound); run the build command again to go on"
        )
    say(f"sound: {report.frames} frames, {report.bytes / 1e6:.1f} MB")


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
    if not report.complete:
        raise CheckFailed(
            f"{args.cache} has {report.frames} of {report.expected} frames, all sound: run the "
            "build command again to make the others"
        )
    say(f"sound: {report.frames} frames")


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
