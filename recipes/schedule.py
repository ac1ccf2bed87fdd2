"""How the learning rate goes, how fast the steps are, and how many of them a time allows."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

# A run with --minutes sets its number of steps by its pace after so many steps, and again after
# twice as many, until the rate first drops: the first steps may be slow for reasons that pass.
_PACE_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then the base rate divided by ten after 2/3 and 11/12 of all steps.

    Over 24 epochs these are the ends of epochs 16 and 22. The rate is a plain function of the
    step, so it is the same for any number of processes and after any resume.
    """

    base: float
    warmup: int
    steps: int

    def at(self, step: int) -> float:
        """Learning rate of step 0, 1, ... `steps` - 1."""
        rate = self.base
        if step < self.warmup:
            rate *= 1 - (1 - step / self.warmup) * (1 - 1e-3)
        return rate * 0.1 ** sum(step >= drop for drop in self.drops)

    @property
    def drops(self) -> tuple[int, int]:
        """The steps from which the rate is a tenth and a hundredth."""
        return round(self.steps * 2 / 3), round(self.steps * 11 / 12)


class Pace:
    """Seconds of each step, and of them those spent waiting for the loader."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.waits: list[float] = []
        self.began = self._mark = time.monotonic()

    def watch(self, batches: Iterable) -> Iterator:
        """The batches; a step is timed from asking for its batch to `done`."""
        self._mark = time.monotonic()
        for item in batches:
            self.waits.append(time.monotonic() - self._mark)
            yield item
            self._mark = time.monotonic()

    def done(self) -> None:
        self.steps.append(time.monotonic() - self._mark)


def measures_pace(step: int, schedule: Schedule) -> bool:
    """Whether `step` is one of 20, 40, 80, ... before the first drop of the rate."""
    times, rest = divmod(step, _PACE_STEPS)
    return times > 0 and rest == 0 and times & (times - 1) == 0 and step < schedule.drops[0]


def fit_in(
    args: argparse.Namespace,
    planned: int,
    step: int,
    pace: Pace,
    accelerator: Accelerator,
) -> Schedule:
    """The planned schedule, shortened to `--minutes` by the pace of the slowest process so far.

    It never ends so soon that the rate would drop at once.
    """
    mine = torch.tensor([statistics.median(pace.steps)], device=accelerator.device)
    slowest = float(accelerator.gather(mine).max())
    steps = min(planned, max(2 * step, int(args.minutes * 60 / slowest)))
    if steps < planned:
        accelerator.print(
            f"{Path(args.out).name}: {slowest:.2f} s a step, so {steps} of {planned} steps to end "
            f"within --minutes {args.minutes:g}"
        )
    return Schedule(base=args.lr, warmup=min(args.warmup, steps // 4), steps=steps)
