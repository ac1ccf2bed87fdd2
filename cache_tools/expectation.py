"""What a reader counts on, and the sentence that refuses a cache which is something else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from cache_tools import lease, records
from cache_tools.manifest import Manifest, short
from fd3d.distill.signals import signals_of
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a reader counts on; a cache of anything else is refused. None = anything will do.

    Args:
        expert: architecture name. tensors: digest of its weights.
        dataset_version, split: as the manifest's identity names them.
        mode: what the target means under augmentation.
        grid: of the signals that are maps.
        signals_id, cache_id: as recorded by an earlier run, in full or shortened.
    """

    expert: str | None = None
    tensors: str | None = None
    dataset_version: str | None = None
    split: str | None = None
    mode: str | None = None
    grid: BEVGrid | None = None
    signals_id: str | None = None
    cache_id: str | None = None


_FIX = {
    "expert": "pass that expert, or a cache built with --expert {asked}",
    "tensors": "build a cache from this checkpoint, or pass the checkpoint that it was built from",
    "dataset_version": "pass a cache built with --version {asked}",
    "split": "pass a cache built with --split {asked}",
    "mode": "ask for mode {found}, or build a cache in the mode asked for",
    "grid": "ask for the grid of the cache, or build one with an expert on the grid asked for",
    "signals_id": "pass the cache that the earlier run used",
    "cache_id": "pass the cache that the earlier run used",
}


def check_signals(path: Path, cache: Manifest, names: Sequence[str]) -> None:
    """A signal that the cache does not hold raises `UsageError`."""
    unknown = set(names) - set(cache.signals)
    if unknown:
        lacks = signals_of(unknown)
        more = " --replays N" if "replay" in lacks else ""
        held = ", ".join(signals_of(cache.signals))
        raise UsageError(
            f"{path} holds the signals {held}, not {', '.join(lacks)}: build a cache with "
            f"--signals {','.join(signals_of(names))}{more}"
        )


def check_expectation(path: Path, cache: Manifest, expect: Expectation) -> None:
    """The first thing in which a cache is not what was expected raises `UsageError`."""
    found = {
        "expert": cache.identity.expert,
        "tensors": cache.identity.tensors,
        "dataset_version": cache.identity.dataset_version,
        "split": cache.identity.split,
        "mode": cache.identity.mode,
        "signals_id": cache.signals_id,
        "cache_id": cache.cache_id,
    }
    for field in fields(Expectation):
        asked = getattr(expect, field.name)
        if asked is None:
            continue
        if field.name == "grid":
            _check_grid(path, cache, asked)
        elif field.name.endswith("_id") or field.name == "tensors":
            if not found[field.name].startswith(asked):
                _refuse(path, field.name, short(found[field.name]), short(asked))
        elif found[field.name] != asked:
            _refuse(path, field.name, found[field.name], asked)


def _check_grid(path: Path, cache: Manifest, asked: BEVGrid) -> None:
    for spec in cache.signals.values():
        if spec.grid is not None and spec.grid != asked:
            _refuse(path, "grid", str(spec.grid), str(asked))


def _refuse(path: Path, name: str, found: str, asked: str) -> None:
    fix = _FIX[name].format(found=found, asked=asked)
    name = name.replace("_", " ")
    raise UsageError(f"{path} was built for {name} {found}, asked for is {asked}: {fix}")


def check_complete(path: Path, cache: Manifest, done: Mapping[int, records.Record]) -> None:
    """A cache without some of its shards raises `UsageError`, which says who builds it now."""
    if len(done) == cache.shards:
        return
    builders = lease.holders(path)
    how = (
        f"it is being built by {', '.join(map(str, builders))}: wait for the end"
        if builders
        else "nobody is building it now: run the build command again, it goes on where it stopped"
    )
    frames = sum(len(record.tokens) for record in done.values())
    raise UsageError(f"{path} is not finished ({frames} of {cache.frames} frames), and {how}")
