"""Non-maximum suppression of boxes in the ground plane: rotated overlap, or centre distance.

Overlaps are those of convex polygons, clipped half-plane by half-plane for all pairs at once in
float64 numpy. The boxes that reach this point are a few hundred, so it runs on the host.
"""

from __future__ import annotations

import numpy as np

# Footprints: (M, 5) = x y w l yaw, metres and radians, yaw counter-clockwise to the heading.


def footprint_corners(footprints: np.ndarray) -> np.ndarray:
    """(M, 4, 2) corners, counter-clockwise."""
    across, along = footprints[:, 2, None] / 2, footprints[:, 3, None] / 2
    dx = along * np.array([1, -1, -1, 1])
    dy = across * np.array([1, 1, -1, -1])
    cos, sin = np.cos(footprints[:, 4, None]), np.sin(footprints[:, 4, None])
    corners = np.stack([cos * dx - sin * dy, sin * dx + cos * dy], axis=2)
    return corners + footprints[:, None, :2]


def intersection_areas(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(K,) overlap areas of K pairs of convex quadrilaterals (K, 4, 2), counter-clockwise."""
    # Near the origin the shoelace sum loses no digits.
    middle = first.mean(axis=1, keepdims=True)
    polygon, frame = first - middle, second - middle
    count = np.full(len(polygon), 4)
    for side in range(4):
        polygon, count = _clip(polygon, count, frame[:, side], frame[:, (side + 1) % 4])
    following = _next(polygon, count)
    cross = polygon[..., 0] * following[..., 1] - polygon[..., 1] * following[..., 0]
    used = np.arange(polygon.shape[1]) < count[:, None]
    return np.maximum((cross * used).sum(axis=1) / 2, 0.0)


def _next(polygon: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Each vertex's successor; `polygon` (K, V, 2) has `count` used vertices in front."""
    index = np.arange(1, polygon.shape[1] + 1)
    index = np.where(index < count[:, None], index, 0)
    return np.take_along_axis(polygon, index[..., None], axis=1)


def _clip(polygon: np.ndarray, count: np.ndarray, start: np.ndarray, end: np.ndarray):
    """`polygon` cut to the left of the lines start -> end (K, 2): (K, V + 1, 2) and its counts.

    Sutherland and Hodgman's step: a vertex inside stays, an edge that crosses adds the crossing.
    """
    pairs, slots, _ = polygon.shape
    direction = end - start
    away = polygon - start[:, None]
    distance = direction[:, None, 0] * away[..., 1] - direction[:, None, 1] * away[..., 0]
    # On the line but for rounding is on the line: corners of a common edge must not fall on sides
    # of their own, or the cut would have more corners than a convex polygon can.
    size = np.hypot(direction[:, 0], direction[:, 1]) * np.abs(away).max(axis=(1, 2))
    distance = np.where(np.abs(distance) <= 1e-12 * size[:, None], 0.0, distance)
    following = _next(polygon, count)
    successor = _next(distance[..., None], count)[..., 0]
    used = np.arange(slots) < count[:, None]
    stays = used & (distance >= 0)
    crosses = used & ((distance >= 0) != (successor >= 0))
    gap = distance - successor
    share = distance / np.where(gap == 0, 1.0, gap)
    crossing = polygon + share[..., None] * (following - polygon)

    candidates = np.stack([polygon, crossing], axis=2).reshape(pairs, 2 * slots, 2)
    chosen = np.stack([stays, crosses], axis=2).reshape(pairs, 2 * slots)
    place = np.cumsum(chosen, axis=1) - 1
    clipped = np.zeros((pairs, slots + 2, 2))
    row, column = np.nonzero(chosen)
    clipped[row, np.minimum(place[row, column], slots + 1)] = candidates[row, column]
    kept = np.minimum(chosen.sum(axis=1), slots + 1)
    return clipped[:, : slots + 1], kept


def rotated_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(K,) intersection over union of K pairs of footprints (K, 5)."""
    overlap = intersection_areas(footprint_corners(first), footprint_corners(second))
    union = first[:, 2] * first[:, 3] + second[:, 2] * second[:, 3] - overlap
    return overlap / np.maximum(union, 1e-12)


def rotated_nms(footprints: np.ndarray, threshold: float, keep: int) -> np.ndarray:
    """Indices kept of footprints (M, 5) sorted by falling score; at most `keep`."""
    footprints = np.asarray(footprints, dtype=np.float64)
    reach = np.hypot(footprints[:, 2], footprints[:, 3]) / 2
    apart = _squared_distances(footprints[:, :2])
    near = apart < (reach[:, None] + reach[None]) ** 2
    first, second = np.nonzero(np.triu(near, k=1))
    # The smaller area over the larger bounds the IoU: most pairs of unlike sizes stop here.
    area = footprints[:, 2] * footprints[:, 3]
    small, large = np.minimum(area[first], area[second]), np.maximum(area[first], area[second])
    possible = small > threshold * large
    first, second = first[possible], second[possible]
    overlaps = np.zeros_like(near)
    iou = rotated_iou(footprints[first], footprints[second])
    overlaps[first, second] = iou > threshold
    return _greedy(overlaps, keep)


def circle_nms(centres: np.ndarray, threshold: float, keep: int) -> np.ndarray:
    """As `rotated_nms` for centres (M, 2); pairs within a *squared* distance of `threshold`."""
    return _greedy(_squared_distances(centres) <= threshold, keep)


def _squared_distances(points: np.ndarray) -> np.ndarray:
    return ((points[:, None] - points[None]) ** 2).sum(axis=2)


def _greedy(overlaps: np.ndarray, keep: int) -> np.ndarray:
    """Indices that survive; overlaps[i, j] (i < j matters) means i, if kept, suppresses j."""
    gone = np.zeros(len(overlaps), dtype=bool)
    kept: list[int] = []
    for index in range(len(overlaps)):
        if gone[index]:
            continue
        kept.append(index)
        if len(kept) == keep:
            break
        gone |= overlaps[index]
    return np.array(kept, dtype=np.int64)
