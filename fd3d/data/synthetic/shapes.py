"""What things look like: a few boxes per shape, and a painted picture for each of their faces.

A shape lives in its own unit box: x from -0.5 (rear) to 0.5 (front), y from -0.5 (right) to 0.5
(left), z from 0 (bottom) to 1. Its parts fill that box in every direction, so that the annotated
box is tight. Faces are painted with paint codes; what colour a code has is up to each actor.

Front and rear differ from every side on purpose: the front third of sides and roof is light, the
rear third is red or dark. Without such a cue heading can only be guessed up to a half turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

TEXELS = 48
CODES = 12
(BODY, FRONT, REAR, GLASS, WHEEL, HEADLIGHT, TAILLIGHT, ACCENT, SKIN, CLOTH, WHITE, DARK) = range(
    CODES
)
EMITTING = (HEADLIGHT, TAILLIGHT)

Extent = tuple[float, float, float, float, float, float]  # x0 x1 y0 y1 z0 z1 in the unit box
Painter = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


def _ends(x: np.ndarray, base: int = BODY) -> np.ndarray:
    """The cue shared by everything that has a heading: light front, red rear."""
    return np.select([x > 0.15, x < -0.2], [FRONT, REAR], base)


def _vehicle(x, y, z, face):
    code = _ends(x)
    if face == 0:
        code = np.select(
            [(z > 0.2) & (z < 0.42) & (np.abs(y) > 0.26), z > 0.55, z < 0.1],
            [HEADLIGHT, GLASS, DARK],
            FRONT,
        )
    elif face == 1:
        code = np.select(
            [
                (z > 0.28) & (z < 0.46) & (np.abs(y) > 0.26),
                (z > 0.64) & (z < 0.86) & (np.abs(y) < 0.3),
                z < 0.1,
            ],
            [TAILLIGHT, DARK, DARK],
            REAR,
        )
    elif face in (2, 3):
        wheel = ((np.abs(x) - 0.31) / 0.085) ** 2 + ((z - 0.1) / 0.2) ** 2 < 1
        window = (z > 0.63) & (z < 0.85) & (np.abs(x + 0.04) < 0.14)
        code = np.select([wheel, window], [WHEEL, GLASS], code)
    return code


def _bus(x, y, z, face):
    code = _vehicle(x, y, z, face)
    if face in (2, 3):
        pane = (z > 0.45) & (z < 0.8) & (np.mod(x * 8, 1.0) > 0.2) & (np.abs(x) < 0.42)
        code = np.where(pane, np.where((x > 0.15) | (x < -0.2), code, GLASS), code)
        code = np.where((z > 0.86) & (np.abs(x) < 0.2), ACCENT, code)
    return code


def _cargo(x, y, z, face):
    code = _vehicle(x, y, z, face)
    rib = (np.mod(x * 12, 1.0) > 0.85) & (np.abs(x) < 0.16) & (z > 0.3)
    if face in (2, 3):
        code = np.where((code == GLASS) | rib, ACCENT, code)
    return code


def _machine(x, y, z, face):
    code = _vehicle(x, y, z, face)
    if face in (2, 3):
        code = np.where(z < 0.3, np.where(np.mod(x * 14, 1.0) > 0.5, DARK, code), code)
        code = np.where((code == BODY) & (z > 0.3) & (np.mod(x * 9 + z * 4, 1.0) > 0.7), DARK, code)
    return code


def _cycle(x, y, z, face):
    code = _ends(x, ACCENT)
    if face == 0:
        code = np.where((z > 0.4) & (z < 0.62), HEADLIGHT, FRONT)
    elif face == 1:
        code = np.where((z > 0.35) & (z < 0.55), TAILLIGHT, REAR)
    elif face in (2, 3):
        spokes = ((np.abs(x) - 0.31) / 0.19) ** 2 + ((z - 0.24) / 0.24) ** 2
        code = np.select([(spokes < 1) & (spokes > 0.5)], [WHEEL], code)
    return np.where(z > 0.66, _person(x * 1.6, y, z, face), code)


def _person(x, y, z, face):
    side = np.select([x > 0.08, x < -0.08], [FRONT, REAR], BODY)
    torso = FRONT if face == 0 else REAR if face == 1 else side
    head = SKIN if face == 0 else DARK if face in (1, 4) else np.where(x > 0, SKIN, DARK)
    legs = np.where(np.abs(y) < 0.06, DARK, CLOTH) if face < 2 else np.where(x > 0, CLOTH, DARK)
    return np.select([z > 0.85, z > 0.46], [head, torso], legs)


def _cone(x, y, z, face):
    return np.select([z < 0.07, (z > 0.42) & (z < 0.66)], [DARK, WHITE], BODY)


def _barrier(x, y, z, face):
    stripe = np.mod(y * 4 + z * 0.8, 1.0) > 0.5
    return np.where((z > 0.45) & stripe, ACCENT, BODY)


def _plain(x, y, z, face):
    return np.where((np.mod(z * 3, 1.0) < 0.12) | (np.mod((x + y) * 3, 1.0) < 0.08), ACCENT, BODY)


def _building(x, y, z, face):
    across = y if face < 2 else x
    pane = (np.mod(across * 7, 1.0) > 0.45) & (np.mod(z * 4, 1.0) > 0.5)
    if face >= 4:
        pane = pane & False
    return np.select([pane, z < 0.06], [GLASS, DARK], BODY)


def _tree(x, y, z, face):
    leaf = np.mod(np.sin(x * 37.0 + z * 51.0) * 43.0 + y * 17.0, 1.0)
    return np.select([z < 0.35, leaf > 0.6], [DARK, ACCENT], BODY)


def _box(x0=-0.5, x1=0.5, y0=-0.5, y1=0.5, z0=0.0, z1=1.0) -> Extent:
    return x0, x1, y0, y1, z0, z1


_CYCLE_FRAME = (
    _box(y0=-0.16, y1=0.16, z0=0.0, z1=0.5),
    _box(x0=0.18, x1=0.27, z0=0.5, z1=0.6),
)

SHAPES: dict[str, tuple[tuple[Extent, ...], Painter]] = {
    "sedan": ((_box(z1=0.58), _box(x0=-0.4, x1=0.2, y0=-0.43, y1=0.43, z0=0.58)), _vehicle),
    "hatchback": ((_box(z1=0.56), _box(x0=-0.49, x1=0.17, y0=-0.45, y1=0.45, z0=0.56)), _vehicle),
    "van": ((_box(z1=0.5), _box(x1=0.36, y0=-0.48, y1=0.48, z0=0.5)), _vehicle),
    "box_truck": (
        (
            _box(x0=0.2, y0=-0.46, y1=0.46, z0=0.1, z1=0.8),
            _box(x1=0.17, z0=0.18),
            _box(x0=-0.45, x1=0.45, y0=-0.4, y1=0.4, z1=0.18),
        ),
        _cargo,
    ),
    "pickup": (
        (_box(z1=0.52), _box(x0=-0.06, x1=0.26, y0=-0.45, y1=0.45, z0=0.52)),
        _vehicle,
    ),
    "bus": ((_box(z0=0.08), _box(x0=-0.45, x1=0.45, y0=-0.45, y1=0.45, z1=0.08)), _bus),
    "trailer": (
        (
            _box(x1=0.42, z0=0.26),
            _box(x0=-0.45, x1=0.1, y0=-0.42, y1=0.42, z1=0.26),
            _box(x0=0.1, y0=-0.1, y1=0.1, z0=0.1, z1=0.26),
        ),
        _cargo,
    ),
    "excavator": (
        (
            _box(z1=0.34),
            _box(x0=-0.42, x1=0.08, y0=-0.4, y1=0.4, z0=0.34, z1=0.85),
            _box(x0=0.08, x1=0.5, y0=-0.1, y1=0.1, z0=0.5, z1=1.0),
        ),
        _machine,
    ),
    "roller": (
        (_box(z1=0.5), _box(x0=-0.3, x1=0.15, y0=-0.42, y1=0.42, z0=0.5)),
        _machine,
    ),
    "cycle_rider": (
        (*_CYCLE_FRAME, _box(x0=-0.22, x1=0.14, y0=-0.36, y1=0.36, z0=0.42, z1=0.86))
        + (_box(x0=-0.06, x1=0.1, y0=-0.2, y1=0.2, z0=0.86),),
        _cycle,
    ),
    "cycle": (
        (
            _box(y0=-0.2, y1=0.2, z1=0.62),
            _box(x0=0.14, x1=0.28, z0=0.62, z1=1.0),
            _box(x0=-0.3, x1=-0.1, y0=-0.3, y1=0.3, z0=0.62, z1=0.76),
        ),
        _cycle,
    ),
    "walker": (
        (
            _box(x0=-0.42, x1=0.42, y0=-0.32, y1=0.32, z1=0.47),
            _box(z0=0.47, z1=0.85),
            _box(x0=-0.22, x1=0.3, y0=-0.2, y1=0.2, z0=0.85),
        ),
        _person,
    ),
    "sitter": (
        (_box(z1=0.45), _box(x1=0.0, z0=0.45, z1=0.8), _box(x0=-0.4, x1=0.0, z0=0.8)),
        _person,
    ),
    "cone": (
        (
            _box(z1=0.07),
            _box(x0=-0.32, x1=0.32, y0=-0.32, y1=0.32, z0=0.07, z1=0.5),
            _box(x0=-0.17, x1=0.17, y0=-0.17, y1=0.17, z0=0.5),
        ),
        _cone,
    ),
    "barrier": ((_box(z1=0.3), _box(x0=-0.25, x1=0.25, z0=0.3)), _barrier),
    "crate": ((_box(),), _plain),
    "bin": ((_box(x0=-0.42, x1=0.42, y0=-0.42, y1=0.42, z1=0.85), _box(z0=0.85)), _plain),
    "building": ((_box(),), _building),
    "wall": ((_box(),), _plain),
    "pole": ((_box(),), _cone),
    "tree": (
        (_box(x0=-0.1, x1=0.1, y0=-0.1, y1=0.1, z1=0.35), _box(z0=0.35, z1=0.8))
        + (_box(x0=-0.3, x1=0.3, y0=-0.3, y1=0.3, z0=0.8),),
        _tree,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Atlas:
    """Every face of every shape as paint codes.

    codes: uint8, flat; the face f of part p starts at (p * 6 + f) * TEXELS ** 2, rows run along
    the later of the face's two axes. Faces: 0 front, 1 back, 2 left, 3 right, 4 top, 5 bottom.
    extents: (P, 6) unit-box extents; first: shape name -> (first part, number of parts).
    """

    codes: np.ndarray
    extents: np.ndarray
    first: dict[str, tuple[int, int]]


@lru_cache(maxsize=1)
def atlas() -> Atlas:
    """The painted faces of all shapes; made once per process."""
    codes, extents, first = [], [], {}
    for name, (parts, painter) in SHAPES.items():
        first[name] = (len(extents), len(parts))
        for part in parts:
            extents.append(part)
            codes.extend(_faces(part, painter))
    return Atlas(
        codes=np.concatenate(codes), extents=np.array(extents, dtype=np.float64), first=first
    )


def _faces(part: Extent, painter: Painter) -> list[np.ndarray]:
    grid = (np.arange(TEXELS) + 0.5) / TEXELS
    ranges = np.array(part).reshape(3, 2)
    pictures = []
    for face in range(6):
        axis, negative = divmod(face, 2)
        columns, rows = [other for other in range(3) if other != axis]
        point = [None, None, None]
        point[axis] = np.full((TEXELS, TEXELS), ranges[axis, 1 - negative])
        low, high = ranges[columns]
        point[columns] = np.broadcast_to(low + grid * (high - low), (TEXELS, TEXELS))
        low, high = ranges[rows]
        point[rows] = np.broadcast_to((low + grid * (high - low))[:, None], (TEXELS, TEXELS))
        picture = np.broadcast_to(painter(*point, face), (TEXELS, TEXELS))
        pictures.append(picture.astype(np.uint8).ravel())
    return pictures
