"""The tables of `gain.py`: mean scores of every row, and its paired differences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import stats

# Of the cache that a row without a preset reads, and of the one that presets are held against.
BALANCED, LOSSLESS = "balanced", "lossless"


def parts_of(row: str) -> tuple[str, str, str]:
    """The name in `ROWS`, the preset and the factor ("" = 1) of a row."""
    row, _, factor = row.partition("@")
    name, _, preset = row.partition("/")
    return name, preset or BALANCED, factor


def differences(
    runs: Sequence[dict], row: str, score: str, base: str = "none"
) -> Iterator[tuple[int, float]]:
    """(data seed, row minus base in points) of every pair that has both."""
    other = {(run["data_seed"], run["seed"]): run[score] for run in runs if run["row"] == base}
    for run in runs:
        key = (run["data_seed"], run["seed"])
        if run["row"] == row and key in other:
            yield key[0], 100 * (run[score] - other[key])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval of a mean; the latter NaN for fewer than two."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    reach = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(np.mean(values)), float(reach)


def report(records: Sequence[dict]) -> str:
    """The tables of all settings and data seeds, as text."""
    lines = []
    groups = defaultdict(list)
    for run in records:
        groups[run["setting"], run["data_seed"]].append(run)
        groups[run["setting"], "all but 11"] += [run] if run["data_seed"] != 11 else []
    for (setting, data_seed), runs in sorted(groups.items(), key=lambda item: str(item[0])):
        if not runs:
            continue
        lines.append(f"\nsetting {setting}, data seed {data_seed}: points of NDS and mAP")
        lines.append(f"{'row':<24}{'runs':>5}{'NDS':>8}{'mAP':>8}{'s/step':>9}   paired to none")
        for row in dict.fromkeys(run["row"] for run in runs):
            own = [run for run in runs if run["row"] == row]
            line = f"{row:<24}{len(own):>5}"
            line += "".join(f"{100 * np.mean([r[s] for r in own]):8.2f}" for s in ("nds", "map"))
            line += f"{np.median([run['seconds_per_step'] for run in own]):9.3f}"
            if row != "none":
                line += _against(runs, row, "none")
            name, preset, _ = parts_of(row)
            told = _against(runs, row, f"{name}/{LOSSLESS}")
            lines.append(line)
            if told and preset != LOSSLESS:
                lines.append(f"{'':>8}against {LOSSLESS}{told}")
    return "\n".join(lines)


def _against(runs: Sequence[dict], row: str, base: str) -> str:
    """A row's paired differences to another; "" where there are no pairs."""
    told = ""
    for score in ("nds", "map"):
        values = [value for _, value in differences(runs, row, score, base)]
        if values:
            mean, reach = interval(values)
            told += f"   {score} {mean:+.2f} +- {reach:.2f} (n={len(values)})"
    return told
