"""`heatmap`: squared error inside ground-truth Gaussians, the baseline FD3D's authors released.

The term `heatmap` is sum((A - E)^2 M^2) / sum(M) with M the class-agnostic maximum of the Gaussians
that CenterPoint draws for the ground truth, on the expert's grid. Beside it the baseline compares
the maps in the image planes channel by channel (`heatmap.pv`: `cwd` at temperature 2 without the
expert's entropy). There the expert saw the apprentice's own picture, enlarged; here it has seen its
own, and its map is brought into the apprentice's.
"""

from __future__ import annotations

from torch import Tensor, nn

from fd3d.data.batch import Batch
from fd3d.distill.align import Upsample, channel_scale, check_grids
from fd3d.distill.areas import object_gaussians
from fd3d.distill.losses.cwd import channel_divergence
from fd3d.distill.pv import AlignPV, ImagePlanes
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.network import Outputs

# Published.
WEIGHTS = {"heatmap": 0.1, "heatmap.pv": 0.25}


class Heatmap(nn.Module):
    """Squared error where objects are, the apprentice's map upsampled by a learned layer.

    Args:
        channels, grid: of the apprentice's map.
        expert_channels, expert_grid: of the expert's map; the comparison is made there.
        standardise: divide by the expert's channel sd and the number of channels, so that one
            weight serves experts of any scale; False is the released form.
        planes: the image maps, for the term in the image planes; None leaves it out.
    """

    def __init__(
        self,
        *,
        channels: int,
        grid: BEVGrid,
        expert_channels: int,
        expert_grid: BEVGrid,
        standardise: bool = False,
        planes: ImagePlanes | None = None,
    ) -> None:
        super().__init__()
        ratio = check_grids(grid, expert_grid)
        self.grid = expert_grid
        self.standardise = standardise
        self.align = Upsample(channels=channels, expert_channels=expert_channels, ratio=ratio)
        self.align_pv = AlignPV(planes) if planes else None

    def forward(
        self, apprentice: Outputs, expert: dict[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Term `heatmap`, unweighted; zero, but still in the graph, where no frame has a box. And
        `heatmap.pv`, where there are planes, from the parts of the signal `pv`.

        Cells outside expert["valid"], where that is there, do not count.
        """
        target = expert["bev"].detach().float()
        error = self.align(apprentice.bev).float() - target
        valid = expert.get("valid")
        if self.standardise:
            error = error / channel_scale(target, valid) / error.shape[1] ** 0.5
        mask = object_gaussians(batch, self.grid).to(error)
        if valid is not None:
            mask = mask * valid
        terms = {"heatmap": (error.square() * mask.square()).sum() / mask.sum().clamp(min=1.0)}
        if self.align_pv is not None:
            mine, theirs, known = self.align_pv(apprentice, expert, batch)
            terms["heatmap.pv"] = channel_divergence(
                mine, theirs, valid=known, tau=2.0, entropy=False
            )
        return terms
