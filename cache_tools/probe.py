"""What the modes of a target cost: each against the expert run anew on the augmented frame.

Under a BEV augmentation an expert that is run in every step (`regate`) is told the augmented
cameras: its depth branch, its splat and all that follows answer to them. Cached signals answer to
less, see `fd3d.distill.lift`. How far they are apart is measured here on the expert's own map and
on the boxes that its head reads from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache_tools.codecs import decode, encode, error_of
from cache_tools.expert import ExpertRun, spread
from cache_tools.presets import codec_for
from fd3d.augment import BEVAugmentation
from fd3d.boxes import VX, VY, YAW, wrap_angle
from fd3d.data.batch import Detections
from fd3d.distill.handover import dead_workers_told
from fd3d.distill.lift import lift_signals
from fd3d.distill.relift import Relift
from fd3d.distill.replay import augmented
from fd3d.distill.signals import specs
from fd3d.errors import UsageError
from fd3d.progress import Progress
from fd3d.resample import resample

AUGMENTATIONS = {
    "none": BEVAugmentation(),
    "flip y": BEVAugmentation(flip_y=True),
    "flip x": BEVAugmentation(flip_x=True),
    "rotation 10 deg": BEVAugmentation(rotate=np.deg2rad(10)),
    "rotation 22.5 deg": BEVAugmentation(rotate=np.deg2rad(22.5)),
    "scale 1.05": BEVAugmentation(scale=1.05),
    "all": BEVAugmentation(rotate=np.deg2rad(-15), scale=0.95, flip_y=True),
}
MODES = ("clean", "moved", "relift", "relift, balanced")

# Of the yardstick's boxes the best so many of each frame are looked for, within so many metres.
_BOXES = 30
_NEAR = 2.0


@dataclass(frozen=True, kw_only=True)
class ModeCost:
    """A mode under one augmentation, against `regate`, mean over frames.

    error: relative L2 of the map, channel means removed; cosine: of the maps as they are. found:
    share of the yardstick's boxes with one of their class within 2 m, and of those the mean
    distance in metres, yaw in degrees and velocity in m/s. NaN where nothing was found.
    """

    error: float
    cosine: float
    found: float
    distance: float
    yaw: float
    velocity: float


@torch.no_grad()
def probe(run: ExpertRun, *, count: int, quiet: bool = True) -> dict[str, dict[str, ModeCost]]:
    """Augmentation -> mode -> its cost, over `count` frames spread over the split."""
    if not 1 <= count <= len(run.keys):
        raise UsageError(f"--frames {count} is not possible: use 1 to {len(run.keys)}")
    model = run.live.model
    if model.grid.frame != "lidar":
        raise UsageError(
            f"{model.name} works in the ego frame, and BEV augmentations are of the LIDAR frame: "
            "there is no mode to choose for it"
        )
    rows = [[row] for row in spread(len(run.keys), count)]
    found: dict[str, dict[str, list[ModeCost]]] = {
        name: {mode: [] for mode in MODES} for name in AUGMENTATIONS
    }
    with (
        dead_workers_told(),
        Progress(total=count, unit="frames", title="probing", quiet=quiet) as progress,
    ):
        for batch in run.load(rows):
            clean = batch.to(run.device)
            seen = model.see(clean)
            bev = model.outputs(seen, clean).bev
            factors = lift_signals(clean, seen)
            coarser = _balanced(run, factors)
            for name, augmentation in AUGMENTATIONS.items():
                moved = augmented(clean, torch.from_numpy(augmentation.matrix()[:3, :3]))
                yardstick = model(moved)
                wanted = model.decode(yardstick.tasks, moved.dt)[0]
                targets = {
                    "clean": bev,
                    "moved": _moved(bev, augmentation, model.grid),
                    "relift": Relift(model)(factors, moved),
                    "relift, balanced": Relift(model)(coarser, moved),
                }
                for mode, target in targets.items():
                    boxes = model.decode(model.head(target), moved.dt)[0]
                    cost = _cost(yardstick.bev, target, wanted, boxes)
                    found[name][mode].append(cost)
            progress.advance(1)
    return {
        name: {mode: _mean(costs) for mode, costs in modes.items()} for name, modes in found.items()
    }


def _moved(bev: Tensor, augmentation: BEVAugmentation, grid) -> Tensor:
    matrix = np.tile(augmentation.matrix(), (len(bev), 1, 1))
    return resample(bev.cpu(), from_grid=grid, to_grid=grid, matrix=matrix)[0].to(bev)


def _balanced(run: ExpertRun, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors as a cache of preset balanced gives them back."""
    found = {}
    for name, spec in specs(run.live.model, ("lift",)).items():
        codec = codec_for(spec, "balanced")
        values = []
        for value in factors[name].cpu().numpy():
            stored, _ = encode(value, spec=spec, codec=codec, frame="probed")
            values.append(torch.from_numpy(decode(stored, spec=spec, codec=codec)).float())
        found[name] = torch.stack(values).to(factors[name].device)
    return found


def _cost(wanted: Tensor, target: Tensor, boxes: Detections, others: Detections) -> ModeCost:
    maps = [value[0].float().cpu().numpy() for value in (wanted, target)]
    cosine = torch.nn.functional.cosine_similarity(wanted.flatten(), target.flatten(), dim=0)
    best = boxes.scores.argsort(descending=True)[:_BOXES]
    yardstick, labels = boxes.boxes[best].cpu().numpy(), boxes.labels[best].cpu().numpy()
    mine, classes = others.boxes.cpu().numpy(), others.labels.cpu().numpy()
    pairs = []
    for box, label in zip(yardstick, labels, strict=True):
        far = np.hypot(*(mine[:, :2] - box[:2]).T) + np.where(classes == label, 0, np.inf)
        if len(far) and far.min() <= _NEAR:
            pairs.append((far.min(), box, mine[far.argmin()]))
    nothing = float("nan")
    return ModeCost(
        error=error_of(*maps).frame,
        cosine=float(cosine),
        found=len(pairs) / len(best) if len(best) else nothing,
        distance=float(np.mean([far for far, _, _ in pairs])) if pairs else nothing,
        yaw=_degrees([wrap_angle(b[YAW] - a[YAW]) for _, a, b in pairs]),
        velocity=float(
            np.mean([np.hypot(*(b - a)[VX : VY + 1]) for _, a, b in pairs]) if pairs else nothing
        ),
    )


def _degrees(angles: Sequence[float]) -> float:
    return float(np.rad2deg(np.abs(angles)).mean()) if len(angles) else float("nan")


def _mean(costs: Sequence[ModeCost]) -> ModeCost:
    names = ("error", "cosine", "found", "distance", "yaw", "velocity")
    means = {}
    for name in names:
        values = [value for cost in costs if not np.isnan(value := getattr(cost, name))]
        means[name] = float(np.mean(values)) if values else float("nan")
    return ModeCost(**means)
