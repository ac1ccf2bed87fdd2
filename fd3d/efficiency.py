"""What a network costs: multiply-adds of one frame.

FD3D's tables count one per multiply-add; so does this. Counted are convolutions and matrix
products as they are executed (PyTorch's flop counter, halved); batch norms, activations and the
scatter into the BEV are not.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fd3d.data.batch import Batch


def blank_batch(model: nn.Module) -> Batch:
    """One frame of the size that `model` takes, zeros seen by six identical level cameras."""
    image, cameras = model.image, 6
    moments = image.moments
    focal = float(image.width)
    intrinsic = torch.tensor([[focal, 0, image.width / 2], [0, focal, image.height / 2], [0, 0, 1]])
    # Camera x right, y down, z forward becomes x right, y forward, z up.
    level = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0, -1.0, 0]])

    def each(value: torch.Tensor) -> torch.Tensor:
        return value.expand(1, moments, cameras, *value.shape).clone()

    return Batch(
        tokens=("blank",),
        images=torch.zeros(1, cameras, moments, 3, image.height, image.width),
        rots=each(level),
        trans=each(torch.zeros(3)),
        intrins=each(intrinsic),
        post_rots=each(torch.eye(3)),
        post_trans=each(torch.zeros(3)),
        dt=torch.ones(1),
    )


@torch.no_grad()
def giga_multiply_adds(model: nn.Module) -> float:
    """1e9 multiply-adds of one six-camera frame, both moments of a two-frame network included."""
    counter = FlopCounterMode(display=False)
    training = model.training
    model.eval()
    with counter:
        model(blank_batch(model))
    model.train(training)
    return counter.get_total_flops() / 2 / 1e9
