"""Asking the expert again: do some frames of a cache still hold what it says?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache_tools.codecs import error_of
from cache_tools.expert import prepare
from cache_tools.manifest import short
from cache_tools.reader import CacheReader
from fd3d.distill import replay
from fd3d.distill.signals import signals_of
from fd3d.errors import UsageError
from fd3d.progress import Progress

# Batches of another size, other kernels and other machines move an expert's numbers a little.
_SLACK = 0.005


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """What asking again gave: frame keys, and for each map the worst relative error (channel means
    removed) with the largest that is allowed. `ok`: no map is further off than that."""

    tokens: tuple[str, ...]
    worst: Mapping[str, float]
    allowed: Mapping[str, float]

    @property
    def ok(self) -> bool:
        return all(error <= self.allowed[name] for name, error in self.worst.items())


def rerun(
    path: str | Path,
    *,
    count: int,
    dataroot: str | Path,
    checkpoint: str | Path | None = None,
    init_seed: int | None = None,
    device: str = "cpu",
    quiet: bool = True,
) -> Rerun:
    """Run the cache's expert on `count` frames, spread over the split, and compare its maps.

    Weights that are not those of the cache raise `UsageError`.
    """
    reader = CacheReader(path)
    cache, who = reader.manifest, reader.manifest.identity
    if not 1 <= count <= len(reader):
        raise UsageError(f"--rerun {count} is not possible: use 1 to {len(reader)}")
    run = prepare(
        expert=who.expert,
        checkpoint=checkpoint,
        init_seed=init_seed,
        dataroot=dataroot,
        version=who.dataset_version,
        split=who.split,
        signals=signals_of(reader.specs),
        device=device,
        workers=0,
        replays=replay.count_of(reader.specs),
    )
    if run.identity.tensors != who.tensors:
        raise UsageError(
            f"{path} was built with the weights {short(who.tensors)} ({who.origin}), these are "
            f"{short(run.identity.tensors)} ({run.identity.origin}): give those of the cache"
        )
    positions = np.linspace(0, len(reader) - 1, count).round().astype(int)
    batches = [[run.keys.index(reader.tokens[position])] for position in positions]
    worst = {name: 0.0 for name, spec in reader.specs.items() if len(spec.shape) == 3}
    with Progress(total=count, unit="frames", title="asking again", quiet=quiet) as progress:
        for position, batch in zip(positions, run.load(batches), strict=True):
            said, token = run.compute(batch), reader.tokens[position]
            stored = reader.read(token, tuple(worst))
            for name in worst:
                exact = reader.exact(token, name)
                value = np.ascontiguousarray(said[name][0][:, exact])
                error = error_of(value, stored[name][:, exact]).frame
                worst[name] = max(worst[name], error)
            progress.advance(1)
    return Rerun(
        tokens=tuple(reader.tokens[position] for position in positions),
        worst=worst,
        allowed={name: cache.codecs[name].budget + _SLACK for name in worst},
    )
