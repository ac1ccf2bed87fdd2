"""Signals: the named things an expert yields for a frame, and the network that yields them.

`bev` is the map that the expert's head reads, `heatmap` its class scores on the same grid,
`detections` its decoded boxes, `lift` the factors that it splats (`fd3d.distill.lift`), `pv` its
image neck's maps (`fd3d.distill.pv`), `replay` the maps of a few augmented worlds
(`fd3d.distill.replay`). A signal source yields them for a batch:
`fd3d.distill.live.LiveSource` runs the network through `LiveExpert` (the control experiment),
`cache_tools.source.CachedExpert` reads what it once said.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fd3d.boxes import transform
from fd3d.classes import CAMERAS, CLASSES
from fd3d.data.batch import Batch, Detections
from fd3d.distill import replay
from fd3d.distill.lift import lift_signals
from fd3d.distill.pv import pv_signals
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid

SIGNALS = ("bev", "detections", "heatmap", "lift", "pv", "replay")

# These are stored and read in parts.
LIFT = ("lift_cameras", "lift_context", "lift_depth", "lift_seconds")
PV = ("pv_cameras", "pv_map")
_PARTS = {"lift": LIFT, "pv": PV}
# What needs the network behind the image branch.
_OF_THE_MAP = {"bev", "detections", "heatmap"}

# What "the expert's target" means under augmentation; see docs/architecture.md. `clean`: there is
# no BEV augmentation in training, the un-augmented expert's map is used in place. `moved`: that map
# moved as the apprentice's augmentation moves the ground. `relift`: its factors are splatted where
# the apprentice's augmentation puts the cameras. `regate`: the expert sees the world as that
# augmentation moves it, which no cache can hold; `replay`: the same for a few augmentations of each
# frame, which one can.
MODES = ("clean", "moved", "relift", "regate", "replay")

# Modes in which the expert's view is augmented as the apprentice's is.
AUGMENTED = ("regate", "replay")

# Signals that follow the apprentice's augmentation, or that the distillers move themselves. Scores
# on the un-augmented grid do neither.
_FOLLOWING = {
    "relift": ("bev", "detections", "pv", *LIFT, *PV, "lift"),
    "regate": ("bev",),
    "replay": ("bev",),
}

# Rows of a `detections` table: x y z w l h yaw vx vy score label, keyframe LIDAR frame, m and m/s.
DETECTION_COLUMNS = 11
MAX_DETECTIONS = 500


@dataclass(frozen=True, kw_only=True)
class SignalSpec:
    """Shape and meaning of one signal of one frame.

    Args:
        name: as in `SIGNALS`, or any name for other experts.
        shape: of one frame; (C, Y, X) for maps, (most rows, columns) for tables.
        dtype: numpy name of the decoded values ("float16", "float32").
        ragged: True for tables whose number of rows differs from frame to frame.
        grid: where a map's cells lie; None for what is not a BEV map.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    ragged: bool = False
    grid: BEVGrid | None = None


def check_mode(mode: str) -> str:
    """`mode` itself; a mode that does not exist raises `UsageError`."""
    if mode not in MODES:
        raise UsageError(f"mode {mode!r} is not known: use one of {', '.join(MODES)}")
    return mode


def check_follows(names: Sequence[str], mode: str) -> None:
    """Signals that a BEV augmentation would leave behind in a mode raise `UsageError`."""
    left = sorted(set(names) - set(_FOLLOWING.get(mode, names)))
    if left:
        raise UsageError(
            f"the signals {', '.join(left)} do not follow the augmentation in mode {mode}: use a "
            "distiller that does without, or mode moved"
        )


def check_signals(names: Sequence[str]) -> tuple[str, ...]:
    """The names sorted, each once; an unknown or missing name raises `UsageError`."""
    unknown = sorted(set(names) - set(SIGNALS))
    if unknown or not names:
        raise UsageError(
            f"signals {', '.join(unknown) or '(none)'} are not known: choose from "
            f"{', '.join(SIGNALS)}"
        )
    return tuple(sorted(set(names)))


def parts_of(names: Sequence[str], replays: int = 0) -> tuple[str, ...]:
    """The names of what is stored for signals, sorted: `lift` and `pv` stand for their parts, and
    `replay` for as many maps as there are augmentations."""
    parts = {**_PARTS, "replay": (replay.AUGMENT, *map(replay.part, range(replays)))}
    return tuple(sorted({part for name in names for part in parts.get(name, (name,))}))


def signals_of(parts: Iterable[str]) -> tuple[str, ...]:
    """The names of the signals that parts belong to, sorted: the inverse of `parts_of`."""
    whole = {part: name for name, own in _PARTS.items() for part in own}
    whole[replay.AUGMENT] = "replay"
    names = {whole.get(part, part) for part in parts}
    return tuple(sorted({"replay" if replay.is_map(name) else name for name in names}))


