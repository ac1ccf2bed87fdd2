"""The manifest: what a cache is, complete before its first frame is built.

`signals_id` is a digest of everything that determines the values: expert, its tensors,
preprocessing, mode, data set, frames, signal definitions, and `NUMERICS_VERSION`. `cache_id` adds
how they are stored. Measured things (errors, times, machine, code version) are in report.json and
never in an id, so two honest builds of one thing have one id.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cache_tools import layout
from cache_tools.checksums import canonical_json, digest, parse_json
from cache_tools.manifest_fields import (
    Taker,
    check_spec,
    codec_from_dict,
    shallow,
    spec_from_dict,
    spec_to_dict,
)
from cache_tools.presets import SignalCodec, check_preset, codec_for
from fd3d.distill.signals import SignalSpec
from fd3d.durable import write_durably
from fd3d.errors import CheckFailed, UsageError

FORMAT = "fd3d-cache"
FORMAT_VERSION = 2

# Bump by hand when a change of our code changes what an expert's signals are worth.
NUMERICS_VERSION = 2

SHORT = 12

# A shard is put together in memory, and one file holds it.
MAX_SHARD_FRAMES = 4096

_RESTORE = "run fd3d-cache repair, or build the cache again in another --out"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Where the values come from. Any strings will do for experts and data of your own.

    Args:
        expert: the architecture's name.
        tensors: digest of its weights (`fd3d.models.checkpoints.tensors_digest`).
        preprocessing: everything that is done to the images, as plain JSON values.
        mode: what the target means under augmentation, see `fd3d.distill.signals.MODES`.
        dataset_version: of the data set, such as "v1.0-trainval".
        split: which of its splits.
        adjacency: the rule that picks the second frame of a two-frame expert.
        origin: for people, in no id: the checkpoint's file name, or the seed of random weights.
    """

    expert: str
    tensors: str
    preprocessing: Mapping[str, Any]
    mode: str
    dataset_version: str
    split: str
    adjacency: str = "test"
    origin: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that is known of a cache before it is built; see `make` and `load`.

    `bev_part` is the digest of that file (`fd3d.distill.bev_part`), "" where there is none. It is
    in no id: `identity.tensors` is.
    """

    identity: Identity
    numerics_version: int
    frames: int
    keys_digest: str
    signals: Mapping[str, SignalSpec]
    preset: str
    codecs: Mapping[str, SignalCodec]
    shard_frames: int
    bev_part: str = ""

    @property
    def signals_id(self) -> str:
        """Digest of what determines the values, 32 hex digits."""
        return digest(canonical_json(self._values_part()))

    @property
    def cache_id(self) -> str:
        """Digest of `signals_id` and how the values are stored, 32 hex digits."""
        return digest(canonical_json([self.signals_id, self._storage_part()]))

    @property
    def arrays(self) -> dict[str, layout.ArraySpec]:
        """The Zarr arrays that such a cache has, by name."""
        return layout.all_arrays(self.signals, self.codecs)

    @property
    def shards(self) -> int:
        return layout.shard_count(self.frames, self.shard_frames)

    def frames_of(self, shard: int) -> range:
        """Positions of a shard's frames."""
        return layout.frames_of(shard, frames=self.frames, shard_frames=self.shard_frames)

    def differences(self, other: Manifest) -> tuple[str, ...]:
        """Names of what makes the other's ids differ from ours, in the order of the manifest."""
        mine = {**self._values_part(), **self._storage_part()}
        theirs = {**other._values_part(), **other._storage_part()}
        return tuple(name for name in mine if mine[name] != theirs[name])

    def _values_part(self) -> dict[str, Any]:
        values = asdict(self.identity)
        values.pop("origin")
        return {
            **values,
            "numerics_version": self.numerics_version,
            "frames": self.frames,
            "keys_digest": self.keys_digest,
            "signals": {name: spec_to_dict(spec) for name, spec in self.signals.items()},
        }

    def _storage_part(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "preset": self.preset,
            "codecs": {name: asdict(codec) for name, codec in self.codecs.items()},
            "shard_frames": self.shard_frames,
        }


def make(
    *,
    identity: Identity,
    signals: Mapping[str, SignalSpec],
    keys: Sequence[str],
    preset: str,
    shard_frames: int,
    bev_part: bytes = b"",
) -> Manifest:
    """The manifest of a cache to be built; keys that repeat, no frames or no signals raise
    `UsageError`."""
    check_preset(preset)
    if not keys or not signals:
        raise UsageError("there is nothing to build: give at least one frame and one signal")
    if len(set(keys)) != len(keys) or not all(isinstance(k, str) and k for k in keys):
        raise UsageError(
            "frame keys must be non-empty strings, each once: check the list of frames"
        )
    if not 1 <= shard_frames <= MAX_SHARD_FRAMES:
        raise UsageError(
            f"--shard-frames {shard_frames} is not possible: use 1 to {MAX_SHARD_FRAMES}"
        )
    signals = {name: check_spec(name, signals[name]) for name in sorted(signals)}
    try:
        plain = json.loads(canonical_json(identity.preprocessing))
    except (TypeError, ValueError) as error:
        raise UsageError(f"preprocessing must be plain JSON values: {error}") from None
    manifest = Manifest(
        identity=Identity(**{**shallow(identity), "preprocessing": plain}),
        numerics_version=NUMERICS_VERSION,
        frames=len(keys),
        keys_digest=digest(canonical_json(list(keys))),
        signals=signals,
        preset=preset,
        codecs={name: codec_for(spec, preset) for name, spec in signals.items()},
        shard_frames=shard_frames,
        bev_part=digest(bev_part) if bev_part else "",
    )
    layout.all_arrays(manifest.signals, manifest.codecs)
    return manifest


