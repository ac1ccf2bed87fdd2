"""The one module that a training step runs: the network that learns and what teaches it."""

from __future__ import annotations

from torch import Tensor, nn

from fd3d.data.batch import Batch


class Trainee(nn.Module):
    """A detector and, in distillation, the distiller's own layers.

    One module, so that data-parallel training sees every trained parameter in one forward; the
    expert stays outside.

    Args:
        model: the detector, from `fd3d.models.build`.
        distiller: `distiller(outputs, expert_signals, batch)` gives named, unweighted terms, from
            what the detector's forward gave; None to train on the ground truth alone.
    """

    def __init__(self, model: nn.Module, distiller: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.distiller = distiller

    def forward(self, batch: Batch, expert: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Named scalar loss terms of one batch."""
        outputs = self.model(batch)
        terms = dict(self.model.loss(outputs, batch))
        if self.distiller is not None:
            terms.update(self.distiller(outputs, expert, batch))
        return terms
