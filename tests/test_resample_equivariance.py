"""Moving a box and moving the map commute, for every pair of grids and frames."""

import itertools

import numpy as np
import pytest
import torch

from fd3d.augment import BEVAugmentation, move_boxes
from fd3d.boxes import YAW, H, W
from fd3d.grid import BEVGrid
from fd3d.resample import resample

GRIDS = [
    BEVGrid.square(half_extent=51.2, cells=256),
    BEVGrid.square(half_extent=51.2, cells=128),
    BEVGrid.square(half_extent=54.0, cells=180),
    BEVGrid(x_min=-30, x_max=50, y_min=-40, y_max=40, nx=100, ny=200),
]
FRAMES = list(itertools.product(("lidar", "ego"), repeat=2))
LIDAR_TO_EGO = np.array(
    [[0.0, 1.0, 0.0, 0.94], [-1.0, 0.0, 0.0, 0.02], [0.0, 0.0, 1.0, 1.84], [0.0, 0.0, 0.0, 1.0]]
)


def in_frame(grid: BEVGrid, frame: str) -> BEVGrid:
    return BEVGrid.from_dict({**grid.to_dict(), "frame": frame})


def centres(grid: BEVGrid) -> np.ndarray:
    """(Y, X, 2) metres."""
    rows, cols = np.mgrid[: grid.ny, : grid.nx]
    points = np.stack([cols, rows, np.ones_like(cols)], axis=-1) @ grid.cell_to_metres().T
    return points[..., :2]


def inside(points: np.ndarray, box: np.ndarray, margin: float) -> np.ndarray:
    """Whether ground points lie in a box that is `margin` metres larger on every side."""
    away = points - box[:2]
    along = away @ [np.cos(box[YAW]), np.sin(box[YAW])]
    across = away @ [-np.sin(box[YAW]), np.cos(box[YAW])]
    return (abs(along) <= box[W + 1] / 2 + margin) & (abs(across) <= box[W] / 2 + margin)


def rigid(box: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """A box after a rigid transform of the ground."""
    moved = box.copy()
    moved[:3] = matrix[:3, :3] @ box[:3] + matrix[:3, 3]
    heading = matrix[:2, :2] @ [np.cos(box[YAW]), np.sin(box[YAW])]
    moved[YAW] = np.arctan2(heading[1], heading[0])
    return moved


@pytest.mark.parametrize("frames", FRAMES, ids="-".join)
@pytest.mark.parametrize("pair", list(itertools.product(range(len(GRIDS)), repeat=2)))
def test_a_blob_drawn_in_a_box_stays_in_the_moved_box(frames, pair):
    source, target = (in_frame(GRIDS[i], f) for i, f in zip(pair, frames, strict=True))
    rng = np.random.default_rng(10 * pair[0] + pair[1])
    between = {
        ("lidar", "ego"): LIDAR_TO_EGO,
        ("ego", "lidar"): np.linalg.inv(LIDAR_TO_EGO),
    }.get(frames, np.eye(4))
    for _ in range(3):
        box = np.array([*rng.uniform(-18, 18, size=2), 0, 5.0, 9.0, 2.0, rng.uniform(-3, 3), 0, 0])
        augmentation = BEVAugmentation(
            rotate=rng.uniform(-0.4, 0.4),
            scale=rng.uniform(0.9, 1.1),
            flip_y=bool(rng.integers(2)),
            flip_x=bool(rng.integers(2)),
        )
        # First to the other frame, then augmented there.
        matrix = augmentation.matrix() @ between
        moved = move_boxes(rigid(box, between)[None], augmentation)[0]
        assert moved[H] == pytest.approx(2.0 * augmentation.scale)
        drawn = torch.from_numpy(inside(centres(source), box, 0.0).astype(np.float32))
        assert drawn.sum() > 0
        found, valid = resample(drawn[None, None], from_grid=source, to_grid=target, matrix=matrix)
        share = found[0, 0].numpy()
        # Bilinear reading and a cell's own size are how far a blob may reach over the edge.
        reach = 1.5 * max(source.cell_x, source.cell_y) + max(target.cell_x, target.cell_y)
        assert not share[~inside(centres(target), moved, reach)].any()
        deep = inside(centres(target), moved, -reach) & valid[0, 0].numpy()
        assert deep.any() and (share[deep] > 0.999).all()