def save(folder: Path, manifest: Manifest, metadata: Mapping[str, str]) -> None:
    """Write manifest.json; `metadata` holds the digests of the Zarr metadata files."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "signals_id": manifest.signals_id,
        "cache_id": manifest.cache_id,
        "identity": shallow(manifest.identity),
        "numerics_version": manifest.numerics_version,
        "frames": manifest.frames,
        "keys_digest": manifest.keys_digest,
        "signals": {name: spec_to_dict(spec) for name, spec in manifest.signals.items()},
        "preset": manifest.preset,
        "codecs": {name: asdict(codec) for name, codec in manifest.codecs.items()},
        "shard_frames": manifest.shard_frames,
        "bev_part": manifest.bev_part,
        "metadata": dict(metadata),
    }
    content["checksum"] = digest(canonical_json(content))
    write_durably(folder / layout.MANIFEST, json.dumps(content, indent=1).encode())


def load(folder: Path) -> Manifest:
    """The manifest of the cache at `folder`, checked to the last field.

    What is not a cache or of another version raises `UsageError`; a manifest or Zarr metadata
    that was damaged or edited raises `CheckFailed`.
    """
    path = Path(folder) / layout.MANIFEST
    if not Path(folder).exists():
        raise UsageError(f"there is no cache at {folder}: check the path, or make it with build")
    try:
        content = parse_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if (Path(folder) / layout.SPARE).exists():
            raise CheckFailed(f"{path} is missing: {_RESTORE}") from None
        raise UsageError(
            f"{folder} is not a cache of this project, it has no {path.name}: give the folder that "
            "fd3d-cache build made"
        ) from None
    except ValueError:
        raise CheckFailed(f"{path} is damaged (not JSON): {_RESTORE}") from None
    return _parse(content, folder=Path(folder))


def load_tokens(folder: Path, manifest: Manifest) -> tuple[str, ...]:
    """The frame keys in the order of the arrays, checked against the manifest."""
    path = Path(folder) / layout.TOKENS
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckFailed(f"{path} is missing: {_RESTORE}") from None
    if digest(content) != manifest.keys_digest:
        raise CheckFailed(f"{path} is damaged (not what the manifest names): {_RESTORE}")
    return tuple(json.loads(content))


def short(identifier: str) -> str:
    """The first digits of an id, as people see it."""
    return identifier[:SHORT]


def _parse(content: Any, *, folder: Path) -> Manifest:
    path = folder / layout.MANIFEST
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{folder} is not a cache of this project: {path.name} is not ours")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise UsageError(
            f"{path} has cache format {version}, this code reads {FORMAT_VERSION}: "
            f"use the release that wrote it, or build the cache again"
        )
    # Before the fields: a damaged one must not pass for a fault of whoever built the cache.
    rest = {key: value for key, value in content.items() if key != "checksum"}
    if content.get("checksum") != digest(canonical_json(rest)):
        raise CheckFailed(f"{path} was damaged or edited: {_RESTORE}")
    take = Taker(path, rest)
    named = (take("signals_id", str), take("cache_id", str))
    metadata = take("metadata", dict)
    identity = Taker(path, take("identity", dict), "identity.")
    manifest = Manifest(
        identity=Identity(
            **{
                field.name: identity(field.name, dict if field.name == "preprocessing" else str)
                for field in fields(Identity)
            }
        ),
        numerics_version=take("numerics_version", int),
        frames=take("frames", int),
        keys_digest=take("keys_digest", str),
        signals={
            name: spec_from_dict(Taker(path, values, f"signals.{name}."))
            for name, values in sorted(take("signals", dict).items())
        },
        preset=take("preset", str),
        codecs={
            name: codec_from_dict(Taker(path, values, f"codecs.{name}."))
            for name, values in sorted(take("codecs", dict).items())
        },
        shard_frames=take("shard_frames", int),
        bev_part=take("bev_part", str),
    )
    identity.finish()
    take.finish("format", "format_version")
    if named != (manifest.signals_id, manifest.cache_id):
        raise CheckFailed(f"{path} was damaged or edited: its ids and its contents disagree")
    _check_metadata(folder, manifest, metadata)
    return manifest


def metadata_digests(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Digests of the Zarr metadata files of a cache; a missing one raises `FileNotFoundError`."""
    names = layout.metadata_files(manifest.arrays)
    return {name: digest((folder / name).read_bytes()) for name in names}


def _check_metadata(folder: Path, manifest: Manifest, expected: Mapping[str, str]) -> None:
    try:
        found = metadata_digests(folder, manifest)
    except FileNotFoundError as error:
        raise CheckFailed(f"{error.filename} is missing: {_RESTORE}") from None
    for name, value in found.items():
        if expected.get(name) != value:
            raise CheckFailed(f"{folder / name} was damaged or edited: {_RESTORE}")
