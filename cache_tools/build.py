"""Building a cache: frames go to an expert, its signals into shards, one shard after the other.

Works for any expert and any frames: `build_cache` knows positions and arrays only. A build that was
stopped goes on at the first shard without a commit record, and several may build parts of one cache
at once. Batches never cross a shard, so an expert sees the same batches whether or not it was
interrupted, and says the same to the bit. Encoding and writing go on in `cache_tools.background`
while the expert computes what follows.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fd3d
from cache_tools import layout, lease, manifest, records
from cache_tools.append import check_base, share
from cache_tools.background import WAITING_FRAMES, BackgroundWriter
from cache_tools.bottleneck import BESIDE, FRONT, bottleneck, shares
from cache_tools.checksums import parse_json
from cache_tools.focal import FOCUS
from cache_tools.manifest import Identity, Manifest
from cache_tools.parts import WHOLE, Part
from cache_tools.writer import OVER_BUDGET, ShardWriter, create_or_open, sweep
from fd3d.distill.handover import dead_workers_told
from fd3d.distill.signals import SignalSpec
from fd3d.durable import write_durably
from fd3d.errors import UsageError
from fd3d.progress import Progress

# What a loader that has ended yields.
_NOTHING = object()

Compute = Callable[[Any], Mapping[str, Sequence[np.ndarray]]]
Load = Callable[[Sequence[Sequence[int]]], Iterable[Any]]


@dataclass(frozen=True, kw_only=True)
class SignalReport:
    """One signal of a finished cache.

    Args:
        bytes: in its arrays' files. raw_fp16_bytes: of the same as plain arrays: maps as the
            dtype of their spec (float16), tables as float32 without padding.
        mean_error, worst_error: over frames, relative L2 with channel means removed; None for
            tables. worst_token: the frame of worst_error. worst_channel: of any frame.
        over_budget: frames that are stored exactly, as they would be above the codec's budget.
    """

    bytes: int
    raw_fp16_bytes: int
    mean_error: float | None = None
    worst_error: float | None = None
    worst_token: str | None = None
    worst_channel: float | None = None
    over_budget: int = 0


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What a build made: `frames` of the cache's `expected` are there, `built` of them in this
    run. Seconds of this run: `load` (waiting for inputs), `expert`, `wait` (for a place in the
    writer's queue, and for its end) one after the other; `encode` and `write` beside them.
    `bottleneck` says in words which of them held it up. That of the run that finished the cache
    goes to report.json."""

    path: str
    signals_id: str
    cache_id: str
    expected: int
    frames: int
    built: int
    bytes: int
    raw_fp16_bytes: int
    signals: Mapping[str, SignalReport]
    seconds: Mapping[str, float]
    bottleneck: str
    code_version: str
    machine: str

    @property
    def complete(self) -> bool:
        """True when every frame is there."""
        return self.frames == self.expected

    @property
    def ratio(self) -> float:
        """Bytes in the data files over raw bytes."""
        return self.bytes / max(self.raw_fp16_bytes, 1)


