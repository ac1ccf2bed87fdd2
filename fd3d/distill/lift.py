"""The signal `lift`: what a BEVDepth expert knows before it splats, and how that becomes its map.

A map behind a convolution cannot be moved by a BEV augmentation without error: the convolutions
would have answered the moved input otherwise. The factors can. Depth probabilities and context lie
in the image planes, so a rotation, scale or flip of the ground acts on the cameras' poses alone,
and splatting, alignment and the BEV encoder run again behind it (`fd3d.distill.relift`). The depth
branch is not asked again: it was told the un-augmented cameras, which is the definition of the mode
`relift`.

The signal is stored in four parts, T moments (0 = the keyframe) and N cameras joined to channels:

    lift_depth    (T * N * D, h, w)  square roots of the depth probabilities
    lift_context  (T * N * C, h, w)
    lift_cameras  (T * N, 33)        K, post_rots, post_trans, rots, trans of `Batch`
    lift_seconds  (1,)               to the first adjacent moment

The square root lets equal steps be fine where a probability is small: a far cell gets little mass
from many bins, and steps that suit the peaks would lose it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fd3d.data.batch import Batch, Rig
from fd3d.models.bevdepth.network import Seen

# In the order of the columns of `lift_cameras`.
_SHAPES = {
    "intrins": (3, 3),
    "post_rots": (3, 3),
    "post_trans": (3,),
    "rots": (3, 3),
    "trans": (3,),
}


def lift_signals(batch: Batch, seen: Sequence[Seen]) -> dict[str, Tensor]:
    """The parts of `lift` for B frames, float32, with the batch as their first axis.

    `seen` is what `BEVDepth.see` gave for them.
    """
    roots = [one.depth_logits.float().softmax(dim=1).sqrt() for one in seen]
    return {
        "lift_depth": _joined(roots, batch),
        "lift_context": _joined([one.context.float() for one in seen], batch),
        "lift_cameras": torch.cat(
            [getattr(batch, name).flatten(1, 2).flatten(2) for name in _SHAPES], dim=2
        ),
        "lift_seconds": batch.dt[:, None],
    }


def rig_of(cameras: Tensor, moments: int) -> Rig:
    """The geometry in `lift_cameras`, (B, T * N, 33)."""
    apart = cameras.unflatten(1, (moments, -1))
    fields, start = {}, 0
    for name, shape in _SHAPES.items():
        count = torch.Size(shape).numel()
        fields[name] = apart[..., start : start + count].unflatten(3, shape)
        start += count
    return Rig(**fields)


def _joined(moments: list[Tensor], batch: Batch) -> Tensor:
    """T of (B * N, c, h, w) to (B, T * N * c, h, w)."""
    apart = [value.unflatten(0, (len(batch), -1)) for value in moments]
    return torch.stack(apart, dim=1).flatten(1, 3)
