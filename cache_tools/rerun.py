"""Asking the expert again: do some frames of a cache still hold what it says?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache_tools.codecs import error_of
from cache_tools.expert import ExpertRun, prepare, spread
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


@dataclass(frozen=True, kw_only=True)
class Question:
    """What an expert is to be asked again: the cache, the expert, and which frames, by their
    positions in the cache and rows of the expert's data set."""

    reader: CacheReader
    run: ExpertRun
    positions: tuple[int, ...]
    rows: tuple[int, ...]


def question(
    path: str | Path,
    *,
    count: int,
    dataroot: str | Path,
    checkpoint: str | Path | None = None,
    init_seed: int | None = None,
    device: str = "cpu",
) -> Question:
    """To ask the cache's expert about `count` frames, spread over the split; runs nothing yet.

    Weights or data that are not those of the cache raise `UsageError`.
    """
    reader = CacheReader(path, allow_partial=True)
    who = reader.manifest.identity
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
    positions = spread(len(reader), count)
    rows = {key: row for row, key in enumerate(run.keys)}
    missing = [key for key in reader.tokens if key not in rows]
    if missing:
        raise UsageError(
            f"{dataroot} has no frame {missing[0]}, which {path} holds: give the data set that the "
            "cache was built from"
        )
    asked = tuple(rows[reader.tokens[position]] for position in positions)
    return Question(reader=reader, run=run, positions=tuple(positions), rows=asked)


def ask(question: Question, *, quiet: bool = True) -> Rerun:
    """Run the expert on the frames and compare its maps with those of the cache, which must have
    all of them."""
    reader, run, positions = question.reader, question.run, question.positions
    worst = {name: 0.0 for name, spec in reader.specs.items() if len(spec.shape) == 3}
    batches = [[row] for row in question.rows]
    with Progress(total=len(batches), unit="frames", title="asking again", quiet=quiet) as progress:
        for position, batch in zip(positions, run.load(batches), strict=True):
            said, token = run.compute(batch), reader.tokens[position]
            stored = reader.read(token, tuple(worst))
            for name in worst:
                exact = reader.exact(token, name)
                # What float16 loses of a nearly constant channel is no other answer.
                value = said[name][0][:, exact].astype(reader.specs[name].dtype)
                value = value.astype(np.float32)
                error = error_of(value, stored[name][:, exact]).frame
                worst[name] = max(worst[name], error)
            progress.advance(1)
    return Rerun(
        tokens=tuple(reader.tokens[position] for position in positions),
        worst=worst,
        allowed={name: reader.manifest.codecs[name].budget + _SLACK for name in worst},
    )
