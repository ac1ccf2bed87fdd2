"""Presets: which codec stores which signal, and the budget that its error has to keep.

`lossless` keeps maps as float16. The others keep float16 maps as int8 with a step and a zero value
for each frame and channel (`cache_tools.codecs`), and differ in how fine the step is and in how the
codes are packed. `focal` also leaves out what lies far from objects. Tables and float32 values are
exact in every preset. docs/cache.md has what each was chosen for, and benchmarks/rate_distortion.py
what it was chosen by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fd3d.distill.signals import SignalSpec
from fd3d.errors import UsageError

PRESETS = ("lossless", "balanced", "tiny", "fast", "focal")
KINDS = ("exact", "int8", "table")


@dataclass(frozen=True, kw_only=True)
class SignalCodec:
    """How one signal is stored.

    Args:
        kind: "exact" (the spec's dtype), "int8" (with scale and zero) or "table" (padded rows
            and a count).
        cname, clevel, shuffle, blocksize: of the Blosc codec; blocksize 0 = Blosc's choice.
        difference: int8 only, rows are stored as differences, see `cache_tools.differences`.
        tile: cells on the edge of the tiles that a map is cut into.
        steps_per_sd: int8 only, the step is at most a channel's standard deviation over this
            unless its range asks for more.
        coarse: int8 only, tiles outside the focus are stored as means over blocks of this many
            cells on an edge; 0 = every tile is stored.
        focus_boxes, focus_score, focus_margin: what the focus is: ground truth and so many of the
            expert's boxes of at least this score, each wider by this many metres on every side.
        budget: largest allowed relative error of a frame; 0 = none stated.
    """

    kind: str
    cname: str = "zstd"
    clevel: int = 1
    shuffle: str = "shuffle"
    blocksize: int = 0
    difference: bool = False
    tile: int = 32
    steps_per_sd: float = 0.0
    coarse: int = 0
    focus_boxes: int = 0
    focus_score: float = 0.0
    focus_margin: float = 0.0
    budget: float = 0.0

    def exactly(self) -> SignalCodec:
        """How frames are stored that would be over the budget: as `lossless` does, in the same
        tiles."""
        return replace(_EXACT, tile=self.tile)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"codec kind {self.kind!r} is not known: use {', '.join(KINDS)}")


_EXACT = SignalCodec(kind="exact", blocksize=256 * 1024)
_INT8 = SignalCodec(kind="int8", shuffle="noshuffle", difference=True)
_MAPS = {
    "balanced": replace(_INT8, clevel=3, steps_per_sd=12.0, budget=0.04),
    "tiny": replace(_INT8, clevel=5, steps_per_sd=4.0, budget=0.08),
    "fast": replace(_INT8, cname="lz4hc", clevel=5, steps_per_sd=16.0, budget=0.02),
}
_FOCAL = replace(
    _MAPS["balanced"], tile=16, coarse=4, focus_boxes=50, focus_score=0.1, focus_margin=1.0
)
# Steps in place of those, by signal. Scores are read one by one near their peaks, and the map of
# them is small; errors in depth shrink on their way to the map, where many cells are summed.
_STEPS = {
    "heatmap": {"balanced": 36.0, "tiny": 16.0, "fast": 32.0},
    "lift_depth": {"balanced": 8.0, "tiny": 4.0, "fast": 16.0},
}


def check_preset(preset: str) -> str:
    """`preset` itself; one that does not exist raises `UsageError`."""
    if preset not in PRESETS:
        raise UsageError(f"preset {preset!r} is not known: use one of {', '.join(PRESETS)}")
    return preset


def codec_for(spec: SignalSpec, preset: str) -> SignalCodec:
    """The codec that `preset` chooses for a signal."""
    check_preset(preset)
    if spec.ragged:
        return SignalCodec(kind="table")
    if preset == "lossless" or spec.dtype != "float16" or len(spec.shape) != 3:
        return _EXACT
    if preset == "focal" and spec.grid is not None and spec.name != "heatmap":
        return _FOCAL
    like = "balanced" if preset == "focal" else preset
    steps = _STEPS.get(spec.name, {}).get(like, _MAPS[like].steps_per_sd)
    return replace(_MAPS[like], steps_per_sd=steps)
