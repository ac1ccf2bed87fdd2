"""A few frames before a build, to see whether a preset suits an expert's signals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cache_tools.codecs import encode
from cache_tools.expert import ExpertRun, spread
from cache_tools.focal import FOCUS
from cache_tools.presets import codec_for
from cache_tools.writer import OVER_BUDGET
from fd3d.distill.handover import dead_workers_told
from fd3d.errors import CheckFailed, UsageError
from fd3d.progress import Progress

FRAMES = 64
# Of a small split a pilot of all those frames would be half the build.
_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Pilot:
    """What a preset did to `frames` frames spread over the split: signal -> keys of those over its
    budget."""

    preset: str
    frames: int
    over_budget: Mapping[str, tuple[str, ...]]


def pilot_frames(asked: int | None, frames: int) -> int:
    """How many frames a pilot runs: those asked for, or 64 and at most a twentieth of all."""
    if asked is None:
        return min(FRAMES, int(_SHARE * frames))
    if not 0 <= asked <= frames:
        raise UsageError(f"--pilot {asked} is not possible: use 0 to {frames}")
    return asked


def run_pilot(run: ExpertRun, *, preset: str, count: int, quiet: bool = True) -> Pilot:
    """Run the expert on `count` frames and encode what it says; nothing is written."""
    rows = [[row] for row in spread(len(run.keys), count)]
    over: dict[str, list[str]] = {name: [] for name in run.signals}
    with (
        dead_workers_told(),
        Progress(total=count, unit="frames", title="pilot", quiet=quiet) as progress,
    ):
        for batch in run.load(rows):
            values, (token,) = run.compute(batch), batch.tokens
            focus = values[FOCUS][0] if FOCUS in values else None
            for name, spec in run.signals.items():
                codec = codec_for(spec, preset)
                stored, _ = encode(
                    values[name][0], spec=spec, codec=codec, frame=token, focus=focus
                )
                if "exact" in stored:
                    over[name].append(token)
            progress.advance(1)
    return Pilot(
        preset=preset,
        frames=count,
        over_budget={name: tuple(tokens) for name, tokens in over.items()},
    )


def check_pilot(found: Pilot) -> None:
    """More than one frame and more than a hundredth of them over a budget raises `CheckFailed`."""
    for name, tokens in found.over_budget.items():
        if len(tokens) > max(1, OVER_BUDGET * found.frames):
            raise CheckFailed(
                f"{len(tokens)} of {found.frames} frames of the pilot are over the budget of "
                f"preset {found.preset} in {name}, frame {tokens[0]} the first: choose --preset "
                "lossless or fast, or see the frames with --preset lossless and view"
            )
