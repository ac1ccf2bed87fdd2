"""The tables of `gain.py`: mean scores of every row, and its paired differences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

# The data seed for choosing.
TUNING = 11
SCORES = ("nds", "map")
# Of the cache that a row without a preset reads.
BALANCED = "balanced"


def parts_of(row: str) -> tuple[str, str, str]:
    """The name in `ROWS`, the preset and the factor ("" = 1) of a row."""
    row, _, factor = row.partition("@")
    name, _, preset = row.partition("/")
    return name, preset or BALANCED, factor


def differences(runs: Sequence[dict], row: str, score: str, base: str) -> list[float]:
    """Row minus base in points, of every (data seed, training seed) that has both."""
    other = {(run["data_seed"], run["seed"]): run[score] for run in runs if run["row"] == base}
    own = {(run["data_seed"], run["seed"]): run[score] for run in runs if run["row"] == row}
    return [100 * (own[pair] - other[pair]) for pair in own if pair in other]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval of a mean; the latter NaN for fewer than two."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    reach = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(np.mean(values)), float(reach)


def report(records: Sequence[dict], base: str = "none") -> str:
    """Tables in Markdown: every setting and data seed, then those for reporting together.

    The last holds the rows that more than one of them has.
    """
    tables = []
    for setting in sorted({run["setting"] for run in records}):
        own = [run for run in records if run["setting"] == setting]
        seeds = sorted({run["data_seed"] for run in own})
        for seed in seeds:
            runs = [run for run in own if run["data_seed"] == seed]
            tables.append(_table(f"Setting `{setting}`, data seed {seed}", runs, base))
        told = [run for run in own if run["data_seed"] != TUNING]
        both = [
            run
            for run in told
            if len({other["data_seed"] for other in told if other["row"] == run["row"]}) > 1
        ]
        if both:
            names = " and ".join(str(seed) for seed in seeds if seed != TUNING)
            tables.append(_table(f"Setting `{setting}`, data seeds {names}", both, base))
    return "\n\n".join(tables)


def _table(title: str, runs: Sequence[dict], base: str) -> str:
    lines = [
        f"{title}:",
        "",
        f"| row | runs | NDS | mAP | NDS against `{base}` | mAP against `{base}` |",
        "|---|---|---|---|---|---|",
    ]
    names = sorted({run["row"] for run in runs})
    rows = {row: [run for run in runs if run["row"] == row] for row in names}
    for row, own in sorted(rows.items(), key=lambda item: _mean(item[1], "nds")):
        told = [_against(runs, row, score, base) if row != base else "" for score in SCORES]
        means = " | ".join(f"{100 * _mean(own, score):.1f}" for score in SCORES)
        lines.append(f"| `{row}` | {len(own)} | {means} | {' | '.join(told)} |")
    return "\n".join(lines)


def _mean(runs: Sequence[dict], score: str) -> float:
    return float(np.mean([run[score] for run in runs]))


def _against(runs: Sequence[dict], row: str, score: str, base: str) -> str:
    """A row's paired difference to another, with half of its interval; "" without pairs."""
    values = differences(runs, row, score, base)
    if not values:
        return ""
    mean, reach = interval(values)
    if len(values) == 1:
        return f"{mean:+.1f} (1 pair)"
    own = sum(run["row"] == row for run in runs)
    pairs = f" ({len(values)} pairs)" if len(values) < own else ""
    return f"{mean:+.1f} ± {reach:.1f}{pairs}"
