"""Depth targets for the image branch: the keyframe's lidar points on the network's depth map."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fd3d.data.images import ImageSpec
from fd3d.errors import UsageError

# nuScenes lidar files hold x, y, z, intensity, ring per point, as float32.
_COLUMNS = 5
_POINT_BYTES = 4 * _COLUMNS


def load_points(path: Path | str) -> np.ndarray:
    """(P, 3) float32 lidar points in metres, in the LIDAR_TOP frame of their own sweep.

    A missing file, an empty one or one that ends within a point raises `UsageError` naming it;
    that a file was cut between two points cannot be seen.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise UsageError(
            f"lidar file {path} is missing: download it or point --dataroot at the folder that "
            "has it"
        ) from None
    if not content or len(content) % _POINT_BYTES:
        raise UsageError(
            f"lidar file {path} has {len(content)} bytes, which are not whole points of "
            f"{_POINT_BYTES}: fetch the file again"
        )
    return np.frombuffer(content, dtype="<f4").reshape(-1, _COLUMNS)[:, :3]


def depth_maps(
    points: np.ndarray,
    *,
    spec: ImageSpec,
    rots: np.ndarray,
    trans: np.ndarray,
    intrins: np.ndarray,
    post_rots: np.ndarray,
    post_trans: np.ndarray,
) -> np.ndarray:
    """(N, h, w) float32 metres along each camera's axis, 0 where no point falls.

    Args:
        points: (P, 3) in the frame that the cameras are placed in.
        spec: gives the map's shape, its stride and the range of depths kept.
        rots, trans: (N, 3, 3), (N, 3) camera to that frame.
        intrins: (N, 3, 3) pixels of the stored picture.
        post_rots, post_trans: (N, 3, 3), (N, 3) stored pixel to network pixel.
    """
    to_image = intrins @ np.linalg.inv(rots)  # (N, 3, 3)
    shift = -np.einsum("nij,nj->ni", to_image, trans)
    # One float32 product for all cameras: (3 N, 3) @ (3, P).
    stacked = to_image.reshape(-1, 3).astype(np.float32) @ points.T
    stacked += shift.reshape(-1, 1).astype(np.float32)
    u, v, depth = stacked.reshape(len(rots), 3, -1).transpose(1, 0, 2)
    first, end, _ = spec.depth_range
    camera, point = np.nonzero((depth >= first) & (depth < end))
    depth = depth[camera, point]
    u, v = u[camera, point] / depth, v[camera, point] / depth
    post = np.concatenate([post_rots[:, :2, :2], post_trans[:, :2, None]], axis=2)
    post = post.astype(np.float32)[camera]
    u, v = (
        post[:, 0, 0] * u + post[:, 0, 1] * v + post[:, 0, 2],
        post[:, 1, 0] * u + post[:, 1, 1] * v + post[:, 1, 2],
    )
    return nearest_depth(camera, u, v, depth, cameras=len(rots), spec=spec)


def nearest_depth(
    camera: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
    depth: np.ndarray,
    *,
    cameras: int,
    spec: ImageSpec,
) -> np.ndarray:
    """(cameras, h, w) float32: the nearest depth per cell of points at network pixels (u, v).

    `spec.depth_cells` says which cell a point belongs to: round(pixel / stride), halves to even, or
    the cell that holds round(pixel).
    """
    height, width = spec.depth_shape
    first, end, _ = spec.depth_range
    if spec.depth_cells == "round":
        column, row = np.rint(u / spec.stride), np.rint(v / spec.stride)
    else:
        column, row = np.floor(np.rint(u) / spec.stride), np.floor(np.rint(v) / spec.stride)
    kept = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    kept &= (depth >= first) & (depth < end)
    cell = (camera[kept] * height + row[kept].astype(np.int64)) * width
    cell += column[kept].astype(np.int64)
    depth = depth[kept]
    # Farthest first: of several values for one cell, assignment keeps the last.
    order = np.argsort(-depth)
    maps = np.zeros(cameras * height * width, dtype=np.float32)
    maps[cell[order]] = depth[order]
    return maps.reshape(cameras, height, width)
