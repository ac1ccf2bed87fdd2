"""FD3D, reconstructed: what counts is distilled, as areas and as positions.

The authors published the structure, not the formulas nor weights; docs/distillation.md says what is
theirs and what is ours. Four parts, each a named, unweighted term that can be left out:

    gen_bev   masked generation of the expert's BEV map inside instance areas
    gen_pv    the same in the image planes, from the signal `pv`
    focal     what each decoder layer of the distillation head samples from the expert's map against
              the same places and weights on the apprentice's
    head.*    the head's own training on the ground truth, where it is trained jointly

The instance areas are the boxes of the head's queries, of the ground truth, or of the expert's
cached detections. Nothing flows back into the expert; into the head only its own terms do: places,
weights and the value projection are constants of `focal`, so that the pair cannot agree on nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fd3d.data.batch import Batch
from fd3d.distill.agreement import NEAR, agreement
from fd3d.distill.align import Project, channel_scale, check_grids, seen_cells, to_grid
from fd3d.distill.areas import bev_areas, cached_boxes, image_areas
from fd3d.distill.generation import Generator, masked_error
from fd3d.distill.head import DistillationHead, HeadOutputs, Sampled, decode, sample
from fd3d.distill.matching import head_losses
from fd3d.distill.pv import AlignPV, ImagePlanes
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.network import Outputs
from fd3d.models.precision import full_precision

AREAS = ("head", "gt", "expert")
TERMS = ("gen_bev", "gen_pv", "focal")

# Weights of the terms; ours, by benchmarks/gain.py on its tuning set.
WEIGHTS = {"gen_bev": 6.0, "gen_pv": 3.0, "focal": 3.0}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What may differ between two uses of the method.

    Args:
        terms: which of `TERMS` to compute.
        areas: whose boxes are the instance areas, see `AREAS`.
        masked, patch: share of the areas that is blanked, in squares of so many cells.
        margin: metres by which BEV areas are wider on every side.
        outside: weight of cells outside the areas, which are never blanked.
        min_score: of a query or a cached detection whose box is an area.
        doubt: weight of areas where the expert's detections and the truth do not agree (see
            `fd3d.distill.agreement`): it has missed a thing there, or made one up.
        compare: "expert" to compare maps on the expert's grid, "apprentice" on the smaller one.
    """

    terms: tuple[str, ...] = ("gen_bev", "focal")
    areas: str = "head"
    masked: float = 0.5
    patch: int = 1
    margin: float = 0.5
    outside: float = 0.0
    min_score: float = 0.1
    doubt: float = 1.0
    compare: str = "expert"

    def __post_init__(self) -> None:
        if not self.terms or set(self.terms) - set(TERMS):
            raise UsageError(f"FD3D's terms are {', '.join(TERMS)}: choose some of them")
        if self.areas not in AREAS:
            raise UsageError(f"areas {self.areas!r} are not known: use one of {', '.join(AREAS)}")
        if not 0 <= self.masked < 1 or self.patch < 1 or self.outside < 0:
            raise UsageError(f"{self}: masked is a share below 1, patch 1 or more, outside from 0")
        if not 0 <= self.doubt <= 1:
            raise UsageError(f"doubt {self.doubt} is not possible: use a share from 0 to 1")

    @property
    def signals(self) -> tuple[str, ...]:
        """What the expert's source has to yield."""
        found = ["bev"]
        found += ["pv"] if "gen_pv" in self.terms else []
        found += ["detections"] if self.areas == "expert" or self.doubt < 1 else []
        return tuple(found)

    @property
    def needs_head(self) -> bool:
        """Whether there is a use for a distillation head."""
        return self.areas == "head" or "focal" in self.terms


