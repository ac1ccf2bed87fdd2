"""The mode `relift`: an expert's map under a BEV augmentation, from its factors (`lift`)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fd3d.data.batch import Batch, Rig
from fd3d.distill.lift import rig_of
from fd3d.distill.signals import SignalSpec, specs
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.network import BEVDepth
from fd3d.models.precision import full_precision

# Two data sets that mean one adjacent frame agree on its distance to the microsecond.
_SAME_SECONDS = 1e-3


class Relift:
    """From the parts of `lift` to the expert's map, under the apprentice's BEV augmentation.

    Args:
        model: the expert; of its weights only those behind the splat are used, see
            `fd3d.distill.bev_part`.
    """

    def __init__(self, model: BEVDepth) -> None:
        self.model = model.eval().requires_grad_(False)

    @property
    def grid(self) -> BEVGrid:
        return self.model.grid

    @property
    def specs(self) -> dict[str, SignalSpec]:
        return specs(self.model, ("bev",))

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
        rig = rig_of(found["lift_cameras"].float(), self.model.image.moments)
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
