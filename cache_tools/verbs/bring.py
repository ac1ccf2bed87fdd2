"""`fd3d-cache import`: a cache of signals that an expert wrote elsewhere."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from cache_tools import presets
from cache_tools.importing import import_signals
from cache_tools.verbs.words import Verbs, names_in, tell_build

# Where objects are, which preset focal asks, such a folder does not say.
PRESETS = tuple(name for name in presets.PRESETS if name != "focal")

_IMPORT = """examples:
  fd3d-cache import signals train.zarr
  fd3d-cache import signals bev.zarr --signals bev --preset balanced

For an expert that runs only where this project cannot be installed. In its environment:
  1. copy cache_tools/foreign_writer.py there; it needs Python 3.6 and numpy
  2. writer = SignalsWriter("signals", identity={...}, signals={...})
  3. writer.add(key, bev=array) for each frame, then writer.finish(keys)
docs/cache.md has the whole loop, section "Signals written elsewhere".

What DIR holds, whoever writes it:
  signals.json         format, identity, signals, frame keys; written last
  FRAME.SIGNAL.npy     an array for each frame and signal, or
  FRAME.safetensors    a file for each frame, its tensors named by signal

All files must be there before anything is built. DIR is only read. Killed, the same command goes
on. OUT is never overwritten: a cache of anything else there is refused. A file with NaN, or that is
not what signals.json says, is named, exit code 1: write that frame again, run the same command."""


def add(verbs: Verbs) -> None:
    """The verb's flags, help and what runs it."""
    found = verbs.new(
        "import",
        help="a cache of signals that an expert wrote elsewhere",
        text="Make a cache of signals that an expert wrote elsewhere, as .npy or .safetensors.",
        examples=_IMPORT,
        run=_import,
    )
    found.add_argument("folder", metavar="DIR", type=Path, help="the folder with signals.json")
    found.add_argument("out", metavar="OUT", type=Path, help="the cache to make, such as c.zarr")
    found.add_argument(
        "--preset", choices=PRESETS, default="lossless", help="see build (default lossless)"
    )
    found.add_argument("--signals", default="", help="comma-separated (default: all)")
    found.add_argument("--shard-frames", type=int, default=16, help="frames in a file (default 16)")


def _import(args: argparse.Namespace) -> None:
    report = import_signals(
        args.folder,
        args.out,
        preset=args.preset,
        shard_frames=args.shard_frames,
        signals=names_in(args.signals) or None,
        quiet=args.json,
    )
    if args.json:
        print(json.dumps({**asdict(report), "complete": report.complete, "ratio": report.ratio}))
    else:
        tell_build(report, args.out, expert=False)
