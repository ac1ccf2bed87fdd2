"""What kinds of things there are: sizes, shares, speeds, looks and the nuScenes names they carry.

Sizes are those of nuScenes' classes to a few centimetres with a spread of 8 to 10 %. The shares are
flatter than on real roads (real cars are 43 %, bicycles 1 %), because the metric averages over
classes and a small data set must show each of them often enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fd3d.data.synthetic import shapes


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of thing. size: width, length, height in metres; speed: m/s of those that move."""

    category: str
    share: float
    size: tuple[float, float, float]
    shapes: tuple[str, ...]
    moving: float = 0.0  # share that moves
    speed: tuple[float, float] = (0.0, 0.0)
    spread: float = 0.09


KINDS = {
    "car": Kind(
        category="vehicle.car",
        share=0.235,
        size=(1.95, 4.62, 1.73),
        shapes=("sedan", "hatchback", "van"),
        moving=0.65,
        speed=(1.0, 6.0),
    ),
    "truck": Kind(
        category="vehicle.truck",
        share=0.09,
        size=(2.51, 6.93, 2.84),
        shapes=("box_truck", "box_truck", "pickup"),
        moving=0.65,
        speed=(1.0, 5.0),
    ),
    "construction": Kind(
        category="vehicle.construction",
        share=0.06,
        size=(2.85, 6.37, 3.19),
        shapes=("excavator", "roller"),
        moving=0.45,
        speed=(0.5, 2.0),
    ),
    "bus": Kind(
        category="vehicle.bus.rigid",
        share=0.065,
        size=(2.94, 11.0, 3.47),
        shapes=("bus",),
        moving=0.65,
        speed=(1.0, 5.0),
    ),
    "trailer": Kind(
        category="vehicle.trailer",
        share=0.06,
        size=(2.90, 11.5, 3.87),
        shapes=("trailer",),
        moving=0.6,
        speed=(1.0, 5.0),
        spread=0.12,
    ),
    "barrier": Kind(
        category="movable_object.barrier",
        share=0.09,
        size=(2.53, 0.50, 0.98),
        shapes=("barrier",),
    ),
    "motorcycle": Kind(
        category="vehicle.motorcycle",
        share=0.07,
        size=(0.77, 2.11, 1.47),
        shapes=("cycle_rider", "cycle"),
        moving=0.65,
        speed=(1.0, 4.0),
    ),
    "bicycle": Kind(
        category="vehicle.bicycle",
        share=0.07,
        size=(0.60, 1.70, 1.40),
        shapes=("cycle_rider", "cycle"),
        moving=0.65,
        speed=(1.0, 4.0),
    ),
    "pedestrian": Kind(
        category="human.pedestrian.adult",
        share=0.145,
        size=(0.67, 0.73, 1.77),
        shapes=("walker",),
        moving=0.65,
        speed=(0.5, 1.6),
    ),
    "cone": Kind(
        category="movable_object.trafficcone",
        share=0.075,
        size=(0.41, 0.41, 1.07),
        shapes=("cone",),
    ),
    # Labelled, but outside the ten detection classes.
    "debris": Kind(
        category="movable_object.debris",
        share=0.02,
        size=(0.9, 0.9, 0.6),
        shapes=("crate",),
        spread=0.3,
    ),
    "bin": Kind(
        category="movable_object.pushable_pullable",
        share=0.02,
        size=(0.7, 0.8, 1.1),
        shapes=("bin",),
        spread=0.15,
    ),
}
VEHICLES = ("car", "truck", "construction", "bus", "trailer")
CYCLES = ("motorcycle", "bicycle")

_PAINT = np.array(
    [
        (60, 90, 150),
        (40, 110, 70),
        (120, 125, 130),
        (45, 48, 55),
        (95, 70, 45),
        (30, 120, 130),
        (170, 165, 155),
        (120, 90, 140),
        (180, 130, 40),
        (140, 60, 50),
    ],
    dtype=np.float64,
)

# Paint by kind: on real roads too excavators are yellow and motorcyclists wear black, though less
# strictly. It lets networks that see a few hundred frames tell the classes apart.
_BODY_PAINT = {
    name: np.array(colours, dtype=np.float64)
    for name, colours in {
        "car": [(60, 90, 150), (120, 125, 130), (45, 48, 55), (170, 165, 155), (140, 60, 50)],
        "truck": [(35, 110, 65), (30, 125, 130)],
        "construction": [(220, 165, 35), (225, 140, 40)],
        "bus": [(150, 80, 160), (115, 55, 145)],
        "trailer": [(150, 200, 60), (170, 215, 90)],
        "motorcycle": [(30, 60, 190), (50, 90, 220)],
        "bicycle": [(225, 225, 220), (200, 210, 215)],
    }.items()
}
_CLOTH = {
    "motorcycle": np.array([(34, 34, 40), (60, 44, 36)], dtype=np.float64),
    "bicycle": np.array([(215, 225, 60), (240, 200, 50)], dtype=np.float64),
}