def specs(model: nn.Module, names: Sequence[str], replays: int = 0) -> dict[str, SignalSpec]:
    """The specs of the named signals of a model from `fd3d.models.build`; `replays`: how many
    augmentations the signal `replay` has."""
    grid: BEVGrid = model.grid
    if ("replay" in names) != bool(replays):
        raise UsageError("the signal replay has --replays N augmentations: give both or neither")
    known = {
        "bev": SignalSpec(
            name="bev", shape=(model.bev_channels, *grid.shape), dtype="float16", grid=grid
        ),
        "heatmap": SignalSpec(
            name="heatmap", shape=(len(CLASSES), *grid.shape), dtype="float16", grid=grid
        ),
        "detections": SignalSpec(
            name="detections",
            shape=(MAX_DETECTIONS, DETECTION_COLUMNS),
            dtype="float32",
            ragged=True,
        ),
    }
    known |= _image_specs(model)
    if replays:
        _check_frame(model)
        known |= {
            replay.part(n): replace(known["bev"], name=replay.part(n))
            for n in range(replay.check_count(replays))
        }
        known[replay.AUGMENT] = SignalSpec(name=replay.AUGMENT, shape=(replays, 9), dtype="float32")
    return {name: known[name] for name in parts_of(check_signals(names), replays)}


def _check_frame(model: nn.Module) -> None:
    if model.grid.frame != "lidar":
        raise UsageError(
            f"{model.name} works in the ego frame, apprentices are augmented in the LIDAR frame: "
            "leave the signal replay and the modes regate and replay out"
        )


def _image_specs(model: nn.Module) -> dict[str, SignalSpec]:
    """The specs of what lies in the image planes: no grid."""
    image = model.image
    views = image.moments * len(CAMERAS)
    shapes = {
        "lift_depth": (views * image.depth_bins, *image.depth_shape),
        "lift_context": (views * model.config.context, *image.depth_shape),
        "lift_cameras": (views, 33),
        "lift_seconds": (1,),
        "pv_cameras": (len(CAMERAS), 12),
        "pv_map": (len(CAMERAS) * model.config.neck, *image.depth_shape),
    }
    return {
        name: SignalSpec(name=name, shape=shape, dtype="float16" if len(shape) == 3 else "float32")
        for name, shape in shapes.items()
    }


def _in_lidar(found: Detections, batch: Batch, row: int) -> Detections:
    """What was found in frame `row` of the batch, in the keyframe's LIDAR frame."""
    if found.frame == "lidar":
        return found
    boxes = found.boxes.detach().cpu().double().numpy()
    moved = transform(boxes, batch.ego2lidar[row].cpu().double().numpy())
    moved = torch.from_numpy(moved).to(found.boxes)
    return replace(found, boxes=moved, frame="lidar")


def detections_table(found: Detections) -> Tensor:
    """(M, 11) float32 table of a frame's detections, M at most `MAX_DETECTIONS`."""
    columns = [found.boxes, found.scores[:, None], found.labels[:, None]]
    return torch.cat([column.float() for column in columns], dim=1)[:MAX_DETECTIONS]


class LiveExpert:
    """Runs a frozen expert on its own view of the frames.

    Args:
        model: a network from `fd3d.models.build`; put in eval mode and never trained here.
        names: which signals to yield.
        mode: what the target means under augmentation, see `MODES`. In regate and replay the
            frames that it is given are augmented, and `bev` is all that it yields.
        replays: augmentations of the signal `replay`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        names: Sequence[str] = ("bev",),
        mode: str = "clean",
        replays: int = 0,
    ) -> None:
        self.mode = check_mode(mode)
        check_follows(names, mode)
        self.specs = specs(model, names, replays)
        self._replays = replays
        if mode in AUGMENTED:
            _check_frame(model)
        self.model = model.eval().requires_grad_(False)

    @property
    def grid(self) -> BEVGrid:
        return self.model.grid

    @torch.no_grad()
    def signals(self, batch: Batch) -> dict[str, Tensor | list[Tensor]]:
        """Maps as (B, C, Y, X) float32 tensors, tables as B tensors of (M, columns).

        `batch` is the expert's view: its own image size, no augmentation but that of the mode.
        """
        # A training loop that calls .train() on a parent must not wake the batch norms.
        self.model.eval()
        seen = self.model.see(batch)
        # What is wanted of the image branch alone does not need the others.
        outputs = self.model.outputs(seen, batch) if _OF_THE_MAP & set(self.specs) else None
        found: dict[str, Tensor | list[Tensor]] = {}
        if LIFT[0] in self.specs:
            found |= lift_signals(batch, seen)
        if PV[0] in self.specs:
            found |= pv_signals(batch, seen[0].pv)
        if self._replays:
            found |= replay.replay_signals(
                batch, self._replays, lambda moved: self.model(moved).bev
            )
        if "bev" in self.specs:
            found["bev"] = outputs.bev
        if "heatmap" in self.specs:
            found["heatmap"] = self.model.heatmaps(outputs.tasks)
        if "detections" in self.specs:
            decoded = self.model.decode(outputs.tasks, batch.dt)
            found["detections"] = [
                detections_table(_in_lidar(item, batch, row)) for row, item in enumerate(decoded)
            ]
        return found
