"""The signal source for a cache with gaps: what is there is read, the expert runs for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cache_tools.manifest import short
from cache_tools.source import CachedExpert
from fd3d.data.batch import Batch
from fd3d.distill.live import LiveSource
from fd3d.distill.signals import SignalSpec
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid


class LoadHybrid:
    """What a worker runs for one frame: reads it, or loads the expert's pictures of it."""

    def __init__(self, cached: CachedExpert, live: LiveSource) -> None:
        self._cached, self._live = cached.load, live.load
        self._present = frozenset(cached.present)

    def __call__(self, token: str, frame: Batch | None = None) -> Any:
        load = self._cached if token in self._present else self._live
        return load(token, frame)


class HybridSource:
    """Cached where the cache has the frame, live elsewhere; both of one expert.

    Args:
        cached: opened with partial=True.
        live: the same expert, its weights and signals; another raises `UsageError`.
    """

    def __init__(self, *, cached: CachedExpert, live: LiveSource) -> None:
        who = cached.ids["expert"]
        if who != live.ids["expert"] or cached.mode != live.expert.mode:
            raise UsageError(
                f"the cache is of expert {_told(who)} and the live one is "
                f"{_told(live.ids['expert'])}: give the checkpoint that the cache was built with"
            )
        self._cached, self._live = cached, live
        self.specs: dict[str, SignalSpec] = cached.specs
        self.expert = live.expert
        # Which frames are read changes nothing in what they are worth: not part of the ids.
        self.ids = {name: value for name, value in cached.ids.items() if name != "frames"}
        self.load = LoadHybrid(cached, live)

    @property
    def grid(self) -> BEVGrid:
        return self._cached.grid

    @property
    def replays(self) -> int:
        """Augmentations that the cache replays, see `CachedExpert`."""
        return self._cached.replays

    @property
    def present(self) -> tuple[str, ...]:
        """The keys of the frames that are read."""
        return self._cached.present

    @property
    def reader(self):
        """Of the cache, which has the expert's BEV encoder and head beside its arrays."""
        return self._cached.reader

    def signals(
        self, loaded: Sequence[Any], device: torch.device | str = "cpu"
    ) -> dict[str, Tensor | list[Tensor]]:
        """As `LiveSource.signals`, frames in the order loaded; the expert sees those that the cache
        lacks in one batch."""
        missing = [isinstance(frame, Batch) for frame in loaded]
        found = []
        for source, wanted in ((self._cached, False), (self._live, True)):
            rows = [row for row, is_live in enumerate(missing) if is_live == wanted]
            if rows:
                found.append((rows, source.signals([loaded[row] for row in rows], device)))
        order = torch.tensor([row for rows, _ in found for row in rows]).argsort()
        joined: dict[str, Tensor | list[Tensor]] = {}
        for name, spec in self.specs.items():
            parts = [signals[name] for _, signals in found]
            if spec.ragged:
                flat = [table for part in parts for table in part]
                joined[name] = [flat[row] for row in order.tolist()]
            else:
                joined[name] = torch.cat(parts)[order.to(device)]
        return joined


def _told(expert: str) -> str:
    name, _, tensors = expert.partition(" ")
    return f"{name} {short(tensors)}"
