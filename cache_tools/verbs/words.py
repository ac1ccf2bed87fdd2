"""What the verbs of `fd3d-cache` share: how they are declared, and what they print."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path

from cache_tools.bottleneck import BESIDE, FRONT
from cache_tools.build import BuildReport
from cache_tools.manifest import short

Run = Callable[[argparse.Namespace], None]

_SHAPE = argparse.RawDescriptionHelpFormatter


class Verbs:
    """The sub-commands of a parser in the making.

    Args:
        parser: of the whole command.
    """

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._found = parser.add_subparsers(metavar="VERB", required=True)

    def new(
        self, name: str, *, help: str, text: str, examples: str, run: Run
    ) -> argparse.ArgumentParser:
        """A verb that `run` carries out, with --json; its own flags are the caller's to add."""
        verb = self._found.add_parser(
            name, help=help, description=text, epilog=examples, formatter_class=_SHAPE
        )
        verb.add_argument("--json", action="store_true", help="one JSON object on stdout")
        verb.set_defaults(verb=run)
        return verb

    def of_a_cache(
        self, name: str, *, text: str, examples: str, run: Run
    ) -> argparse.ArgumentParser:
        """A verb whose first word is a cache."""
        verb = self.new(name, help=text, text=text, examples=examples, run=run)
        verb.add_argument("cache", type=Path, help="the cache folder, such as train.zarr")
        return verb


def names_in(words: str) -> list[str]:
    """The names in a comma-separated list."""
    return [name for name in map(str.strip, words.split(",")) if name]


def sayer(as_json: bool) -> Callable[[str], None]:
    """Prints for people; with --json stdout is for the machine alone."""
    return (lambda text: None) if as_json else (lambda text: print(text, flush=True))


def tell_build(report: BuildReport, out: Path, *, expert: bool = True) -> None:
    """Say what a build made, or, without an `expert`, an export or import; and what to run next."""
    print(
        f"{report.frames} frames ({report.built} built now), {report.bytes / 1e6:.1f} MB, "
        f"{report.ratio:.3f} of raw"
    )
    if report.built:
        each = {name: value / report.built for name, value in report.seconds.items()}
        front, beside = (
            ", ".join(f"{name} {each[name]:.3f}" for name in part) for part in (FRONT, BESIDE)
        )
        print(f"seconds a frame: {front}; beside them {beside}")
        if expert:
            print(report.bottleneck)
    for name, part in report.signals.items():
        if part.worst_error is not None:
            print(
                f"  {name}: relative error mean {100 * part.mean_error:.2f} %, worst "
                f"{100 * part.worst_error:.2f} % (frame {part.worst_token}), worst channel "
                f"{100 * part.worst_channel:.2f} %"
            )
        if part.over_budget:
            print(f"  {name}: {part.over_budget} frames are over the budget of its preset")
    print(f"signals id {short(report.signals_id)}, cache id {short(report.cache_id)}")
    if not report.complete:
        print(f"the cache has {report.frames} of {report.expected} frames: build the other parts")
        return
    path = shlex.quote(str(out))
    print(f"next: fd3d-cache verify {path}, fd3d-cache info {path}")
