"""Progress of long work: a bar on a terminal, one plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

_LINE_EVERY_SECONDS = 15.0


class Progress:
    """Counts `unit`s towards `total` on stderr with rate and ETA; use as a context manager.

    Args:
        total: how many units the work has.
        unit: what is counted, in the plural ("frames").
        title: the first words of every line.
        done: units that an earlier run had finished already; the rate leaves them out.
        quiet: print nothing at all (for --json).
    """

    def __init__(
        self, *, total: int, unit: str, title: str, done: int = 0, quiet: bool = False
    ) -> None:
        self.total, self.unit, self.title = total, unit, title
        self.done = self._first = done
        self._quiet = quiet
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit=f" {unit}", desc=title)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._line()

    @property
    def rate(self) -> float:
        """Units a second in this run."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` more; `note` is shown behind the figures."""
        self.done += units
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(units)
        elif time.monotonic() - self._last_line >= _LINE_EVERY_SECONDS:
            self._line(note)

    def _line(self, note: str = "") -> None:
        self._last_line = time.monotonic()
        if self._quiet:
            return
        left = (self.total - self.done) / self.rate if self.rate > 0 else float("inf")
        eta = f", {left:.0f} s left" if 0 < left < float("inf") else ""
        tail = f", {note}" if note else ""
        print(
            f"{self.title}: {self.done}/{self.total} {self.unit}, "
            f"{self.rate:.1f} {self.unit}/s{eta}{tail}",
            file=sys.stderr,
            flush=True,
        )
