"""The words of the `fd3d-cache` command line: verbs, flags and their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from cache_tools.codecs import PRESETS
from fd3d.distill.signals import SIGNALS

Verb = Callable[[argparse.Namespace], None]

_TOP = """An expert is run once over a split; apprentices then learn from its cached signals.

  fd3d-cache build ...   run the expert, store its signals; goes on where a killed build stopped
  fd3d-cache info C      what a cache is, how far it has come, how to use it
  fd3d-cache verify C    check every byte
  fd3d-cache export C O  the same signals in another preset, or of fewer frames
  fd3d-cache compare C D how far two caches' signals are apart
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


_EXPORT = """examples:
  fd3d-cache export train.zarr small.zarr --preset balanced
  fd3d-cache export train.zarr some.zarr --keys tokens.txt --signals bev

Runs no expert: reads a lossless cache. The result has the ids and the bytes in its data files that
building it with that preset would have given. Killed, the same command goes on."""

_COMPARE = """example:
  fd3d-cache compare train.zarr small.zarr

Over the frames that both have: relative L2 error of each map after removing channel means, B
against A, and the number of frames whose tables differ."""


def make_parser(verbs: Mapping[str, Verb]) -> argparse.ArgumentParser:
    """The parser; what it returns has in `verb` the one of `verbs` that was asked for."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="fd3d-cache", description=_TOP, formatter_class=shape)
    found = parser.add_subparsers(metavar="VERB", required=True)
    build = found.add_parser(
        "build",
        help="run an expert over a split and store its signals",
        description="Run an expert once over a split and store its signals.",
        epilog=_BUILD,
        formatter_class=shape,
    )
    build.set_defaults(verb=verbs["build"])
    _add_build(build)
    _add_export(found, shape).set_defaults(verb=verbs["export"])
    for name, text, epilog in (
        ("info", "what a cache is and how far it has come", _INFO),
        ("verify", "check every byte of a cache", _VERIFY),
        ("compare", "how far two caches' signals are apart", _COMPARE),
        ("repair", "mend a damaged cache as far as it goes without the expert", _REPAIR),
    ):
        sub = found.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=shape
        )
        sub.add_argument("cache", type=Path, help="the cache folder, such as train.zarr")
        if name == "compare":
            sub.add_argument("other", type=Path, help="another cache of the same frames")
        sub.add_argument("--json", action="store_true", help="one JSON object on stdout")
        sub.set_defaults(verb=verbs[name])
    return parser


def _add_export(found, shape: type) -> argparse.ArgumentParser:
    text = "the same signals in another preset, or of fewer frames, without the expert"
    export = found.add_parser(
        "export", help=text, description=text, epilog=_EXPORT, formatter_class=shape
    )
    export.add_argument("cache", type=Path, help="a finished lossless cache")
    export.add_argument("out", type=Path, help="the cache to make")
    export.add_argument("--preset", choices=PRESETS, default="lossless")
    export.add_argument("--keys", type=Path, help="a file of frame keys to take (default: all)")
    export.add_argument("--signals", default="", help="comma-separated (default: all)")
    export.add_argument(
        "--shard-frames", type=int, help="frames in a file (default: as in the source)"
    )
    export.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return export


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
        "fifth to two fifths of float16; fast: int8 with 2 %%, up to half of float16, unpacked "
        "several times faster (default lossless)",
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
