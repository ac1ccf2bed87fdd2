"""Mending a cache: metadata from its spare copy, shards by letting a build make them anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cache_tools import layout, lease, manifest, records, spare
from cache_tools.parts import WHOLE
from cache_tools.verify import Problem, verify
from cache_tools.writer import forget
from fd3d.durable import write_durably
from fd3d.errors import CheckFailed, UsageError


@dataclass(frozen=True, kw_only=True)
class RepairReport:
    """What `repair` did: metadata files that it `restored`, the `problems` that it found in data
    files and the `shards` whose records it removed for them. Of `expected` frames so many are
    there and sound."""

    path: str
    cache_id: str
    restored: tuple[str, ...]
    problems: tuple[Problem, ...]
    shards: tuple[int, ...]
    frames: int
    expected: int

    @property
    def complete(self) -> bool:
        """True when nothing is left for a build to mend."""
        return self.frames == self.expected and all(one.shard is not None for one in self.problems)


def repair(path: str | Path, *, quiet: bool = True) -> RepairReport:
    """Restore damaged metadata, check every byte, and forget the shards that are damaged.

    Forgotten shards lose their commit record, so readers no longer find their frames and the next
    build makes them anew; their files stay until then. Metadata that is damaged in both copies
    raises `CheckFailed`; a cache that is being built, and what is not a cache, `UsageError`.
    """
    folder = Path(path)
    holders = lease.holders(folder)
    if holders:
        raise UsageError(
            f"{folder} is being built by {', '.join(map(str, holders))}: repair it afterwards"
        )
    restored = _restore_metadata(folder)
    # No build may begin while records are judged: a new one would be taken for the damaged one.
    with lease.held(folder, WHOLE):
        report = verify(folder, quiet=quiet)
        shards = tuple(sorted({one.shard for one in report.problems if one.shard is not None}))
        for shard in shards:
            forget(folder, shard)
        cache = manifest.load(folder)
        done, _ = records.load_all(folder, cache)
    return RepairReport(
        path=str(folder),
        cache_id=cache.cache_id,
        restored=restored,
        problems=report.problems,
        shards=shards,
        frames=sum(len(record.tokens) for record in done.values()),
        expected=cache.frames,
    )


def _restore_metadata(folder: Path) -> tuple[str, ...]:
    copy = spare.load(folder)
    try:
        cache = manifest.load(folder)
        manifest.load_tokens(folder, cache)
    except (CheckFailed, UsageError):
        if copy is None:
            raise
    else:
        if copy is None or spare.differing(folder, copy):
            spare.save(folder, cache)
            return (layout.SPARE,)
        return ()
    wrong = spare.differing(folder, copy)
    for name in wrong:
        (folder / name).parent.mkdir(exist_ok=True)
        write_durably(folder / name, copy[name])
    manifest.load(folder)
    return tuple(wrong)
