"""The signal source that reads what the expert once said; its counterpart runs the expert
(`fd3d.distill.live.LiveSource`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_tools.checksums import canonical_json, digest
from cache_tools.expectation import Expectation, check_signals
from cache_tools.reader import CacheReader
from fd3d.data.batch import Batch
from fd3d.distill import replay
from fd3d.distill.handover import EXACT
from fd3d.distill.signals import SignalSpec, check_follows, check_mode, parts_of
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid


class CachedExpert:
    """Yields an expert's signals from a cache, in the shapes and dtypes of `LiveSource`.

    `load` belongs in the data loader's workers, `signals` in the training loop.

    Args:
        path: a finished cache.
        names: which signals to yield.
        mode: what the target means under augmentation. relift needs the signal `lift`, whose parts
            become a map in `fd3d.distill.relift.Relift`; it, clean and moved read what an
            un-augmented expert said. replay needs the signal `replay`: `bev` is then the map under
            the augmentation of the frame that `load` is given. regate cannot be cached.
        expect: what else the cache must be, an `Expectation` or a mapping of some of its fields.
        areas: maps are looked at near objects only, so preset focal will do. Its maps come with
            "exact", (1, Y, X), 1 where they are.
        partial: a cache that is not finished will do; `present` has the frames that it holds now.
    """

    def __init__(
        self,
        path: str | Path,
        names: Sequence[str] = ("bev",),
        mode: str = "clean",
        expect: Expectation | Mapping[str, Any] | None = None,
        areas: bool = False,
        partial: bool = False,
    ) -> None:
        self.mode = check_mode(mode)
        if mode == "regate":
            raise UsageError(
                "no cache can hold what an expert says of augmentations that are drawn later: use "
                "mode relift or replay, or --source live"
            )
        check_follows(names, mode)
        self.reader = CacheReader(
            path,
            expect=dataclasses.replace(_expectation(expect), mode="clean"),
            allow_partial=partial,
        )
        replays = replay.count_of(self.reader.specs)
        if mode == "replay":
            names = ("replay",)
        self.names = parts_of(names, replays)
        check_signals(self.reader.path, self.reader.manifest, self.names)
        # How many augmentations of each frame mode replay may be asked for.
        self.replays = replays if mode == "replay" else 0
        codecs = self.reader.manifest.codecs
        self._focal = next((name for name in self.names if codecs[name].coarse), None)
        if self._focal and not areas:
            raise UsageError(
                f"{path} is of preset focal, whose maps are exact near objects only, and this use "
                "looks at whole maps: use a cache of another preset, or a distiller that looks at "
                "objects (heatmap; fd3d with --terms gen_bev --areas gt)"
            )

    @property
    def specs(self) -> dict[str, SignalSpec]:
        if self.replays:
            return {"bev": dataclasses.replace(self.reader.specs[replay.part(0)], name="bev")}
        specs = {name: self.reader.specs[name] for name in self.names}
        if self._focal:
            grid = specs[self._focal].grid
            specs[EXACT] = SignalSpec(
                name=EXACT, shape=(1, *grid.shape), dtype="float16", grid=grid
            )
        return specs

    @property
    def present(self) -> tuple[str, ...]:
        """The keys of the frames that can be read, in the order of the cache."""
        return tuple(token for token in self.reader.tokens if token in self.reader)

    @property
    def grid(self) -> BEVGrid:
        """The grid of the maps; a cache without a map raises `UsageError`."""
        grids = [spec.grid for spec in self.reader.specs.values() if spec.grid is not None]
        if not grids:
            raise UsageError(f"{self.reader.path} holds no BEV map: build one with --signals bev")
        return grids[0]

    @property
    def ids(self) -> dict[str, str]:
        """What a checkpoint or log should record about this source."""
        who = self.reader.manifest.identity
        present = self.present
        rest = (
            {}
            if len(present) == len(self.reader)
            else {"frames": digest(canonical_json(list(present)))}
        )
        return {
            **rest,
            "signals_id": self.signals_id,
            "cache_id": self.cache_id,
            "expert": f"{who.expert} {who.tensors}",
            "mode": self.mode,
        }

    @property
    def signals_id(self) -> str:
        return self.reader.signals_id

    @property
    def cache_id(self) -> str:
        return self.reader.cache_id

    def load(self, token: str, frame: Batch | None = None) -> dict[str, np.ndarray]:
        """The signals of one frame as stored (float16 maps, float32 tables).

        `frame` is the apprentice's view of it, whose BEV augmentation mode replay looks up; one
        that the cache does not replay raises `UsageError`.
        """
        if self.replays:
            if frame is None or frame.bev_augment is None:
                raise UsageError("mode replay needs the apprentice's view of a frame: give load it")
            stored = self.reader.read(token, (replay.AUGMENT,))[replay.AUGMENT]
            name = replay.part(replay.number_of(stored, frame))
            return {"bev": self.reader.read(token, (name,))[name]}
        found = self.reader.read(token, self.names)
        if self._focal:
            found[EXACT] = self.reader.exact(token, self._focal)[None].astype(np.float16)
        return found

    def signals(
        self, loaded: Sequence[dict[str, np.ndarray]], device: torch.device | str = "cpu"
    ) -> dict[str, Tensor | list[Tensor]]:
        """What `load` gave for B frames as float32: maps (B, C, Y, X), tables a list of B."""
        found: dict[str, Tensor | list[Tensor]] = {}
        for name, spec in self.specs.items():
            # Moved as float16: half the bytes to the device.
            frames = [
                torch.from_numpy(frame[name]).to(device, non_blocking=True) for frame in loaded
            ]
            if spec.ragged:
                found[name] = [frame.float() for frame in frames]
            else:
                found[name] = torch.stack(frames).float()
        return found


def _expectation(expect: Expectation | Mapping[str, Any] | None) -> Expectation:
    if isinstance(expect, Expectation):
        return expect
    try:
        return Expectation(**(expect or {}))
    except TypeError as error:
        known = ", ".join(field.name for field in fields(Expectation))
        raise UsageError(f"{error}: a cache can be expected to have a certain {known}") from None
