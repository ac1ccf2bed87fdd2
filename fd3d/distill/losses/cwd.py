"""`cwd`: channel-wise distillation (Shu et al., ICCV 2021).

Each channel becomes a distribution over cells, a softmax of its values over a temperature tau; the
term is tau^2 / (C B) times the sum of the divergences KL(expert || apprentice). Published weight 1
at tau 1. The baseline that FD3D's authors released takes tau 2, weight .25, and the cross-entropy
without the expert's own entropy, which has the same gradient.
"""

from __future__ import annotations

from torch import Tensor, nn

from fd3d.data.batch import Batch
from fd3d.distill.align import Project, check_grids, seen_cells
from fd3d.grid import BEVGrid
from fd3d.models.bevdepth.network import Outputs

WEIGHTS = {"cwd": 1.0}


class CWD(nn.Module):
    """Where each channel of the expert's map is strong, the apprentice's should be.

    Args:
        channels, grid: of the apprentice's map.
        expert_channels, expert_grid: of the expert's map; the comparison is made there.
        tau: temperature. entropy: False leaves out what does not depend on the apprentice.
    """

    def __init__(
        self,
        *,
        channels: int,
        grid: BEVGrid,
        expert_channels: int,
        expert_grid: BEVGrid,
        tau: float = 1.0,
        entropy: bool = True,
    ) -> None:
        super().__init__()
        check_grids(grid, expert_grid)
        self.tau, self.entropy = tau, entropy
        self.align = Project(
            channels=channels, expert_channels=expert_channels, shape=expert_grid.shape
        )

    def forward(
        self, apprentice: Outputs, expert: dict[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Term `cwd`, unweighted; cells outside expert["valid"], where that is there, are not part
        of the distributions."""
        del batch  # this distiller looks at no boxes
        value = channel_divergence(
            self.align(apprentice.bev).float(),
            expert["bev"].detach().float(),
            valid=seen_cells(expert),
            tau=self.tau,
            entropy=self.entropy,
        )
        return {"cwd": value}


def channel_divergence(
    mine: Tensor, theirs: Tensor, *, valid: Tensor, tau: float, entropy: bool
) -> Tensor:
    """tau^2 / (C B) sum KL(theirs || mine) of maps (B, C, Y, X) whose channels are distributions
    over the cells of `valid` (B, 1, Y, X)."""
    known = valid.flatten(2)

    def log_shares(maps: Tensor) -> Tensor:
        # A large number in place of infinity, whose gradient would be NaN.
        logits = (maps.flatten(2) / tau).masked_fill(~known, -1e4)
        return logits.log_softmax(dim=2)

    wanted = log_shares(theirs)
    gained = -log_shares(mine)
    if entropy:
        gained = gained + wanted
    total = (wanted.exp() * gained * known).sum()
    return total * tau**2 / (mine.shape[0] * mine.shape[1])
