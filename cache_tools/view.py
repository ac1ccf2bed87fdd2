"""A picture of what a cache holds for one frame, for people who would rather look."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cache_tools.reader import CacheReader
from fd3d.boxes import transform
from fd3d.data.index import FrameIndex
from fd3d.draw import draw_above
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid

_SCORE = 9
# Colours are stretched between these percentiles: single cells of near things outshine the rest.
_ROBUST = (1, 99)


def find_token(reader: CacheReader, words: str) -> str:
    """The frame that `words` name: its key, the beginning of one, or its number in the cache."""
    if words in reader.tokens:
        return words
    if words.isdigit() and int(words) < len(reader.tokens):
        return reader.tokens[int(words)]
    found = [token for token in reader.tokens if token.startswith(words)]
    if len(found) != 1:
        raise UsageError(
            f"{len(found)} frames of {reader.path} begin with {words!r}: give more of the key, or "
            f"a number from 0 to {len(reader.tokens) - 1}"
        )
    return found[0]


def energy(bev: np.ndarray) -> np.ndarray:
    """(Y, X): L2 norm over the channels of a map (C, Y, X), their means removed."""
    bev = bev.astype(np.float32)
    return np.linalg.norm(bev - bev.mean(axis=(1, 2), keepdims=True), axis=0)


def components(bev: np.ndarray) -> np.ndarray:
    """(Y, X, 3) in [0, 1]: the first three principal components over the cells of a map.

    Signs are those that make the largest weight of each positive, so a picture is the same twice.
    Maps of fewer channels leave the last colours at zero.
    """
    flat = bev.reshape(len(bev), -1).astype(np.float64)
    flat -= flat.mean(axis=1, keepdims=True)
    _, vectors = np.linalg.eigh(flat @ flat.T)
    first = vectors[:, ::-1][:, :3]
    first = first * np.sign(first[np.abs(first).argmax(axis=0), np.arange(first.shape[1])])
    found = np.zeros((*bev.shape[1:], 3))
    for number, values in enumerate((first.T @ flat).reshape(-1, *bev.shape[1:])):
        low, high = np.percentile(values, _ROBUST)
        found[..., number] = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return found


def boxes_of(
    reader: CacheReader, token: str, grid: BEVGrid, *, index: FrameIndex | None, min_score: float
) -> dict[str, np.ndarray]:
    """Name -> (N, 9) boxes in the grid's frame: the ground truth and the expert's, as far as the
    cache and the index have them. Detections are cached in the LIDAR frame, so in the ego frame
    they need the index."""
    frame = index.frame(index.position(token)) if index is not None else None
    found = {}
    if frame is not None:
        found["ground truth"] = frame.boxes_in(grid.frame)
    if "detections" in reader.specs and (grid.frame == "lidar" or frame is not None):
        table = reader.read(token, ["detections"])["detections"]
        boxes = table[table[:, _SCORE] >= min_score, :9].astype(np.float64)
        if grid.frame != "lidar":
            boxes = transform(boxes, np.linalg.inv(frame.pose("ego")) @ frame.pose("lidar"))
        found[f"expert, score {min_score:g} or more"] = boxes
    return found


def view(
    path: Path,
    *,
    reader: CacheReader,
    token: str,
    index: FrameIndex | None = None,
    min_score: float = 0.2,
) -> dict[str, int]:
    """Write the picture of a frame to `path`; the number of boxes drawn, by name.

    Panels: the energy of `bev`, its first principal components as colours, and the highest class
    score of `heatmap` where that is cached; boxes above them; the tiles that preset focal kept.
    A cache without a BEV map raises `UsageError`.
    """
    spec = reader.specs.get("bev")
    if spec is None:
        raise UsageError(f"{reader.path} holds no BEV map to look at: build one with --signals bev")
    if spec.grid is None:
        raise UsageError(
            f"{reader.path} does not say where the cells of its bev lie: build it again with a "
            "grid in the signal's spec"
        )
    # Off-screen and imported here: the library itself must not need a display or a second.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bev = reader.read(token, ["bev"])["bev"]
    panels = {
        "energy (L2 over channels, means removed)": energy(bev),
        "first three principal components": components(bev),
    }
    if "heatmap" in reader.specs:
        scores = reader.read(token, ["heatmap"])["heatmap"]
        panels["highest class score"] = scores.max(axis=0).astype(np.float32)
    boxes = boxes_of(reader, token, spec.grid, index=index, min_score=min_score)
    exact = reader.exact(token, "bev")
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 6.6), squeeze=False)
    for place, (name, values) in zip(axes[0], panels.items(), strict=True):
        _panel(place, values, grid=spec.grid, boxes=boxes, exact=exact)
        place.set_title(name, fontsize=10)
    axes[0, 0].legend(loc="upper right", fontsize=8)
    who = reader.manifest.identity
    error = reader.error(token, "bev")
    figure.suptitle(
        f"{token}: {who.expert} on {who.split} of {who.dataset_version}, preset "
        f"{reader.manifest.preset}, error {100 * error:.2f} %"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return {name: len(found) for name, found in boxes.items()}


def _panel(
    axes, values: np.ndarray, *, grid: BEVGrid, boxes: Mapping[str, np.ndarray], exact: np.ndarray
) -> None:
    extent = (grid.x_min, grid.x_max, grid.y_min, grid.y_max)
    limits = {}
    if values.ndim == 2:
        low, high = np.percentile(values, _ROBUST)
        limits = {"cmap": "magma", "vmin": low, "vmax": max(high, low + 1e-12)}
    axes.imshow(values, origin="lower", extent=extent, interpolation="nearest", **limits)
    for colour, (name, found) in zip(("#2ecc40", "#00b5ff"), boxes.items(), strict=False):
        draw_above(axes, found, colour=colour, name=name)
    if not exact.all():
        # Contours run through cell centres.
        x = grid.x_min + (np.arange(grid.nx) + 0.5) * grid.cell_x
        y = grid.y_min + (np.arange(grid.ny) + 0.5) * grid.cell_y
        axes.contour(x, y, exact.astype(float), levels=[0.5], colors="white", linewidths=0.8)
    ahead = {"lidar": (0, 3), "ego": (3, 0)}[grid.frame]
    axes.annotate(
        "", xytext=(0, 0), xy=ahead, arrowprops={"arrowstyle": "->", "color": "white", "lw": 2}
    )
    axes.set(xlim=extent[:2], ylim=extent[2:])
    axes.set(xlabel=f"x, metres ({grid.frame} frame)", ylabel="y, metres")
