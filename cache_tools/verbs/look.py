"""`fd3d-cache view`: a picture of one frame of a cache."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from cache_tools.reader import CacheReader
from cache_tools.verbs.words import Verbs, sayer
from fd3d.data.index import FrameIndex
from fd3d.errors import UsageError

_VIEW = """examples:
  fd3d-cache view train.zarr 0                       # the first frame, to its key.png
  fd3d-cache view train.zarr 3ca07e --dataroot data/nuscenes --out frame.png

FRAME is a key, the beginning of one, or a number in the cache's order."""

_PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


def add(verbs: Verbs) -> None:
    """The verb's flags, help and what runs it."""
    look = verbs.of_a_cache("view", text="a picture of one frame", examples=_VIEW, run=_view)
    look.add_argument("frame", help="which frame")
    look.add_argument(
        "--out", type=Path, help="the picture to make: .png, .jpg, .pdf, .svg (default FRAME.png)"
    )
    look.add_argument("--force", action="store_true", help="replace a picture that is there")
    look.add_argument("--dataroot", type=Path, help="the data set, to draw the ground truth too")
    look.add_argument(
        "--min-score", type=float, default=0.2, help="of the expert's boxes (default 0.2)"
    )


def _view(args: argparse.Namespace) -> None:
    # The cache may be unfinished: what is there can be looked at.
    from cache_tools.view import find_token, view

    reader = CacheReader(args.cache, allow_partial=True)
    token = find_token(reader, args.frame)
    # Keys are any strings; the picture stays in this folder.
    name = re.sub(r"[^\w.-]", "_", token).lstrip(".") or "frame"
    out = args.out or Path(f"{name}.png")
    if out.suffix.lower() not in _PICTURES:
        raise UsageError(f"{out} is no kind of picture: end --out in {', '.join(_PICTURES)}")
    if out.exists() and not args.force:
        raise UsageError(f"{out} is there already: choose another --out, or add --force")
    if not out.resolve().parent.is_dir():
        raise UsageError(f"there is no folder {out.resolve().parent}: make it, or choose another")
    index = None
    if args.dataroot is not None:
        version = reader.manifest.identity.dataset_version
        index = FrameIndex.open(dataroot=args.dataroot, version=version)
    drawn = view(out, reader=reader, token=token, index=index, min_score=args.min_score)
    if args.json:
        print(json.dumps({"token": token, "picture": str(out), "boxes": drawn}))
        return
    boxes = ", ".join(f"{count} of {name}" for name, count in drawn.items()) or "none"
    sayer(args.json)(f"made {out}: frame {token}; boxes: {boxes}")
