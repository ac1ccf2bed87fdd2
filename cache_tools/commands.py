"""The command line `fd3d-cache`; each verb is in `cache_tools.verbs`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from cache_tools.verbs import bring, build, check, derive, info, look, mistakes, plan, probe
from cache_tools.verbs.words import Verbs

_TOP = """An expert is run once over a split; apprentices then learn from its cached signals.

  fd3d-cache plan ...    what a cache will cost in each preset, from a few frames
  fd3d-cache build ...   run the expert, store its signals; goes on where a killed build stopped
  fd3d-cache probe ...   what a target under augmentation costs in each mode
  fd3d-cache import D O  a cache of signals that an expert wrote elsewhere
  fd3d-cache info C      what a cache is, how far it has come, how to use it
  fd3d-cache view C F    a picture of one frame
  fd3d-cache mistakes C  what the expert missed and made up, by class
  fd3d-cache verify C    check every byte; ask the expert again, score the cached maps
  fd3d-cache export C O  the same signals in another preset, or of fewer frames
  fd3d-cache compare C D how far two caches' signals are apart
  fd3d-cache repair C    mend metadata, let the next build make damaged shards anew
  fd3d-cache prune C     list or remove what killed builds left

Exit codes: 0 done, 1 a check or the run failed, 2 wrong usage. `fd3d-cache VERB --help` has
examples."""


def run(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; how it may end badly is in `fd3d.errors`."""
    parser = argparse.ArgumentParser(
        prog="fd3d-cache",
        description=_TOP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = Verbs(parser)
    for module in (plan, build, probe, bring, info, look, mistakes, check, derive):
        module.add(verbs)
    parsed = parser.parse_args(arguments)
    parsed.verb(parsed)
