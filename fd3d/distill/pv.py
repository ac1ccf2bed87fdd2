"""The signal `pv`: an expert's map in the image planes, and its way into an apprentice's.

The two networks see a camera through two crops and scales, the apprentice's drawn anew in each step
under image augmentation. Both are affine maps of the stored picture, so one composed with the
inverse of the other leads from a cell of the apprentice's image plane to the expert's.

The signal is stored in two parts, N cameras joined to channels:

    pv_map      (N * C, h, w)  the image neck's output for the keyframe
    pv_cameras  (N, 12)        post_rots and post_trans of `Batch`, by which it was seen
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fd3d.data.batch import Batch
from fd3d.data.images import ImageSpec
from fd3d.models.bevdepth.network import Outputs
from fd3d.models.precision import full_precision

# How far beyond the outermost cells a place still counts as seen, in cells.
_EDGE = 1e-3


@dataclass(frozen=True, kw_only=True)
class ImagePlanes:
    """The two networks' image maps: their preprocessing and their channels."""

    apprentice: ImageSpec
    expert: ImageSpec
    channels: int
    expert_channels: int


class AlignPV(nn.Module):
    """The two networks' image maps made comparable: the apprentice's channels by a trained 1x1
    convolution, the expert's place by `move_pv`.

    Args:
        planes: the two networks' image maps.
        compare: "expert" to compare at the density of the expert's cells, "apprentice" at that of
            the apprentice's.
    """

    def __init__(self, planes: ImagePlanes, *, compare: str = "expert") -> None:
        super().__init__()
        self.planes = planes
        image = planes.expert if compare == "expert" else planes.apprentice
        self.shape = image.depth_shape
        self.project = nn.Conv2d(planes.channels, planes.expert_channels, 1)

    def forward(
        self, apprentice: Outputs, expert: dict[str, Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The apprentice's maps and the expert's (B * N, C, h, w), float32, over the apprentice's
        pictures, and (B * N, 1, h, w) bool: what the expert saw. The expert's are constants."""
        target, known = move_pv(
            expert,
            batch,
            expert=self.planes.expert,
            apprentice=self.planes.apprentice,
            shape=self.shape,
        )
        aligned = self.project(apprentice.pv).float()
        if aligned.shape[-2:] != target.shape[-2:]:
            # The outermost cells of both lie in the picture's corners.
            aligned = functional.interpolate(
                aligned, size=self.shape, mode="bilinear", align_corners=True
            )
        return aligned, target.detach(), known


def pv_signals(batch: Batch, neck: Tensor) -> dict[str, Tensor]:
    """The parts of `pv` for B frames, float32, with the batch as their first axis, from the image
    neck's maps (B * N, C, h, w)."""
    matrices = [batch.post_rots[:, 0].flatten(2), batch.post_trans[:, 0]]
    return {
        "pv_map": neck.float().unflatten(0, (len(batch), -1)).flatten(1, 2),
        "pv_cameras": torch.cat(matrices, dim=2),
    }


def cell_pixels(image: ImageSpec, shape: tuple[int, int], device: torch.device | str) -> Tensor:
    """(h, w, 2) network pixels (u, v) of the cells of an image map of `shape` (h, w).

    Cells sit where BEVDepth's frustum puts them: on a lattice whose ends are the picture's corners.
    """
    v = torch.linspace(0, image.height - 1, shape[0], device=device)
    u = torch.linspace(0, image.width - 1, shape[1], device=device)
    row, column = torch.meshgrid(v, u, indexing="ij")
    return torch.stack([column, row], dim=-1)


def stored_pixels(batch: Batch, pixels: Tensor) -> Tensor:
    """(B, N, h, w, 2) pixels of the keyframe's stored pictures for network `pixels` (h, w, 2)."""
    with full_precision(batch.post_rots):
        turn = torch.linalg.inv(batch.post_rots[:, 0])[:, :, :2, :2]
        moved = pixels.flatten(0, 1) - batch.post_trans[:, 0, :, None, :2]
        return (moved @ turn.transpose(-1, -2)).unflatten(2, pixels.shape[:2])


def move_pv(
    found: dict[str, Tensor],
    batch: Batch,
    *,
    expert: ImageSpec,
    apprentice: ImageSpec,
    shape: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """The expert's image maps as the apprentice's cameras frame them, bilinearly.

    Args:
        found: the parts of `pv`, (B, ...) each.
        batch: the apprentice's view of the same frames.
        expert, apprentice: what the two networks take in.
        shape: (h, w) wanted over the apprentice's picture; any density.

    Returns the maps (B * N, C, h, w), and (B * N, 1, h, w) bool: what the expert saw.
    """
    maps, cameras = found["pv_map"].float(), found["pv_cameras"].float()
    cameras = cameras.unflatten(2, (4, 3))
    stored = stored_pixels(batch, cell_pixels(apprentice, shape, maps.device))
    with full_precision(maps):
        turn = cameras[:, :, :2, :2].transpose(-1, -2)
        there = stored.flatten(2, 3) @ turn + cameras[:, :, 3:, :2]
        # To the range of grid_sample, in which the outermost cells' places are -1 and 1.
        size = there.new_tensor([expert.width - 1, expert.height - 1])
        there = (2 * there / size - 1).flatten(0, 1).unflatten(1, shape)
        cells = there.new_tensor([maps.shape[-1] - 1, maps.shape[-2] - 1])
        seen = (there.abs() <= 1 + 2 * _EDGE / cells).all(dim=-1)
        split = maps.unflatten(1, (cameras.shape[1], -1)).flatten(0, 1)
        moved = functional.grid_sample(split, there, padding_mode="border", align_corners=True)
    return moved, seen[:, None]
