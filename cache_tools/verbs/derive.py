"""`fd3d-cache export` and `compare`: a cache made from a cache, and how far two are apart."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from cache_tools import manifest
from cache_tools.compare import compare
from cache_tools.export import export
from cache_tools.presets import PRESETS
from cache_tools.verbs.words import Verbs, names_in, tell_build
from fd3d.data.index import FrameIndex
from fd3d.distill.replay import count_of
from fd3d.distill.signals import parts_of
from fd3d.errors import UsageError

_EXPORT = """examples:
  fd3d-cache export train.zarr small.zarr --preset balanced
  fd3d-cache export train.zarr some.zarr --keys tokens.txt --signals bev

Runs no expert: reads a lossless cache. The result has the ids and the bytes in its data files that
building it with that preset would have given; the errors that it states are against the float16 of
the source, not against the expert's float32. Killed, the same command goes on."""

_COMPARE = """example:
  fd3d-cache compare train.zarr small.zarr

Over the frames that both have: relative L2 error of each map after removing channel means, B
against A, and the number of frames whose tables differ."""


def add(verbs: Verbs) -> None:
    """The verbs' flags, help and what runs them."""
    found = verbs.of_a_cache(
        "export",
        text="the same signals in another preset, or of fewer frames, without the expert",
        examples=_EXPORT,
        run=_export,
    )
    found.add_argument("out", type=Path, help="the cache to make")
    found.add_argument("--preset", choices=PRESETS, default="lossless")
    found.add_argument("--keys", type=Path, help="a file of frame keys to take (default: all)")
    found.add_argument("--signals", default="", help="comma-separated (default: all)")
    found.add_argument("--dataroot", type=Path, help="preset focal: the data set's folder")
    found.add_argument(
        "--shard-frames", type=int, help="frames in a file (default: as in the source)"
    )
    found = verbs.of_a_cache(
        "compare", text="how far two caches' signals are apart", examples=_COMPARE, run=_compare
    )
    found.add_argument("other", type=Path, help="another cache of the same frames")


def _export(args: argparse.Namespace) -> None:
    replays = count_of(manifest.load(args.cache).signals)
    names = parts_of(names_in(args.signals), replays)
    report = export(
        args.cache,
        args.out,
        preset=args.preset,
        keys=_keys(args.keys) if args.keys else None,
        signals=names or None,
        shard_frames=args.shard_frames,
        index=_index(args) if args.dataroot else None,
        quiet=args.json,
    )
    if args.json:
        print(json.dumps({**asdict(report), "complete": report.complete, "ratio": report.ratio}))
    else:
        tell_build(report, args.out, expert=False)


def _index(args: argparse.Namespace) -> FrameIndex:
    version = manifest.load(args.cache).identity.dataset_version
    return FrameIndex.open(dataroot=args.dataroot, version=version)


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
