"""Checking every byte of a cache against its commit records, and decoding every frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cache_tools import layout, lease, records, spare
from cache_tools.checksums import file_digest, size_and_crc32c
from cache_tools.manifest import Manifest
from cache_tools.reader import CacheReader
from fd3d.errors import CheckFailed
from fd3d.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One damaged file: its shard (None = the file is not of one), its path inside the cache, what
    is wrong, and the frames that cannot be trusted for it."""

    shard: int | None
    file: str
    what: str
    tokens: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What `verify` found. `frames` have a record, of `expected`; `leftovers` are files that no
    record names: left by a killed build, harmless, overwritten or swept by the next."""

    path: str
    cache_id: str
    expected: int
    frames: int
    bytes: int
    problems: tuple[Problem, ...]
    leftovers: tuple[str, ...]

    @property
    def complete(self) -> bool:
        return self.frames == self.expected

    @property
    def ok(self) -> bool:
        """True for a finished cache without damage."""
        return self.complete and not self.problems


def verify(path: str | Path, *, quiet: bool = True) -> VerifyReport:
    """Walk every record of the cache: lengths, crc32c of whole files, and the decoding of every
    tile of every frame (each has a crc32c of its own).

    A manifest or Zarr metadata that is itself damaged raises `CheckFailed`; what is not a cache
    raises `UsageError`.
    """
    folder = Path(path)
    reader = CacheReader(folder, allow_partial=True)
    cache = reader.manifest
    done, damaged = records.load_all(folder, cache)
    problems = [
        Problem(shard=shard, file=found.file, what=found.what, tokens=_tokens(reader, shard))
        for shard, found in damaged.items()
    ]
    if cache.bev_part and file_digest(folder / layout.BEV_PART) != cache.bev_part:
        what = "is missing or not what the manifest names"
        problems.append(Problem(shard=None, file=layout.BEV_PART, what=what, tokens=()))
    copy = spare.load(folder)
    if copy is None or spare.differing(folder, copy):
        what = "is missing, damaged or not a copy of the metadata; repair writes it anew"
        problems.append(Problem(shard=None, file=layout.SPARE, what=what, tokens=()))
    total = 0
    with Progress(total=cache.frames, unit="frames", title="verifying", quiet=quiet) as progress:
        for record in done.values():
            problems += _check_shard(folder, reader, record)
            total += sum(size for size, _ in record.files.values())
            progress.advance(len(record.tokens))
    return VerifyReport(
        path=str(folder),
        cache_id=cache.cache_id,
        expected=cache.frames,
        frames=sum(len(record.tokens) for record in done.values()),
        bytes=total,
        problems=tuple(sorted(problems, key=lambda one: -1 if one.shard is None else one.shard)),
        leftovers=find_leftovers(folder, cache, done),
    )


def _check_shard(folder: Path, reader: CacheReader, record: records.Record) -> list[Problem]:
    tokens = _tokens(reader, record.shard)
    if record.tokens != tokens:
        what = "names other frames than the manifest"
        file = layout.record_file(record.shard)
        return [Problem(shard=record.shard, file=file, what=what, tokens=tokens)]
    undecodable = _undecodable(reader, tokens)
    problems = []
    for file, (_, wanted) in record.files.items():
        found = size_and_crc32c(folder / file)[1]
        if found != wanted:
            what = f"crc32c is {found}, its record says {wanted}"
            # Nothing fails to decode when the record, not the file, is of another day.
            names = tuple(undecodable) or tokens
            problems.append(Problem(shard=record.shard, file=file, what=what, tokens=names))
    if undecodable and not problems:
        what = next(iter(undecodable.values()))
        file = layout.record_file(record.shard)
        problems.append(
            Problem(shard=record.shard, file=file, what=what, tokens=tuple(undecodable))
        )
    return problems


def _undecodable(reader: CacheReader, tokens: Sequence[str]) -> dict[str, str]:
    found = {}
    for token in tokens:
        try:
            reader.read(token)
        except CheckFailed as error:
            found[token] = str(error)
    return found


def _tokens(reader: CacheReader, shard: int) -> tuple[str, ...]:
    cache = reader.manifest
    frames = cache.frames_of(shard)
    return reader.tokens[frames.start : frames.stop]


def find_leftovers(
    folder: Path, cache: Manifest, done: Mapping[int, records.Record]
) -> tuple[str, ...]:
    """Paths inside the cache of files that are neither its own nor named by the valid records
    `done`, leases aside."""
    own = {layout.MANIFEST, layout.TOKENS, layout.REPORT, layout.SPARE, layout.BEV_PART}
    own |= set(layout.metadata_files(cache.arrays))
    own |= {layout.record_file(shard) for shard in range(cache.shards)}
    own |= {file for record in done.values() for file in record.files}
    files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return tuple(sorted(file for file in set(files) - own if not lease.is_lease(file)))
