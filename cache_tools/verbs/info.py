"""`fd3d-cache info`: what a cache is and how far it has come."""

from __future__ import annotations

import argparse
import json

from cache_tools.info import describe, survey
from cache_tools.verbs.words import Verbs

_INFO = """example:
  fd3d-cache info train.zarr --json | python -m json.tool"""


def add(verbs: Verbs) -> None:
    """The verb's flags, help and what runs it."""
    verbs.of_a_cache(
        "info", text="what a cache is and how far it has come", examples=_INFO, run=_info
    )


def _info(args: argparse.Namespace) -> None:
    found = survey(args.cache)
    print(json.dumps(found.to_dict()) if args.json else describe(found))
