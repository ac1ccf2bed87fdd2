"""The verbs of `fd3d-cache`: build, info, verify."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cache_tools import layout, manifest
from cache_tools.arguments import make_parser
from cache_tools.build import BuildReport, build_cache, missing_shards
from cache_tools.compare import compare
from cache_tools.export import export
from cache_tools.info import describe, survey
from cache_tools.manifest import Manifest, short
from cache_tools.parts import Part, parse_part
from cache_tools.repair import repair
from cache_tools.verify import Problem, VerifyReport, verify
from cache_tools.writer import check_out
from fd3d.distill.signals import check_signals
from fd3d.errors import CheckFailed, UsageError


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; how it may end badly is in `fd3d.errors`."""
    verbs = {
        "build": _build,
        "info": _info,
        "verify": _verify,
        "repair": _repair,
        "export": _export,
        "compare": _compare,
    }
    parsed = make_parser(verbs).parse_args(arguments)
    parsed.verb(parsed)


def _build(args: argparse.Namespace) -> None:
    part = parse_part(args.part)
    signals = check_signals([name for name in map(str.strip, args.signals.split(",")) if name])
    # Networks and data loaders take seconds to import; info and verify do without.
    from cache_tools.expert import prepare

    run = prepare(
        expert=args.expert,
        checkpoint=args.checkpoint,
        init_seed=args.init_seed,
        dataroot=args.dataroot,
        version=args.version,
        split=args.split,
        signals=signals,
        device=args.device,
        workers=args.workers,
    )
    wanted = manifest.make(
        identity=run.identity,
        signals=run.signals,
        keys=run.keys,
        preset=args.preset,
        shard_frames=args.shard_frames,
    )
    check_out(args.out, wanted)
    say = _sayer(args.json)
    there = wanted.shards - len(missing_shards(args.out, wanted))
    verb = "Would build" if args.dry_run else "Building"
    say(
        f"{verb} {args.out}: {wanted.frames} frames of split {args.split} ({args.version}) with "
        f"{args.expert}, signals {','.join(signals)}, preset {args.preset}, {wanted.shards} shards "
        f"({there} there already), cache id {short(wanted.cache_id)}"
    )
    if not part.whole:
        say(f"part {part}: {_owned(wanted, part)} of the shards")
    if args.dry_run:
        raw = layout.raw_frame_bytes(run.signals.values())
        say(f"at most {raw * wanted.frames / 1e6:.1f} MB as plain arrays; nothing was written")
        if args.json:
            print(json.dumps(_plan(args, wanted, part, there, raw)))
        return
    report = build_cache(
        out=args.out,
        identity=run.identity,
        signals=run.signals,
        keys=run.keys,
        compute=run.compute,
        load=run.load,
        preset=args.preset,
        shard_frames=args.shard_frames,
        batch=args.batch,
        part=part,
        quiet=args.json,
    )
    if args.json:
        rest = {"complete": report.complete, "part": str(part), "ratio": report.ratio}
        print(json.dumps({**asdict(report), **rest}))
    else:
        _tell(report, args.out)


def _info(args: argparse.Namespace) -> None:
    found = survey(args.cache)
    print(json.dumps(found.to_dict()) if args.json else describe(found))


def _verify(args: argparse.Namespace) -> None:
    say = _sayer(args.json)
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


def _export(args: argparse.Namespace) -> None:
    names = [name for name in map(str.strip, args.signals.split(",")) if name]
    report = export(
        args.cache,
        args.out,
        preset=args.preset,
        keys=_keys(args.keys) if args.keys else None,
        signals=names or None,
        shard_frames=args.shard_frames,
        quiet=args.json,
    )
    if args.json:
        print(json.dumps({**asdict(report), "complete": report.complete, "ratio": report.ratio}))
    else:
        _tell(report, args.out)


def _keys(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--keys {path} cannot be read ({error}): give a text file") from None


def _compare(args: argparse.Namespace) -> None:
    found = compare(args.cache, args.other, quiet=args.json)
    if args.json:
        print(json.dumps(asdict(found)))
        return
    print(f"{found.frames} frames are in both; {args.other} against {args.cache}:")
    for name, one in found.maps.items():
        print(
            f"  {name}: relative error mean {100 * one.mean:.3f} %, worst {100 * one.worst:.3f} % "
            f"(frame {one.worst_token}), worst channel {100 * one.worst_channel:.3f} %"
        )
    for name, differing in found.tables.items():
        print(f"  {name}: {differing} frames differ")
    for name in found.left_out:
        print(f"  {name}: not in both with one shape")


def _repair(args: argparse.Namespace) -> None:
    say = _sayer(args.json)
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


def _tell(report: BuildReport, out: Path) -> None:
    spent = ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())
    print(
        f"{report.frames} frames ({report.built} built now), {report.bytes / 1e6:.1f} MB, "
        f"{report.ratio:.3f} of raw; seconds: {spent}"
    )
    for name, part in report.signals.items():
        if part.worst_error is not None:
            print(
                f"  {name}: relative error mean {100 * part.mean_error:.2f} %, worst "
                f"{100 * part.worst_error:.2f} % (frame {part.worst_token}), worst channel "
                f"{100 * part.worst_channel:.2f} %"
            )
        if part.over_budget:
            print(f"  {name}: {part.over_budget} frames are over the budget of its preset")
    print(f"signals id {short(report.signals_id)}, cache id {short(report.cache_id)}")
    if not report.complete:
        print(f"the cache has {report.frames} of {report.expected} frames: build the other parts")
    print(f"next: fd3d-cache verify {out}, fd3d-cache info {out}")


def _tell_problems(report: VerifyReport) -> None:
    _tell_damage(report.problems)
    if report.problems:
        print(f"to mend: fd3d-cache repair {report.path}, then build again")
    for name in report.leftovers:
        print(f"left over, harmless: {name}")


def _tell_damage(problems: Sequence[Problem]) -> None:
    for problem in problems:
        more = f" and {len(problem.tokens) - 3} more" if len(problem.tokens) > 3 else ""
        print(
            f"damaged: {problem.file} {problem.what}; frames {', '.join(problem.tokens[:3])}{more}"
        )


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


def _sayer(as_json: bool):
    """Prints for people; with --json stdout is for the machine alone."""
    return (lambda text: None) if as_json else (lambda text: print(text, flush=True))