class FD3D(nn.Module):
    """FD3D's losses and what is trained for them.

    Args:
        channels, grid: of the apprentice's map.
        expert_channels, expert_grid: of the expert's map.
        settings: see `Settings`.
        head: the distillation head on the expert's grid; None where nothing needs one. One whose
            parameters need no gradient is used as it is, another is trained along.
        planes: the image maps, for the term gen_pv.
    """

    def __init__(
        self,
        *,
        channels: int,
        grid: BEVGrid,
        expert_channels: int,
        expert_grid: BEVGrid,
        settings: Settings,
        head: DistillationHead | None = None,
        planes: ImagePlanes | None = None,
    ) -> None:
        super().__init__()
        check_grids(grid, expert_grid)
        if settings.needs_head != (head is not None):
            raise UsageError(
                "FD3D needs a distillation head for areas of queries and for the term focal, and "
                "for nothing else: give one just then"
            )
        if ("gen_pv" in settings.terms) != (planes is not None):
            raise UsageError("FD3D needs the image planes for the term gen_pv: give them just then")
        self.settings = settings
        self.grid = expert_grid if settings.compare == "expert" else grid
        # Only what the terms use: data-parallel training needs a gradient for every parameter.
        if {"gen_bev", "focal"} & set(settings.terms):
            self.align = Project(
                channels=channels, expert_channels=expert_channels, shape=self.grid.shape
            )
        if "gen_bev" in settings.terms:
            self.generate = Generator(expert_channels)
        if planes is not None:
            self.align_pv = AlignPV(planes, compare=settings.compare)
            self.generate_pv = Generator(planes.expert_channels)
        self.head = head
        self.learns = head is not None and any(p.requires_grad for p in head.parameters())

    def train(self, mode: bool = True) -> FD3D:
        """As torch's, but a head that is used as it is stays in eval mode."""
        super().train(mode)
        if self.head is not None and not self.learns:
            self.head.eval()
        return self

    def forward(
        self, apprentice: Outputs, expert: dict[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The terms of the settings, unweighted; "head.class" and "head.box" where it learns.

        Args:
            apprentice: its `bev` and, for gen_pv, `pv`.
            expert: "bev" (B, C, Ye, Xe), "valid" (B, 1, Ye, Xe) bool where not all of it counts,
                the parts of `pv` and "detections" where the settings need them.
            batch: boxes and labels, and the apprentice's cameras.
        """
        terms: dict[str, Tensor] = {}
        target = expert["bev"].detach().float()
        said = None
        if self.head is not None:
            # Without autograd where nothing would be trained by it.
            with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
                said = self.head(target)
            if self.learns:
                terms |= head_losses(said, batch, self.head.grid)
        boxes = self._boxes(said, expert, batch)
        sure = self._sure(boxes, expert, batch)
        valid = seen_cells(expert)
        if {"gen_bev", "focal"} & set(self.settings.terms):
            aligned = self.align(apprentice.bev)
            if "gen_bev" in self.settings.terms:
                terms["gen_bev"] = self._gen_bev(aligned, target, valid, boxes, sure)
            if "focal" in self.settings.terms:
                terms["focal"] = self._focal(aligned, target, valid, said)
        if "gen_pv" in self.settings.terms:
            terms["gen_pv"] = self._gen_pv(apprentice, expert, batch, boxes, sure)
        return terms

    def _boxes(
        self, said: HeadOutputs | None, expert: dict[str, Tensor], batch: Batch
    ) -> Sequence[Tensor]:
        """B x (M, 9): whose places are the instance areas."""
        least = self.settings.min_score
        if self.settings.areas == "gt":
            return batch.boxes
        if self.settings.areas == "expert":
            tables = [table[table[:, 9] >= least] for table in expert["detections"]]
            return cached_boxes(tables, batch, grid=self.grid)
        found = decode(said.codes[-1].detach(), self.head.grid)
        sure = said.logits[-1].detach().sigmoid().amax(dim=-1) >= least
        return [frame[row] for frame, row in zip(found, sure, strict=True)]

    def _sure(
        self, boxes: Sequence[Tensor], expert: dict[str, Tensor], batch: Batch
    ) -> Sequence[Tensor]:
        """Those of the boxes that lie at a true box which a cached detection agrees with."""
        if self.settings.doubt == 1:
            return boxes
        tables = [table[table[:, 9] >= self.settings.min_score] for table in expert["detections"]]
        found = cached_boxes(tables, batch, grid=self.grid)
        kept = []
        for row, table in enumerate(tables):
            truth = batch.boxes[row]
            said = agreement(found[row], table[:, 9], table[:, 10], truth, batch.labels[row])
            apart = torch.cdist(boxes[row][:, :2].float(), truth[said.truth][:, :2].float())
            kept.append(boxes[row][(apart <= NEAR).any(dim=1)])
        return kept

    def _counted(self, area: Tensor, sure: Tensor, known: Tensor) -> Tensor:
        """The weights of cells: one, `doubt`, `outside`, and nothing where the expert saw none."""
        inside = torch.where(sure, 1.0, self.settings.doubt)
        return torch.where(area, inside, self.settings.outside) * known

    def _gen_bev(
        self,
        aligned: Tensor,
        target: Tensor,
        valid: Tensor,
        boxes: Sequence[Tensor],
        sure: Sequence[Tensor],
    ) -> Tensor:
        target = to_grid(target, self.grid.shape)
        # A cell that averages unseen ones is not known.
        known = to_grid(valid.float(), self.grid.shape) > 1 - 1e-6
        area, trusted = (
            bev_areas(each, grid=self.grid, margin=self.settings.margin) for each in (boxes, sure)
        )
        return masked_error(
            aligned,
            target,
            area=area,
            counted=self._counted(area, trusted, known),
            scale=channel_scale(target, known),
            generator=self.generate,
            masked=self.settings.masked,
            patch=self.settings.patch,
        )

    def _gen_pv(
        self,
        apprentice: Outputs,
        expert: dict[str, Tensor],
        batch: Batch,
        boxes: Sequence[Tensor],
        sure: Sequence[Tensor],
    ) -> Tensor:
        aligned, target, known = self.align_pv(apprentice, expert, batch)
        image, shape = self.align_pv.planes.apprentice, self.align_pv.shape
        area, trusted = (
            image_areas(each, batch=batch, image=image, shape=shape) for each in (boxes, sure)
        )
        return masked_error(
            aligned,
            target,
            area=area,
            counted=self._counted(area, trusted, known),
            scale=channel_scale(target, known),
            generator=self.generate_pv,
            masked=self.settings.masked,
            patch=self.settings.patch,
        )

    def _focal(self, aligned: Tensor, target: Tensor, valid: Tensor, said: HeadOutputs) -> Tensor:
        """sum over layers and queries of c |s_A - s_E|^2 / max(1, sum c), |.|^2 the mean over
        channels in units of s_E's deviation; c the best class score where the expert saw."""
        slope, offset = self._norm(target)
        total, counts = aligned.sum() * 0.0, aligned.new_zeros(())
        with full_precision(aligned):
            aligned = aligned.float()
            for layer, logits, seen in zip(
                self.head.layers, said.logits, said.sampled, strict=True
            ):
                # The head's norm and its projection are one linear map.
                matrix = layer.look.value.weight.detach()
                bias = matrix @ offset + layer.look.value.bias.detach()
                how = (seen.places.detach(), seen.weights.detach(), matrix * slope, bias)
                with torch.no_grad():
                    # Not `seen.values`: both maps go one way, whose rounding then cancels.
                    wanted = sample(target, *how)
                    known = _known(valid, seen)
                    count = logits.detach().sigmoid().amax(dim=-1) * known
                    scale = _deviation(wanted[known])
                error = ((sample(aligned, *how) - wanted) / scale).square().mean(dim=-1)
                total = total + (error * count).sum()
                counts = counts + count.sum()
        return total / counts.clamp(min=1.0)

    def _norm(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """(C,) factors and offsets by which the head has just normalised the expert's map."""
        norm = self.head.norm
        if norm.training:
            var, mean = torch.var_mean(target, dim=(0, 2, 3), correction=0)
        else:
            var, mean = norm.running_var, norm.running_mean
        slope = norm.weight / (var + norm.eps).sqrt()
        return slope.detach(), (norm.bias - mean * slope).detach()


def _deviation(values: Tensor) -> Tensor:
    """(width,) standard deviations of (K, width); ones where there are too few."""
    if len(values) < 2:
        return values.new_ones(values.shape[1])
    return values.std(dim=0).clamp(min=1e-6)


def _known(valid: Tensor, seen: Sampled) -> Tensor:
    """(B, Q) bool: queries none of whose places read from a cell that does not count."""
    where = (2 * seen.places.detach() - 1).flatten(2, 3)  # (B, Q, heads * points, 2)
    unseen = functional.grid_sample((~valid).float(), where, align_corners=False)
    return unseen[:, 0].amax(dim=-1) < 1e-6
