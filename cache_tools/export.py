"""A cache made from a cache: another preset, fewer frames or signals, and no expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cache_tools.build import BuildReport, build_cache
from cache_tools.expectation import check_signals
from cache_tools.focal import FOCUS
from cache_tools.focus import Focus
from cache_tools.manifest import NUMERICS_VERSION
from cache_tools.presets import codec_for
from cache_tools.reader import CacheReader
from fd3d.data.index import FrameIndex
from fd3d.errors import UsageError


def export(
    source: str | Path,
    out: str | Path,
    *,
    preset: str,
    keys: Sequence[str] | None = None,
    signals: Sequence[str] | None = None,
    shard_frames: int | None = None,
    index: FrameIndex | None = None,
    quiet: bool = False,
) -> BuildReport:
    """Build the cache at `out` from the lossless cache `source`, or finish it.

    Ids and data files are those that building it with the preset would have given: encoders see
    maps rounded to what a lossless cache holds.

    Args:
        keys: frames to take, in the order of the source whatever theirs is; None = all.
        signals: which to take; None = all.
        shard_frames: frames in a file; None = as in the source.
        index: of the source's data set; preset focal takes the ground truth from it.
        preset, quiet: see `build_cache`.

    A source with a loss, of other code, and frames or signals that it does not have raise
    `UsageError`.
    """
    reader = CacheReader(source)
    cache = reader.manifest
    if cache.preset != "lossless":
        raise UsageError(
            f"{source} is {cache.preset}, and a loss on top of a loss has no stated error: export "
            "from a lossless cache, or build with the expert"
        )
    if cache.numerics_version != NUMERICS_VERSION:
        raise UsageError(
            f"{source} holds signals of numerics {cache.numerics_version}, this code makes "
            f"{NUMERICS_VERSION}: export with the release that built it"
        )
    names = tuple(cache.signals) if signals is None else tuple(sorted(set(signals)))
    check_signals(reader.path, cache, names)
    part = reader.bev_part()
    chosen = reader.tokens if keys is None else _in_order(reader, keys)

    focus = _focus(reader, names, preset, index)

    def load(batches: Sequence[Sequence[int]]) -> Iterator[dict[str, list[np.ndarray]]]:
        for positions in batches:
            tokens = [chosen[position] for position in positions]
            frames = [reader.read(token, names) for token in tokens]
            values = {name: [frame[name] for frame in frames] for name in names}
            if focus is not None:
                found = [reader.read(token, ["detections"])["detections"] for token in tokens]
                values[FOCUS] = [focus(*pair) for pair in zip(tokens, found, strict=True)]
            yield values

    return build_cache(
        out=out,
        identity=cache.identity,
        signals={name: cache.signals[name] for name in names},
        keys=chosen,
        load=load,
        compute=lambda found: found,
        bev_part=part.read_bytes if part else None,
        preset=preset,
        shard_frames=cache.shard_frames if shard_frames is None else shard_frames,
        quiet=quiet,
    )


def _focus(
    reader: CacheReader, names: Sequence[str], preset: str, index: FrameIndex | None
) -> Focus | None:
    specs = {name: reader.specs[name] for name in names}
    kept = {name: codec for name in names if (codec := codec_for(specs[name], preset)).coarse}
    if not kept:
        return None
    if index is None or "detections" not in reader.specs:
        raise UsageError(
            f"preset {preset} keeps what is near objects: name the data set with --dataroot, and "
            "export from a cache that holds detections"
        )
    name, codec = next(iter(kept.items()))
    return Focus(index=index, grid=specs[name].grid, codec=codec)


def _in_order(reader: CacheReader, keys: Sequence[str]) -> tuple[str, ...]:
    wanted = set(keys)
    unknown = sorted(wanted - set(reader.tokens))
    if unknown or not wanted:
        what = f"no frame {unknown[0]}" if unknown else "not been asked for a frame"
        raise UsageError(f"{reader.path} has {what}: name keys of its tokens.json")
    return tuple(token for token in reader.tokens if token in wanted)
