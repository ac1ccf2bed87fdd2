"""A pair of networks, what the expert says of two frames, and FD3D's losses for them."""

import torch

from fd3d import models
from fd3d.data.batch import collate
from fd3d.data.frames import FrameDataset
from fd3d.distill.head import DistillationHead
from fd3d.distill.head_config import HeadConfig
from fd3d.distill.losses.fd3d import FD3D, Settings
from fd3d.distill.pv import ImagePlanes
from fd3d.distill.signals import LiveExpert
from fd3d.grid import BEVGrid

EXPERT, APPRENTICE = "bevdepth-tiny-h", "bevdepth-tiny-l"
SMALL = HeadConfig(width=16, queries=12, layers=2, heads=4, points=2, hidden=24)
GRID = BEVGrid.square(half_extent=25.6, cells=64)
ALL = ("gen_bev", "gen_pv", "focal")


def make_pair(synthetic):
    """Expert and apprentice, the apprentice's batch of two frames, and the expert's signals."""
    torch.manual_seed(3)
    expert, apprentice = models.build(EXPERT).eval(), models.build(APPRENTICE)
    index = synthetic.open()
    views = [
        FrameDataset(index=index, positions=index.split("val")[:2], image=model.image, truth=truth)
        for model, truth in ((expert, False), (apprentice, True))
    ]
    signals = LiveExpert(model=expert, names=("bev", "pv", "detections")).signals(
        collate(list(views[0]))
    )
    # A network with weights from a seed finds nothing: these stand for what a trained one would.
    batch = collate(list(views[1]))
    signals["detections"] = [
        torch.cat([boxes.nan_to_num(), torch.full((len(boxes), 1), 0.8), labels[:, None]], dim=1)
        for boxes, labels in zip(batch.boxes, batch.labels, strict=True)
    ]
    return expert, apprentice, batch, signals


def make_loss(pair, *, trained=True, **settings) -> FD3D:
    """FD3D's losses for the pair, with a head whose queries are as sure as not."""
    expert, apprentice, _, _ = pair
    settings = Settings(**settings)
    torch.manual_seed(1)
    head = None
    if settings.needs_head:
        head = DistillationHead(channels=expert.bev_channels, grid=expert.grid, config=SMALL)
        head.requires_grad_(trained)
        for branch in head.classes:
            torch.nn.init.zeros_(branch.bias)
    planes = ImagePlanes(
        apprentice=apprentice.image,
        expert=expert.image,
        channels=apprentice.config.neck,
        expert_channels=expert.config.neck,
    )
    return FD3D(
        channels=apprentice.bev_channels,
        grid=apprentice.grid,
        expert_channels=expert.bev_channels,
        expert_grid=expert.grid,
        settings=settings,
        head=head,
        planes=planes if "gen_pv" in settings.terms else None,
    )
