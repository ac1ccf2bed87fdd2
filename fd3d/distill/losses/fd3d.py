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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fd3d.data.batch import Batch
from fd3d.distill.agreement import NEAR, agreement
from fd3d.distill.align import Project, channel_scale, check_grids, seen_cells, to_grid
from fd3d.distill.areas import bev_areas, cached_boxes, image_areas
from fd3d.distill.focal import focal_error
from fd3d.distill.generation import Generator, masked_error
from fd3d.distill.head import DistillationHead, HeadOutputs, decode
from fd3d.distill.matching import head_losses
from fd3d.distill.pv import AlignPV, ImagePlanes
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.network import Outputs

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
        doubt: weight of areas and queries where the expert's detections and the truth do not
            agree (see `fd3d.distill.agreement`): it has missed a thing there, or made one up.
        compare: "expert" to compare maps on the expert's grid, "apprentice" on the smaller one.
    """

    terms: tuple[str, ...] = TERMS
    areas: str = "head"
    masked: float = 0.5
    patch: int = 1
    margin: float = 0.5
    outside: float = 0.0
    min_score: float = 0.1
    doubt: float = 1.0
    compare: str = "expert"

    def __post_init__(self) -> None:
        unknown = sorted(set(self.terms) - set(TERMS))
        if unknown or not self.terms:
            raise UsageError(
                f"FD3D has no term {', '.join(map(repr, unknown or ['']))}: choose some of "
                f"{', '.join(TERMS)}"
            )
        if self.areas not in AREAS:
            raise UsageError(f"areas {self.areas!r} are not known: use one of {', '.join(AREAS)}")
        if not 0 <= self.masked < 1:
            raise UsageError(f"masked {self.masked} is not possible: use a share below 1")
        if self.patch < 1:
            raise UsageError(f"patch {self.patch} is not possible: use 1 or more cells")
        if self.outside < 0 or self.margin < 0:
            raise UsageError(
                f"outside {self.outside} and margin {self.margin} cannot both be meant: use a "
                "weight and metres from 0"
            )
        for name in ("doubt", "min_score"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(
                    f"{name} {getattr(self, name)} is not possible: use a number from 0 to 1"
                )

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
        target, valid = expert["bev"].detach().float(), seen_cells(expert)
        said = None
        if self.head is not None:
            # Without autograd where nothing would be trained by it.
            with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
                said = self.head(target)
            if self.learns:
                terms |= head_losses(said, batch, self.head.grid, valid)
        boxes = self._boxes(said, expert, batch)
        agreed = None if self.settings.doubt == 1 else self._agreed(expert, batch)
        if {"gen_bev", "focal"} & set(self.settings.terms):
            aligned = self.align(apprentice.bev)
            if "gen_bev" in self.settings.terms:
                terms["gen_bev"] = self._gen_bev(aligned, target, valid, boxes, agreed)
            if "focal" in self.settings.terms:
                terms["focal"] = focal_error(
                    aligned,
                    target,
                    valid=valid,
                    head=self.head,
                    said=said,
                    trust=self._trust(said, agreed),
                )
        if "gen_pv" in self.settings.terms:
            terms["gen_pv"] = self._gen_pv(apprentice, expert, batch, boxes, agreed)
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

    def _agreed(self, expert: dict[str, Tensor], batch: Batch) -> list[Tensor]:
        """B x (K, 2): centres of the true boxes that a cached detection agrees with."""
        tables = [table[table[:, 9] >= self.settings.min_score] for table in expert["detections"]]
        found = cached_boxes(tables, batch, grid=self.grid)
        kept = []
        for row, table in enumerate(tables):
            truth = batch.boxes[row]
            said = agreement(found[row], table[:, 9], table[:, 10], truth, batch.labels[row])
            kept.append(truth[said.truth][:, :2].float())
        return kept

    def _trust(self, said: HeadOutputs, agreed: Sequence[Tensor] | None) -> Sequence[Tensor]:
        """(B, Q) of each layer: `doubt` for queries whose box is at no agreed one, else 1."""
        if agreed is None:
            return [torch.ones_like(logits[..., 0]) for logits in said.logits]
        boxes = [decode(codes.detach(), self.head.grid) for codes in said.codes]
        near = [torch.stack(list(map(_near, layer, agreed))) for layer in boxes]
        return [torch.where(row, 1.0, self.settings.doubt) for row in near]

    def _gen_bev(
        self,
        aligned: Tensor,
        target: Tensor,
        valid: Tensor,
        boxes: Sequence[Tensor],
        agreed: Sequence[Tensor] | None,
    ) -> Tensor:
        # A cell that averages unseen ones is not known.
        known = to_grid(valid.float(), self.grid.shape) > 1 - 1e-6
        maps = (aligned, to_grid(target, self.grid.shape), known)
        draw = partial(bev_areas, grid=self.grid, margin=self.settings.margin)
        return self._generation(maps, boxes, agreed, draw, self.generate)

    def _gen_pv(
        self,
        apprentice: Outputs,
        expert: dict[str, Tensor],
        batch: Batch,
        boxes: Sequence[Tensor],
        agreed: Sequence[Tensor] | None,
    ) -> Tensor:
        maps = self.align_pv(apprentice, expert, batch)
        image, shape = self.align_pv.planes.apprentice, self.align_pv.shape
        draw = partial(image_areas, batch=batch, image=image, shape=shape)
        return self._generation(maps, boxes, agreed, draw, self.generate_pv)

    def _generation(
        self,
        maps: tuple[Tensor, Tensor, Tensor],
        boxes: Sequence[Tensor],
        agreed: Sequence[Tensor] | None,
        draw: Callable[[Sequence[Tensor]], Tensor],
        generator: Generator,
    ) -> Tensor:
        """Masked generation on `maps`, the apprentice's, the expert's and where that is known, in
        the areas that `draw` makes of boxes. A cell in them weighs one, or `doubt` where no agreed
        box is near, another `outside`."""
        aligned, target, known = maps
        area = draw(boxes)
        inside = torch.ones_like(area, dtype=torch.float32)
        if agreed is not None:
            pairs = zip(boxes, agreed, strict=True)
            sure = [frame[_near(frame, centres)] for frame, centres in pairs]
            inside = torch.where(draw(sure), 1.0, self.settings.doubt)
        return masked_error(
            aligned,
            target,
            area=area,
            counted=torch.where(area, inside, self.settings.outside) * known,
            scale=channel_scale(target, known),
            generator=generator,
            masked=self.settings.masked,
            patch=self.settings.patch,
        )


def _near(boxes: Tensor, centres: Tensor) -> Tensor:
    """(M,) bool: boxes (M, 9) within `NEAR` metres of one of the centres (K, 2)."""
    return (torch.cdist(boxes[:, :2].float(), centres) <= NEAR).any(dim=1)
