"""What held a build up, in words, from the seconds of its stages.

Loading, the expert and waiting follow each other on one thread and add up to the time of the run;
encoding and writing happen beside them, and cost time only as far as the expert waits for them.
"""

from __future__ import annotations

from collections.abc import Mapping

# Stages of the thread that feeds the expert, and of the one that writes.
FRONT = ("load", "expert", "wait")
BESIDE = ("encode", "write")

_HELP = {
    "load": "loading is the bottleneck: the expert waited for inputs {share:.0f} % of the time; "
    "more readers (--workers) or a faster disk under the inputs would help",
    "expert": "the expert is the bottleneck: {share:.0f} % of the time; more --workers would not "
    "help, a faster device or other parts elsewhere (--part) would",
    "encode": "encoding is the bottleneck: the expert waited {share:.0f} % of the time, mostly for "
    "it; more processor cores or parts at once (--part) would help, a faster expert would not",
    "write": "the disk is the bottleneck: the expert waited {share:.0f} % of the time, mostly for "
    "it; a faster disk or a smaller --preset would help, a faster expert would not",
}


def bottleneck(seconds: Mapping[str, float]) -> str:
    """One sentence that names the slowest stage and what would help; "" where nothing ran.

    `seconds` has all of `FRONT` and `BESIDE`, or nothing.
    """
    total = sum(seconds.get(name, 0.0) for name in FRONT)
    if not total:
        return ""
    slowest = max(FRONT, key=lambda name: seconds[name])
    share = 100 * seconds[slowest] / total
    if slowest == "wait":
        slowest = max(BESIDE, key=lambda name: seconds[name])
    return _HELP[slowest].format(share=share)


def shares(seconds: Mapping[str, float]) -> str:
    """The stages of the feeding thread in per cent of its time, for a line of progress."""
    total = max(sum(seconds[name] for name in FRONT), 1e-9)
    return ", ".join(f"{name} {100 * seconds[name] / total:.0f} %" for name in FRONT)
