"""The signal `lift`: what a BEVDepth expert knows before it splats, and how that becomes its map.

A map behind a convolution cannot be moved by a BEV augmentation without error: the convolutions
would have answered the moved input otherwise. The factors can. Depth probabilities and context lie
in the image planes, so a rotation, scale or flip of the ground acts on the cameras' poses alone,
and splatting, alignment and the BEV encoder run again behind it (`Relift`). The depth branch is not
asked again: it was told the un-augmented cameras, which is the definition of the mode `relift`.

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
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fd3d.data.batch import Batch, Rig
from fd3d.errors import UsageError
from fd3d.models.precision import full_precision

if TYPE_CHECKING:
    from fd3d.models.bevdepth.network import BEVDepth

# Two data sets that mean one adjacent frame agree on its distance to the microsecond.
_SAME_SECONDS = 1e-3

_SHAPES = {
    "intrins": (3, 3),
    "post_rots": (3, 3),
    "post_trans": (3,),
    "rots": (3, 3),
    "trans": (3,),
}


def lift_signals(batch: Batch, seen: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The parts of `lift` for B frames, float32, with the batch as their first axis.

    `seen` are the depth logits and context of every moment, from `BEVDepth.see`.
    """
    depth, context = zip(*seen, strict=True)
    return {
        "lift_depth": _joined([logits.float().softmax(dim=1).sqrt() for logits in depth], batch),
        "lift_context": _joined([value.float() for value in context], batch),
        "lift_cameras": torch.cat(
            [getattr(batch, name).flatten(1, 2).flatten(2) for name in _SHAPES], dim=2
        ),
        "lift_seconds": batch.dt[:, None],
    }


class Relift:
    """From the parts of `lift` to the expert's map, under the apprentice's BEV augmentation.

    Args:
        model: the expert; of its weights only those behind the splat are used, see
            `fd3d.distill.bev_part`.
    """

    def __init__(self, model: BEVDepth) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, found: dict[str, Tensor], frames: Batch | None = None) -> Tensor:
        """(B, C, Y, X) float32 on the device of the parts.

        Args:
            found: the parts, (B, ...) each.
            frames: the apprentice's view of the same frames, whose `bev_augment` is applied and
                whose adjacent frames must be the expert's; None = no augmentation.

        Frames with another adjacent moment, and an expert in the ego frame under an augmentation
        of the LIDAR frame, raise `UsageError`.
        """
        # A training loop that calls .train() on a parent must not wake the batch norms.
        self.model.eval()
        depth = self._moments(found["lift_depth"].float().square(), self.model.image.depth_bins)
        context = self._moments(found["lift_context"].float(), self.model.config.context)
        rig = self._rig(found["lift_cameras"].float())
        if frames is not None:
            self._check(found["lift_seconds"], frames)
            rig = _augmented(rig, frames.bev_augment)
        with full_precision(context[0]):
            return self.model.assemble(list(zip(depth, context, strict=True)), rig)

    def _moments(self, joined: Tensor, channels: int) -> tuple[Tensor, ...]:
        """(B, T * N * c, h, w) to T of (B * N, c, h, w)."""
        moments = self.model.image.moments
        apart = joined.unflatten(1, (moments, -1, channels))
        return tuple(apart[:, moment].flatten(0, 1) for moment in range(moments))

    def _rig(self, numbers: Tensor) -> Rig:
        apart = numbers.unflatten(1, (self.model.image.moments, -1))
        fields, start = {}, 0
        for name, shape in _SHAPES.items():
            count = torch.Size(shape).numel()
            fields[name] = apart[..., start : start + count].unflatten(3, shape)
            start += count
        return Rig(**fields)

    def _check(self, seconds: Tensor, frames: Batch) -> None:
        apart = (seconds[:, 0].cpu() - frames.dt.cpu()).abs().max()
        if self.model.image.moments > 1 and apart > _SAME_SECONDS:
            raise UsageError(
                f"the apprentice's adjacent frame lies {apart:.3f} s from the expert's: choose it "
                "by the test rule in both"
            )
        if self.model.grid.frame == "lidar" or frames.bev_augment is None:
            return
        if not torch.equal(frames.bev_augment.cpu(), torch.eye(3).expand(len(frames), 3, 3)):
            raise UsageError(
                f"{self.model.name} works in the ego frame and the augmentation is one of the "
                "LIDAR frame: leave the BEV augmentation out"
            )


def _joined(moments: list[Tensor], batch: Batch) -> Tensor:
    """T of (B * N, c, h, w) to (B, T * N * c, h, w)."""
    apart = [value.unflatten(0, (len(batch), -1)) for value in moments]
    return torch.stack(apart, dim=1).flatten(1, 3)


def _augmented(rig: Rig, augment: Tensor | None) -> Rig:
    if augment is None:
        return rig
    augment = augment.to(rig.rots)
    with full_precision(rig.rots):
        turn = augment[:, None, None]
        return replace(
            rig,
            rots=turn @ rig.rots,
            trans=(turn @ rig.trans[..., None])[..., 0],
            bev_augment=augment,
        )
