"""Random maps, and batches of boxes without pictures, for the distillation losses."""

import torch

from fd3d.data.batch import Batch
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.network import Outputs

SMALL = BEVGrid.square(half_extent=51.2, cells=16)
LARGE = BEVGrid.square(half_extent=51.2, cells=32)
CAR = [8.0, 12.0, 0.0, 1.9, 4.6, 1.7, 0.3, 0.0, 0.0]
FAR = [500.0, 12.0, 0.0, 1.9, 4.6, 1.7, 0.3, 0.0, 0.0]


def batch_with(boxes: list[list[list[float]]]) -> Batch:
    """A batch whose frames hold these boxes, all of class 0; no images are needed here."""
    empty = torch.zeros(len(boxes), 2, 6, 3)
    matrices = torch.eye(3).expand(len(boxes), 2, 6, 3, 3)
    return Batch(
        tokens=tuple(str(i) for i in range(len(boxes))),
        images=torch.zeros(len(boxes), 6, 2, 3, 4, 4),
        rots=matrices,
        trans=empty,
        intrins=matrices,
        post_rots=matrices,
        post_trans=empty,
        dt=torch.ones(len(boxes)),
        boxes=tuple(torch.tensor(b, dtype=torch.float32).reshape(-1, 9) for b in boxes),
        labels=tuple(torch.zeros(len(b), dtype=torch.int64) for b in boxes),
    )


def seen(bev: torch.Tensor, tasks: tuple = ()) -> Outputs:
    """An apprentice's outputs of which the distillers under test look at the map, and the head's
    maps where they are given."""
    return Outputs(depth_logits=bev, bev=bev, shared=bev, tasks=tasks, pv=bev)


def maps(frames: int, seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """An apprentice's map of 4 channels on SMALL, and an expert's of 6 on LARGE."""
    generator = torch.Generator().manual_seed(seed)
    apprentice = torch.randn(frames, 4, 16, 16, generator=generator, requires_grad=True)
    return apprentice, {"bev": torch.randn(frames, 6, 32, 32, generator=generator) * 3 + 1}
