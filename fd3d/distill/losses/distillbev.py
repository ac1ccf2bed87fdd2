"""`distillbev`: DistillBEV (Wang et al., ICCV 2023).

Cells are apart by what the expert makes of them: those of true boxes, those where its scores say an
object that is not there (false positives), and the rest. A box counts by one over the square root
of its cells, each other region by one over its cells. Squared errors are weighted by the expert's
spatial and channel attention (temperature .5), summed over channels and cells, and divided by the
number of frames. Two more terms compare sums over what is left by a mean: of each channel over the
cells (L1), and of each cell over the channels (L1, the apprentice's behind a 3x3 convolution).

Weights of the authors' settings for a CenterPoint teacher and a BEVDepth student; that of the false
positives, which those settings leave out, is of their settings for the stronger teacher.
"""

from __future__ import annotations

from torch import Tensor, nn

from fd3d.data.batch import Batch
from fd3d.distill.align import Project, check_grids, seen_cells
from fd3d.distill.losses.fgd import attention, even_weights
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.network import Outputs

WEIGHTS = {
    "distillbev.foreground": 1.5e-3,
    "distillbev.false_positive": 6e-2,
    "distillbev.background": 4e-2,
    "distillbev.channel": 0.25,
    "distillbev.spatial": 2.5e-3,
}


class DistillBEV(nn.Module):
    """Regions by truth and by the expert's mistakes, sizes evened out, attention.

    Args:
        channels, grid: of the apprentice's map.
        expert_channels, expert_grid: of the expert's map; the comparison is made there.
        threshold: score from which the expert says an object. temperature: of the attention.
    """

    def __init__(
        self,
        *,
        channels: int,
        grid: BEVGrid,
        expert_channels: int,
        expert_grid: BEVGrid,
        threshold: float = 0.1,
        temperature: float = 0.5,
    ) -> None:
        super().__init__()
        check_grids(grid, expert_grid)
        self.grid, self.threshold, self.temperature = expert_grid, threshold, temperature
        self.align = Project(
            channels=channels, expert_channels=expert_channels, shape=expert_grid.shape
        )
        self.align_spatial = nn.Conv2d(1, 1, 3, padding=1)

    def forward(
        self, apprentice: Outputs, expert: dict[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """The terms of `WEIGHTS`, unweighted; needs the signals bev and heatmap (scores)."""
        mine, theirs = self.align(apprentice.bev).float(), expert["bev"].detach().float()
        valid = seen_cells(expert)
        mine, theirs = mine * valid, theirs * valid
        where, which = attention(theirs, self.temperature)
        error = ((mine - theirs).square() * where * which).sum(dim=1, keepdim=True)
        fg = even_weights(batch.boxes, self.grid, power=0.5).to(error)
        said = expert["heatmap"].amax(dim=1, keepdim=True) >= self.threshold
        empty = (fg == 0) & valid
        channel = (mine.mean(dim=(2, 3)) - theirs.mean(dim=(2, 3))).abs()
        flat = self.align_spatial(mine.mean(dim=1, keepdim=True)).float()
        spatial = (flat - theirs.mean(dim=1, keepdim=True)).abs() * valid
        terms = {
            "foreground": error * fg,
            "false_positive": error * _share(said & empty),
            "background": error * _share(~said & empty),
            "channel": channel,
            "spatial": spatial,
        }
        return {f"distillbev.{name}": term.sum() / len(error) for name, term in terms.items()}


def _share(region: Tensor) -> Tensor:
    """(B, 1, Y, X): one over a frame's cells of the region, in them."""
    return region / region.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