def build_cache(
    *,
    out: str | Path,
    identity: Identity,
    signals: Mapping[str, SignalSpec],
    keys: Sequence[str],
    compute: Compute,
    load: Load | None = None,
    preset: str = "lossless",
    shard_frames: int = 16,
    batch: int = 4,
    bev_part: Callable[[], bytes] | None = None,
    part: Part = WHOLE,
    base: str | Path | None = None,
    most_over_budget: float = OVER_BUDGET,
    quiet: bool = False,
) -> BuildReport:
    """Build the cache at `out`, or finish what an earlier build began there.

    Args:
        out: the folder; made if it is not there. Another cache there is refused, never replaced.
        identity: where the values come from.
        signals: what is stored for each frame.
        keys: frame keys; scenes in time order keep neighbours in one shard.
        compute: from a batch's positions in `keys` (or from what `load` made of them) to one
            array per frame for each signal; for preset focal also a (Y, X) bool mask under "focus"
            of what is to be exact. They are encoded while it is called again: it
            must give new arrays each time, not write into those that it gave before.
        load: told all batches that this run will compute, yields the input of each in turn; a
            place for a data loader that reads ahead.
        preset: one of `cache_tools.presets.PRESETS`.
        shard_frames: frames in a file. The writer holds one packed shard in memory.
        batch: frames computed at a time, at most.
        bev_part: gives the expert's weights behind its splat, see `fd3d.distill.bev_part`.
        part: which shards to build; the others are for builds elsewhere, at the same time or not,
            which may divide them by another number. One with shards of a living one is refused.
        base: a cache of fewer frames whose shards are taken over, see `cache_tools.append`, which
            also has the order of `keys` that shares most.
        most_over_budget: more than this share of frames over the preset's budget (and more than
            one) stops the build.
        quiet: no progress on stderr.

    NaN, infinity or float16 overflow in a signal raises `CheckFailed`; wrong use `UsageError`.
    """
    if batch < 1:
        raise UsageError(f"--batch {batch} is not possible: use 1 or more")
    out = Path(out)
    weights = bev_part() if bev_part is not None else b""
    wanted = manifest.make(
        identity=identity,
        signals=signals,
        keys=keys,
        preset=preset,
        shard_frames=shard_frames,
        bev_part=weights,
    )
    if base is not None:
        check_base(base, wanted)
    create_or_open(out, wanted, keys, weights)
    with lease.held(out, part) as others:
        sweep(out, wanted, part=part, alone=not others)
        if base is not None:
            share(base, out, wanted, keys, part=part)
        missing = missing_shards(out, wanted, part)
        seconds = _build_shards(
            out,
            wanted,
            keys,
            missing,
            compute=compute,
            load=load,
            batch=batch,
            part=part,
            most_over_budget=most_over_budget,
            quiet=quiet,
        )
        built = sum(len(wanted.frames_of(shard)) for shard in missing)
        report = make_report(out, wanted, built=built, seconds=seconds)
        # Whoever commits the last shard sees all of them. A run that found nothing to do must not
        # replace the times of the one that did.
        if report.complete and (built or not _reported(out)):
            write_durably(out / layout.REPORT, json.dumps(asdict(report), indent=1).encode())
    return report


def missing_shards(out: Path, cache: Manifest, part: Part = WHOLE) -> list[int]:
    """The shards of a part without a commit record that agrees with their files."""
    done, _ = records.load_all(out, cache)
    return [shard for shard in range(cache.shards) if shard not in done and part.owns(shard)]


def make_report(
    out: Path, cache: Manifest, *, built: int, seconds: Mapping[str, float]
) -> BuildReport:
    """Sizes and errors of what is committed at `out`, from its records."""
    done, _ = records.load_all(out, cache)
    parts = {name: _signal_report(name, cache, done) for name in cache.signals}
    return BuildReport(
        path=str(out),
        signals_id=cache.signals_id,
        cache_id=cache.cache_id,
        expected=cache.frames,
        frames=sum(len(record.tokens) for record in done.values()),
        built=built,
        bytes=sum(part.bytes for part in parts.values()),
        raw_fp16_bytes=sum(part.raw_fp16_bytes for part in parts.values()),
        signals=parts,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        bottleneck=bottleneck(seconds),
        code_version=fd3d.__version__,
        machine=f"{platform.node()} {platform.machine()} python {platform.python_version()}",
    )


def batches_of(cache: Manifest, shards: Sequence[int], batch: int) -> list[list[int]]:
    """Positions of each batch of the shards, in order; none crosses a shard."""
    found = []
    for shard in shards:
        frames = list(cache.frames_of(shard))
        found += [frames[start : start + batch] for start in range(0, len(frames), batch)]
    return found


