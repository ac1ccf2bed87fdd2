"""What a cache is and how far its build has come, for people and as JSON."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cache_tools import layout, lease, manifest, records
from cache_tools.build import SignalReport, make_report
from cache_tools.lease import Holder
from cache_tools.manifest import Manifest, short
from fd3d.distill.signals import signals_of


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """A cache at one moment; `damage` lists shards whose files are missing or of another length
    (`verify` looks inside)."""

    path: str
    cache: Manifest
    frames: int
    shards: int
    bytes: int
    raw_fp16_bytes: int
    signals: Mapping[str, SignalReport]
    damage: tuple[str, ...]
    builders: tuple[Holder, ...]
    last_commit: float | None
    report: Mapping[str, Any] | None

    @property
    def ready(self) -> bool:
        """True when every frame has a commit record that agrees with its files."""
        return self.frames == self.cache.frames

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        values = asdict(self)
        values.pop("cache")
        return {
            "ready": self.ready,
            **values,
            "expected_frames": self.cache.frames,
            "expected_shards": self.cache.shards,
            "ratio": self.bytes / max(self.raw_fp16_bytes, 1),
            "signals_id": self.cache.signals_id,
            "cache_id": self.cache.cache_id,
            "preset": self.cache.preset,
            "shard_frames": self.cache.shard_frames,
            "identity": asdict(self.cache.identity),
            "shapes": {name: list(spec.shape) for name, spec in self.cache.signals.items()},
        }


def survey(path: str | Path) -> CacheInfo:
    """Look at the cache at `path`, finished or not; raises as `cache_tools.manifest.load` does."""
    folder = Path(path)
    cache = manifest.load(folder)
    manifest.load_tokens(folder, cache)
    done, damaged = records.load_all(folder, cache)
    sizes = make_report(folder, cache, built=0, seconds={})
    commits = [(folder / layout.record_file(shard)).stat().st_mtime for shard in done]
    return CacheInfo(
        path=str(folder),
        cache=cache,
        frames=sizes.frames,
        shards=len(done),
        bytes=sizes.bytes,
        raw_fp16_bytes=sizes.raw_fp16_bytes,
        signals=sizes.signals,
        damage=tuple(str(found) for found in damaged.values()),
        builders=lease.holders(folder),
        last_commit=max(commits, default=None),
        report=_report(folder),
    )


def cache_info(path: str | Path) -> dict[str, Any]:
    """What `fd3d-cache info --json` prints: `survey` as plain JSON values."""
    return survey(path).to_dict()


def describe(info: CacheInfo) -> str:
    """The survey as a person wants to read it."""
    cache, who = info.cache, info.cache.identity
    origin = f" ({who.origin})" if who.origin else ""
    lines = [
        f"{info.path}: {_state(info)}",
        f"  expert     {who.expert}, tensors {short(who.tensors)}{origin}",
        f"  frames     {cache.frames}, split {who.split} of {who.dataset_version}, "
        f"mode {who.mode}, adjacent frame by the {who.adjacency} rule",
        f"  ids        signals {short(cache.signals_id)}, cache {short(cache.cache_id)}",
        f"  stored     preset {cache.preset}, {info.shards} of {cache.shards} shards of "
        f"{cache.shard_frames} frames",
    ]
    if info.frames:
        lines.append(
            f"  size       {_mb(info.bytes)}, {info.bytes / max(info.raw_fp16_bytes, 1):.3f} of "
            f"raw ({_mb(info.raw_fp16_bytes)})"
        )
    for name, part in info.signals.items():
        lines.append(f"  {name:<10} {_signal_line(info, name, part)}")
    lines += [f"  damaged    {what}" for what in info.damage]
    lines.append(_advice(info))
    return "\n".join(lines)


def _state(info: CacheInfo) -> str:
    if info.ready:
        return "ready"
    percent = 100 * info.frames / info.cache.frames
    state = f"not ready, {info.frames} of {info.cache.frames} frames ({percent:.0f} %)"
    if info.builders:
        state += f", being built by {', '.join(map(str, info.builders))}"
    elif info.last_commit:
        minutes = max(0.0, time.time() - info.last_commit) / 60
        state += f", nobody is building it, last shard {minutes:.0f} min ago"
    return state


def _signal_line(info: CacheInfo, name: str, part: SignalReport) -> str:
    spec = info.cache.signals[name]
    shape = "x".join(str(n) for n in spec.shape)
    where = f" on {spec.grid}" if spec.grid else ""
    most = "up to " if spec.ragged else ""
    line = f"{most}{shape} {spec.dtype}{where}"
    if info.frames:
        line += f", {_mb(part.bytes / info.frames)} a frame"
    if part.worst_error is not None:
        line += (
            f", error mean {100 * part.mean_error:.2f} % worst {100 * part.worst_error:.2f} % "
            f"(frame {part.worst_token})"
        )
    if part.over_budget:
        line += f", {part.over_budget} frames over budget"
    return line


# Signals that apprentices can be taught by alone, and how.
_TEACHING = {
    "bev": "",
    "lift": " --mode relift --bev-augment",
    "replay": " --mode replay --bev-augment",
}


def _advice(info: CacheInfo) -> str:
    if info.damage:
        return "Run the build command again: it makes the damaged shards anew."
    if not info.ready:
        wait = "Wait for it" if info.builders else "Run the build command (of each part) again"
        return (
            f"{wait}. Until it is ready, only readers that are told so use it: --partial or "
            "--source hybrid of the recipe, partial=True in Python."
        )
    names = signals_of(info.cache.signals)
    path = shlex.quote(info.path)
    teaching = next((mode for name, mode in _TEACHING.items() if name in names), None)
    if not any(spec.grid for spec in info.cache.signals.values()) and "lift" not in names:
        teaching = None
    distil = ""
    if teaching is not None:
        if "pv" not in names or "replay" in teaching:
            # The recipe's default compares the image planes too, which mode replay does not have.
            teaching = f" --distiller l2{teaching}"
        distil = (
            "Distil:  accelerate launch recipes/distill_bevdepth.py --model APPRENTICE --dataroot "
            f"DATA --version {info.cache.identity.dataset_version} --split "
            f"{info.cache.identity.split} --out RUN --cache {path}{teaching}\n"
        )
    more = ", areas=True" if any(codec.coarse for codec in info.cache.codecs.values()) else ""
    return (
        f"{distil}"
        f"Python:  CachedExpert({info.path!r}, names={names!r}{more}).load(token)\n"
        f"Check:   fd3d-cache verify {path}"
    )


def _report(folder: Path) -> Mapping[str, Any] | None:
    try:
        return json.loads((folder / layout.REPORT).read_bytes())
    except (OSError, ValueError):
        return None


def _mb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
