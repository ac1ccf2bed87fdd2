"""Moving average of a training's weights, as BEVDet's second generation reports them."""

from __future__ import annotations

import math

import torch
from torch import nn

# Updates after which the decay has come near its value; before, the average follows faster.
_RAMP = 2000.0


class EMA:
    """The average of a module's weights and batch-norm statistics over its steps.

    Step t keeps decay * (1 - exp(-t / 2000)) of the average. Whole numbers are copied.

    Args:
        module: whose state is averaged, on its device, in float32 or what it is in.
        decay: in [0, 1), for instance 0.999.
    """

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self._average = {
            name: value.detach().clone() for name, value in module.state_dict().items()
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the module's present state in."""
        self.steps += 1
        kept = self.decay * (1.0 - math.exp(-self.steps / _RAMP))
        for name, value in module.state_dict().items():
            average = self._average[name]
            if value.is_floating_point():
                average.lerp_(value.to(average), 1.0 - kept)
            else:
                average.copy_(value)

    def copy_to(self, module: nn.Module) -> None:
        """Give the module the average for its state."""
        module.load_state_dict(self._average)

    def state_dict(self) -> dict:
        """What `accelerate` saves with the run."""
        return {"steps": self.steps, "average": self._average}

    def load_state_dict(self, state: dict) -> None:
        self.steps = int(state["steps"])
        for name, value in self._average.items():
            value.copy_(state["average"][name])
