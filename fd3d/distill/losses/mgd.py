"""`mgd`: masked generative distillation (Yang et al., ECCV 2022).

Cells of the apprentice's map are blanked at random, everywhere and with probability .65, and a
generator (conv 3x3, ReLU, conv 3x3) has to say the expert's whole map. The term is the squared
error summed over channels and cells, divided by the number of frames. Published weight 2e-5.
"""

from __future__ import annotations

from torch import Tensor, nn

from fd3d.data.batch import Batch
from fd3d.distill.align import Project, check_grids, seen_cells
from fd3d.distill.generation import Generator, kept_patches
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.network import Outputs

WEIGHTS = {"mgd": 2e-5}


class MGD(nn.Module):
    """Generates the expert's map from what is left of the apprentice's.

    Args:
        channels, grid: of the apprentice's map.
        expert_channels, expert_grid: of the expert's map; the comparison is made there.
        masked: probability that a cell is blanked.
    """

    def __init__(
        self,
        *,
        channels: int,
        grid: BEVGrid,
        expert_channels: int,
        expert_grid: BEVGrid,
        masked: float = 0.65,
    ) -> None:
        super().__init__()
        check_grids(grid, expert_grid)
        self.masked = masked
        self.align = Project(
            channels=channels, expert_channels=expert_channels, shape=expert_grid.shape
        )
        self.generate = Generator(expert_channels)

    def forward(
        self, apprentice: Outputs, expert: dict[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Term `mgd`, unweighted; cells outside expert["valid"] do not count."""
        del batch  # this distiller looks at no boxes
        aligned = self.align(apprentice.bev)
        kept = kept_patches(aligned, masked=self.masked, patch=1)
        made = self.generate(aligned * kept.to(aligned.dtype)).float()
        error = (made - expert["bev"].detach().float()).square() * seen_cells(expert)
        return {"mgd": error.sum() / len(error)}