def draw_size(rng: np.random.Generator, kind: Kind, shape: str) -> np.ndarray:
    """(3,) width, length, height in metres; one common factor and a little for each axis."""
    common = 1 + rng.normal(0.0, kind.spread * 0.8)
    size = np.array(kind.size) * common * (1 + rng.normal(0.0, kind.spread * 0.4, 3))
    if shape == "cycle":
        size[2] *= 0.78
    elif shape == "sitter":
        size *= (1.0, 1.3, 0.72)
    elif shape == "pickup":
        size *= (0.88, 0.85, 0.68)
    elif shape == "van":
        size *= (1.02, 1.05, 1.15)
    # Whole millimetres, so that the tables hold exactly what is drawn.
    return np.round(np.clip(size, 0.25, 14.0), 3)


def draw_palette(rng: np.random.Generator, kind: str, shape: str) -> np.ndarray:
    """(CODES, 3) colours of one thing; front and rear keep their tones, all else varies.

    kind: key of `KINDS`, or any other name for scenery.
    """
    table = np.zeros((shapes.CODES, 3))
    paint, cloth = _BODY_PAINT.get(kind, _PAINT), _CLOTH.get(kind, _PAINT)
    table[shapes.BODY] = paint[rng.integers(len(paint))]
    table[shapes.FRONT] = (232, 224, 178)
    table[shapes.REAR] = (150, 28, 30) if rng.random() < 0.6 else (84, 22, 34)
    table[shapes.GLASS] = (35, 45, 58)
    table[shapes.WHEEL] = (22, 22, 22)
    table[shapes.HEADLIGHT] = (255, 250, 225)
    table[shapes.TAILLIGHT] = (255, 40, 30)
    table[shapes.ACCENT] = paint[rng.integers(len(paint))] * 0.8
    table[shapes.SKIN] = np.array((200, 150, 120)) * rng.uniform(0.6, 1.1)
    table[shapes.CLOTH] = cloth[rng.integers(len(cloth))]
    table[shapes.WHITE] = (225, 225, 220)
    table[shapes.DARK] = (38, 38, 40)
    if shape in ("cone", "pole"):
        table[shapes.BODY] = (225, 95, 30) if rng.random() < 0.7 else table[shapes.BODY]
    elif shape == "barrier":
        looks = (((215, 212, 205), (190, 40, 35)), ((215, 105, 40), (225, 225, 220)))
        looks += (((150, 148, 142), (120, 118, 112)),)
        table[shapes.BODY], table[shapes.ACCENT] = looks[rng.integers(3)]
    elif shape in ("building", "wall"):
        table[shapes.BODY] = np.array((150, 135, 120)) * rng.uniform(0.6, 1.3, 3)
        table[shapes.GLASS] = np.array((90, 105, 120)) * rng.uniform(0.5, 1.4)
        table[shapes.ACCENT] = table[shapes.BODY] * 0.8
    elif shape == "tree":
        table[shapes.BODY] = np.array((70, 105, 45)) * rng.uniform(0.6, 1.3)
        table[shapes.ACCENT] = table[shapes.BODY] * 0.7
        table[shapes.DARK] = (70, 55, 40)
    return np.clip(table * rng.uniform(0.88, 1.1, table.shape), 0, 255)


def attribute(name: str, shape: str, *, moving: bool, in_lane: bool, sitting: bool) -> str:
    """The nuScenes attribute of a thing of the kind `name`, "" where that has none."""
    if name in VEHICLES:
        # Buses stand at stops rather than in parking bays.
        halted = "vehicle.stopped" if in_lane or name == "bus" else "vehicle.parked"
        return "vehicle.moving" if moving else halted
    if name in CYCLES:
        return "cycle.with_rider" if shape == "cycle_rider" else "cycle.without_rider"
    if name == "pedestrian":
        if sitting:
            return "pedestrian.sitting_lying_down"
        return "pedestrian.moving" if moving else "pedestrian.standing"
    return ""
