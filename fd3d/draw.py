"""Pictures for people: boxes in the six cameras and seen from above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np

from fd3d import boxes as boxlib
from fd3d.classes import CAMERAS
from fd3d.data.frames import Frame

_EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4))
_EDGES += ((0, 4), (1, 5), (2, 6), (3, 7))
_COLOURS = ("#2ecc40", "#ff851b", "#00b5ff", "#f012be")
_NEAR = 0.3  # metres in front of the lens: nearer parts of an edge are cut off


def project_edges(
    boxes: np.ndarray, *, global_to_camera: np.ndarray, intrinsic: np.ndarray
) -> np.ndarray:
    """(S, 2, 2) pixel segments of the boxes' edges in front of a camera.

    Args:
        boxes: (N, 9) in the global frame.
        global_to_camera: (4, 4); camera x right, y down, z forward, metres.
        intrinsic: (3, 3) pixels. Edges that cross the near plane are cut there.
    """
    points = boxlib.corners(boxes) @ global_to_camera[:3, :3].T + global_to_camera[:3, 3]
    segments = points[:, np.array(_EDGES)].reshape(-1, 2, 3)
    depth = segments[:, :, 2]
    segments = segments[(depth > _NEAR).any(axis=1)]
    start, end = segments[:, 0].copy(), segments[:, 1].copy()
    for near, far in ((start, end), (end, start)):
        cut = near[:, 2] < _NEAR
        share = (_NEAR - near[cut, 2]) / (far[cut, 2] - near[cut, 2])
        near[cut] += share[:, None] * (far[cut] - near[cut])
    pixels = np.stack([start, end], axis=1) @ intrinsic.T
    return pixels[..., :2] / pixels[..., 2:]


def submitted_boxes(records: Sequence[Mapping], *, min_score: float) -> np.ndarray:
    """(N, 9) boxes in the global frame from one sample's records of a nuScenes results file."""
    rows = [
        [*record["translation"], *record["size"], _yaw(record["rotation"]), *record["velocity"]]
        for record in records
        if record["detection_score"] >= min_score
    ]
    return np.array(rows, dtype=np.float64).reshape(-1, 9)


def _yaw(quaternion: Sequence[float]) -> float:
    """Heading of a rotation (w, x, y, z) about the vertical, radians."""
    w, x, y, z = quaternion
    return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))


def frame_picture(
    path: Path | str,
    *,
    frame: Frame,
    dataroot: Path | str,
    layers: Mapping[str, np.ndarray],
    title: str,
) -> None:
    """Write a PNG of one frame: six cameras with boxes, and the same boxes from above.

    Args:
        path: file to write.
        frame, dataroot: from `FrameIndex.frame` and `FrameIndex.dataroot`.
        layers: name to boxes (N, 9) in the global frame, drawn in this order.
        title: first line of the picture.
    """
    # Off-screen and imported here: the library itself must not need a display or a second.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection
    from PIL import Image

    figure = plt.figure(figsize=(22, 6.6), facecolor="white")
    layout = figure.add_gridspec(2, 4, width_ratios=(1, 1, 1, 1.15), wspace=0.02, hspace=0.08)
    # The order of CAMERAS fills a row looking ahead, then a row looking back.
    for place, (name, shot) in enumerate(zip(CAMERAS, frame.cameras, strict=True)):
        axes = figure.add_subplot(layout[place // 3, place % 3])
        with Image.open(Path(dataroot) / shot.file) as picture:
            width, height = picture.size
            axes.imshow(picture)
        to_camera = np.linalg.inv(shot.ego2global @ shot.camera2ego)
        for colour, boxes in zip(cycle(_COLOURS), layers.values(), strict=False):
            edges = project_edges(boxes, global_to_camera=to_camera, intrinsic=shot.intrinsic)
            axes.add_collection(LineCollection(edges, colors=colour, linewidths=1.2))
        axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        axes.set_title(name, fontsize=9, pad=2)
    axes = figure.add_subplot(layout[:, 3])
    to_ego = np.linalg.inv(frame.ego2global)
    edge = 20.0
    for colour, (name, boxes) in zip(cycle(_COLOURS), layers.items(), strict=False):
        here = boxlib.transform(boxes, to_ego)
        edge = max(edge, 5.0 + np.abs(here[:, :2]).max(initial=0.0))
        draw_above(axes, here, colour=colour, name=name)
    axes.plot([0, 2], [0, 0], color="black", linewidth=2)
    axes.add_patch(plt.Rectangle((-1.5, -0.9), 4.5, 1.8, fill=False, color="black"))
    axes.set(xlim=(-edge, edge), ylim=(-edge, edge))
    axes.set(xlabel="metres ahead", ylabel="metres to the left")
    axes.set_aspect("equal")
    axes.yaxis.set_label_position("right")
    axes.yaxis.tick_right()
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right", fontsize=9)
    axes.set_title("from above (line: heading)", fontsize=9, pad=2)
    figure.suptitle(title, fontsize=11, y=0.97)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def draw_above(axes, boxes: np.ndarray, *, colour: str, name: str) -> None:
    """Draw the footprints of boxes (N, 9) with a line from the centre over the front, in metres of
    their own frame."""
    from matplotlib.collections import LineCollection

    feet = boxlib.corners_bev(boxes)
    loops = np.concatenate([feet, feet[:, :1]], axis=1)
    ahead = np.stack([np.cos(boxes[:, boxlib.YAW]), np.sin(boxes[:, boxlib.YAW])], axis=1)
    centre = boxes[:, :2]
    reach = (boxes[:, boxlib.L, None] / 2 + 0.8) * ahead
    noses = np.stack([centre, centre + reach], axis=1)
    axes.add_collection(LineCollection(loops, colors=colour, linewidths=1.3, label=name))
    axes.add_collection(LineCollection(noses, colors=colour, linewidths=1.0))
