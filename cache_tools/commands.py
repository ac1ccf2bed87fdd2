"""The verbs of `fd3d-cache`: build, info, verify."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cache_tools import layout, manifest
from cache_tools.build import BuildReport, build_cache, missing_shards
from cache_tools.codecs import PRESETS
from cache_tools.info import describe, survey
from cache_tools.manifest import Manifest, short
from cache_tools.parts import Part, parse_part
from cache_tools.repair import repair
from cache_tools.verify import Problem, VerifyReport, verify
from cache_tools.writer import check_out
from fd3d.distill.signals import SIGNALS, check_signals
from fd3d.errors import CheckFailed

_TOP = """An expert is run once over a split; apprentices then learn from its cached signals.

  fd3d-cache build ...   run the expert, store its signals; goes on where a killed build stopped
  fd3d-cache info C      what a cache is, how far it has come, how to use it
  fd3d-cache verify C    check every byte
  fd3d-cache repair C    mend metadata, let the next build make damaged shards anew

Exit codes: 0 done, 1 a check or the run failed, 2 wrong usage. `fd3d-cache VERB --help` has
examples."""

_BUILD = """examples:
  a trained expert, all signals, a fifth to two fifths of the size of float16:
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

_INFO = """example:
  fd3d-cache info train.zarr --json | python -m json.tool"""

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


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; how it may end badly is in `fd3d.errors`."""
    parsed = _parser().parse_args(arguments)
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


def _parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="fd3d-cache", description=_TOP, formatter_class=shape)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    build = verbs.add_parser(
        "build",
        help="run an expert over a split and store its signals",
        description="Run an expert once over a split and store its signals.",
        epilog=_BUILD,
        formatter_class=shape,
    )
    build.set_defaults(verb=_build)
    _add_build(build)
    for name, verb, text, epilog in (
        ("info", _info, "what a cache is and how far it has come", _INFO),
        ("verify", _verify, "check every byte of a cache", _VERIFY),
        ("repair", _repair, "mend a damaged cache as far as it goes without the expert", _REPAIR),
    ):
        sub = verbs.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=shape
        )
        sub.add_argument("cache", type=Path, help="the cache folder, such as train.zarr")
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout")
        sub.set_defaults(verb=verb)
    return parser


def _add_build(build: argparse.ArgumentParser) -> None:
    what = build.add_argument_group("the expert")
    what.add_argument("--expert", required=True, help="its architecture, such as bevdepth-r50h")
    weights = what.add_mutually_exclusive_group(required=True)
    weights.add_argument("--checkpoint", type=Path, help="its weights, a file")
    weights.add_argument(
        "--init-seed", type=int, help="random weights from this seed instead, for trying out"
    )
    what.add_argument("--device", default="cpu", help="where it runs: cpu, cuda:0 (default cpu)")
    what.add_argument(
        "--batch",
        type=int,
        default=2,
        help="frames at a time; keep it when a build goes on (default 2)",
    )
    frames = build.add_argument_group("the frames")
    frames.add_argument("--dataroot", required=True, type=Path, help="folder of the data set")
    frames.add_argument("--version", required=True, help="such as v1.0-trainval")
    frames.add_argument("--split", required=True, help="such as train or val")
    frames.add_argument(
        "--workers", type=int, default=2, help="processes that read images, 0 = none"
    )
    store = build.add_argument_group("the cache")
    store.add_argument("--out", required=True, type=Path, help="its folder, such as train.zarr")
    store.add_argument("--signals", required=True, help=f"comma-separated: {', '.join(SIGNALS)}")
    store.add_argument(
        "--preset",
        choices=PRESETS,
        default="lossless",
        help="lossless: float16; balanced: int8 with a budget of 4 %% relative error a frame, a "
        "fifth to two fifths of float16 (default lossless)",
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
    build.add_argument(
        "--dry-run", action="store_true", help="say what would happen, write nothing"
    )
    build.add_argument("--json", action="store_true", help="one JSON object on stdout, no progress")
