"""The live signal source: the expert runs in every step, as everyone did before the cache.

It is the control experiment for the cached source (`cache_tools.source.CachedExpert`) and shares
its two-stage interface: `load(token)` in a loader worker, `signals(loaded, device)` in the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fd3d.data.batch import Batch, collate
from fd3d.distill.replay import augmented
from fd3d.distill.signals import AUGMENTED, LiveExpert, SignalSpec
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid


class SignalSource(Protocol):
    """Yields an expert's signals for the frames of a batch, in two stages."""

    specs: dict[str, SignalSpec]
    grid: BEVGrid
    ids: dict[str, str]

    # What a worker runs for one frame, given its key and the apprentice's view of it; it must be
    # cheap to send to a worker.
    load: Callable[[str, Batch | None], Any]

    def signals(
        self, loaded: Sequence[Any], device: torch.device | str
    ) -> dict[str, Tensor | list[Tensor]]:
        """Maps as (B, C, Y, X) float32 on `device`, tables as B tensors, in the order loaded."""


class ExpertView:
    """Frames as the expert's preprocessing sees them, by token.

    Args:
        frames: un-augmented.
        augmented: give them the BEV augmentation of the apprentice's view.
    """

    def __init__(self, frames: Dataset, augmented: bool = False) -> None:
        self._frames = frames
        self._augmented = augmented
        self._row = {token: row for row, token in enumerate(frames.tokens)}

    def __call__(self, token: str, frame: Batch | None = None) -> Batch:
        if token not in self._row:
            raise UsageError(f"frame {token} is not among the expert's frames: use one split")
        view = self._frames[self._row[token]]
        if not self._augmented:
            return view
        if frame is None or frame.bev_augment is None:
            raise UsageError("the mode needs the apprentice's view with its augmentation: give it")
        return augmented(view, frame.bev_augment)


class LiveSource:
    """Signals from a network that runs in the step.

    Args:
        expert: the frozen network and the signals it yields.
        frames: the expert's own, un-augmented view of every frame that training will ask for.
        ids: what a checkpoint should record about this source.
    """

    def __init__(self, *, expert: LiveExpert, frames: Dataset, ids: dict[str, str]) -> None:
        self.expert = expert
        self.specs = expert.specs
        self.grid = expert.grid
        self.ids = ids
        # Not a bound method: a spawned worker would be sent the whole network with it.
        self.load = ExpertView(frames, augmented=expert.mode in AUGMENTED)

    def signals(
        self, loaded: Sequence[Batch], device: torch.device | str
    ) -> dict[str, Tensor | list[Tensor]]:
        """Run the expert on the loaded frames, in float32 whatever the trainer's precision.

        Values are rounded to the dtype of their spec, as a lossless cache stores them: what is
        then taught is the same from both, to the last steps of a long training.
        """
        with torch.autocast(device_type=torch.device(device).type, enabled=False):
            found = self.expert.signals(collate(loaded).to(device))
        return {name: _rounded(value, self.specs[name]) for name, value in found.items()}


def _rounded(value: Tensor | list[Tensor], spec: SignalSpec) -> Tensor | list[Tensor]:
    if spec.ragged:
        return value
    return value.to(getattr(torch, spec.dtype)).float()