def _build_shards(
    out: Path,
    cache: Manifest,
    keys: Sequence[str],
    missing: Sequence[int],
    *,
    compute: Compute,
    load: Load | None,
    batch: int,
    part: Part,
    most_over_budget: float,
    quiet: bool,
) -> dict[str, float]:
    spent = dict.fromkeys((*FRONT, *BESIDE), 0.0)
    if not missing:
        return spent
    batches = batches_of(cache, missing, batch)
    inputs = iter(load(batches) if load is not None else batches)
    committed, _ = records.load_all(out, cache)
    # Each part answers for its own frames: it sees those of others only as they come.
    mine = [record for shard, record in committed.items() if part.owns(shard)]
    over = {name: sum(len(record.exact.get(name, ())) for record in mine) for name in cache.signals}
    total = sum(len(cache.frames_of(shard)) for shard in range(cache.shards) if part.owns(shard))
    writer = ShardWriter(
        folder=out,
        cache=cache,
        keys=keys,
        frames=total,
        over_budget=over,
        most_over_budget=most_over_budget,
    )
    done = total - sum(len(positions) for positions in batches)
    focal = any(codec.coarse for codec in cache.codecs.values())
    names = (*cache.signals, FOCUS) if focal else tuple(cache.signals)
    last_of_shard = {cache.frames_of(shard)[-1]: shard for shard in missing}
    title = "building" if part.whole else f"building part {part}"
    # A whole batch finds room when the encoder keeps up.
    waiting = max(batch, WAITING_FRAMES)
    with (
        dead_workers_told(),
        Progress(total=total, unit="frames", title=title, done=done, quiet=quiet) as progress,
        BackgroundWriter(writer=writer, waiting=waiting) as background,
    ):
        for positions in batches:
            given = _timed(spent, "load", lambda: next(inputs, _NOTHING))
            if given is _NOTHING:
                raise UsageError(
                    f"load yielded nothing for the batch at frame {keys[positions[0]]}: it must "
                    "yield the input of each batch that it was told"
                )
            values = _timed(spent, "expert", lambda given=given: compute(given))
            for row, position in enumerate(positions):
                frame = {name: _row(values, name, row, len(positions)) for name in names}
                background.add(position, frame, ends=last_of_shard.get(position))
            progress.advance(len(positions), shares({**spent, **background.seconds}))
    return {**spent, **background.seconds}


def _reported(out: Path) -> bool:
    try:
        return isinstance(parse_json((out / layout.REPORT).read_bytes()), dict)
    except (FileNotFoundError, ValueError):
        return False


def _row(values: Mapping[str, Sequence], name: str, row: int, rows: int) -> np.ndarray:
    if name not in values or len(values[name]) != rows:
        got = f"{len(values[name])} of {rows} frames" if name in values else "nothing"
        raise UsageError(f"the expert gave {got} for signal {name}: correct it or its spec")
    return values[name][row]


def _timed(spent: dict[str, float], what: str, work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = work()
    spent[what] += time.perf_counter() - start
    return result


def _signal_report(name: str, cache: Manifest, done: Mapping[int, records.Record]) -> SignalReport:
    spec, codec = cache.signals[name], cache.codecs[name]
    arrays = layout.arrays_of(spec, codec)
    shards = sorted(done)
    stored = sum(done[s].files[array.file_of(s)][0] for s in shards for array in arrays)
    frames = sum(len(done[s].tokens) for s in shards)
    item = np.dtype(spec.dtype).itemsize
    if spec.ragged:
        rows = sum(sum(done[s].rows[name]) for s in shards)
        return SignalReport(bytes=stored, raw_fp16_bytes=rows * int(np.prod(spec.shape[1:])) * item)
    raw = frames * int(np.prod(spec.shape)) * item
    errors = [
        (error, token)
        for s in shards
        for error, token in zip(done[s].errors.get(name, ()), done[s].tokens, strict=False)
    ]
    if not errors:
        return SignalReport(bytes=stored, raw_fp16_bytes=raw)
    worst, token = max(errors)
    return SignalReport(
        bytes=stored,
        raw_fp16_bytes=raw,
        mean_error=float(np.mean([error for error, _ in errors])),
        worst_error=worst,
        worst_token=token,
        worst_channel=max(max(done[s].worst_channels[name]) for s in shards),
        over_budget=sum(len(done[s].exact.get(name, ())) for s in shards),
    )
