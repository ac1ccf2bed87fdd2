"""What the boxes are worth that an expert's head reads out of cached maps."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cache_tools.expectation import check_signals
from cache_tools.reader import CacheReader
from fd3d.data.batch import Detections
from fd3d.data.frames import FrameDataset
from fd3d.data.index import FrameIndex
from fd3d.distill import bev_part
from fd3d.errors import UsageError
from fd3d.evaluation import Scores, evaluate, submission, write_submission
from fd3d.models.bevdepth.network import BEVDepth
from fd3d.progress import Progress

_BATCH = 4

# From a frame's key to its map (C, Y, X).
ReadMap = Callable[[str], np.ndarray]


def head_of(reader: CacheReader) -> BEVDepth:
    """The expert behind its splat, from beside the cache; one without it raises `UsageError`."""
    path = reader.bev_part()
    if path is None:
        raise UsageError(
            f"{reader.path} has no bev_part.safetensors, so its maps cannot become boxes: build it "
            "with an expert of this project"
        )
    return bev_part.unpack(path)


@torch.no_grad()
def detect(
    model: BEVDepth, tokens: tuple[str, ...], read: ReadMap, *, index: FrameIndex, quiet: bool
) -> dict[str, Detections]:
    """Detections by frame key, in the frame of the model's grid, from the maps that `read`
    gives."""
    frames = FrameDataset(
        index=index,
        positions=[index.position(token) for token in tokens],
        image=model.image,
        truth=False,
    )
    found: dict[str, Detections] = {}
    with Progress(total=len(tokens), unit="frames", title="decoding", quiet=quiet) as progress:
        for start in range(0, len(tokens), _BATCH):
            chosen = tokens[start : start + _BATCH]
            maps = np.stack([read(token) for token in chosen]).astype(np.float32)
            dt = [frames.seconds(start + row) for row in range(len(chosen))]
            decoded = model.decode(model.head(torch.from_numpy(maps)), torch.tensor(dt))
            found.update(zip(chosen, decoded, strict=True))
            progress.advance(len(chosen))
    return found


def scores_of(
    found: dict[str, Detections], *, dataroot: str | Path, version: str, split: str
) -> Scores:
    """Official scores of detections of every frame of a split."""
    index = FrameIndex.open(dataroot=dataroot, version=version)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        write_submission(path, submission(found, index, split))
        return evaluate(
            dataroot=dataroot, version=version, split=split, submission=path, out_dir=folder
        )


def check_score(path: str | Path, *, dataroot: str | Path) -> None:
    """A cache or data that `score_cache` cannot use raises `UsageError`; no map is read."""
    reader = CacheReader(path, allow_partial=True)
    check_signals(reader.path, reader.manifest, ("bev",))
    if not reader.manifest.bev_part:
        head_of(reader)
    FrameIndex.open(dataroot=dataroot, version=reader.manifest.identity.dataset_version)


def score_cache(path: str | Path, *, dataroot: str | Path, quiet: bool = True) -> Scores:
    """The official scores of the boxes decoded from a cache's `bev`, over its whole split.

    A cache without `bev` or without the expert's head raises `UsageError`.
    """
    reader = CacheReader(path)
    who = reader.manifest.identity
    model = head_of(reader)
    index = FrameIndex.open(dataroot=dataroot, version=who.dataset_version)
    found = detect(
        model,
        reader.tokens,
        lambda token: reader.read(token, ["bev"])["bev"],
        index=index,
        quiet=quiet,
    )
    return scores_of(found, dataroot=dataroot, version=who.dataset_version, split=who.split)
