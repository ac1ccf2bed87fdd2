"""How a batch and an expert's signals for it come from loader workers to the trainer.

One path for every recipe:

    handover = Handover(source=source, frames=batch, workers=workers, device=device)
    dataset = PairedFrames(frames=frames, load=handover.load)
    loader = DataLoader(dataset, batch_size=batch, num_workers=workers, collate_fn=collate_pairs)
    for batch, loaded in loader:
        signals = handover.signals(loaded)

Workers read and decode the maps, on the CPU path also resample them to the grid of comparison, and
leave them in shared memory (`fd3d.distill.ring`). Results do not depend on the number of workers or
on how they are started.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from fd3d.data.batch import Batch, collate
from fd3d.distill.ahead import Pinned
from fd3d.distill.live import SignalSource
from fd3d.distill.moves import Move, moves_of
from fd3d.distill.relift import Relift
from fd3d.distill.ring import SLOTS, MapLayout, Ring, Ticket
from fd3d.distill.signals import LIFT, SignalSpec
from fd3d.errors import CheckFailed
from fd3d.grid import BEVGrid

# A map of this name says where a source's maps are more than stand-ins, and with which share of a
# cell of the grid of comparison that cell still counts.
EXACT = "exact"
_WHOLLY = 0.999

# Seconds in which the signal that a child has ended surely comes.
_SIGNAL = 0.2


@dataclass(frozen=True, kw_only=True)
class InRing:
    """A loaded batch whose maps lie in the ring; `rest` has what else each frame has (tables)."""

    ticket: Ticket
    rest: tuple[dict[str, Any], ...]


class Load:
    """What a worker runs for the frames of a batch; cheap to send to a spawned worker.

    Args:
        load: of the source, for one frame and the apprentice's view of it.
        ring: where maps go; None = what was loaded travels as the loader sends it.
        moves: of maps that are resampled here, by name.
    """

    def __init__(
        self,
        *,
        load: Callable[[str, Batch | None], Any],
        ring: Ring | None = None,
        moves: dict[str, Move] | None = None,
    ) -> None:
        self._load, self._ring, self._moves = load, ring, moves or {}

    def __call__(self, tokens: Sequence[str], frames: Sequence[Batch]) -> list[Any] | InRing:
        """What `Handover.signals` takes, for B frames: their keys, and the apprentice's view."""
        if self._ring is None or get_worker_info() is None:
            return [
                self._moved(self._load(token, frame), frame)
                for token, frame in zip(tokens, frames, strict=True)
            ]
        with self._ring.filling(len(tokens)) as (ticket, maps):
            rest = tuple(
                self._fill(
                    self._load(token, frame), {name: maps[name][row] for name in maps}, frame
                )
                for row, (token, frame) in enumerate(zip(tokens, frames, strict=True))
            )
        return InRing(ticket=ticket, rest=rest)

    def _moved(self, found: Any, frame: Batch) -> Any:
        if not self._moves:
            return found
        moved = dict(found)
        for name, move in self._moves.items():
            stored = torch.from_numpy(found[name])[None]
            there, _ = move(stored, frame, dtype=stored.dtype)
            moved[name] = there[0].numpy()
        return moved

    def _fill(self, found: dict[str, Any], maps: dict[str, Tensor], frame: Batch) -> dict[str, Any]:
        for name, slot in maps.items():
            stored = torch.from_numpy(found[name])
            if name in self._moves:
                self._moves[name](stored[None], frame, out=slot[None])
            else:
                slot.copy_(stored)
        return {name: value for name, value in found.items() if name not in maps}


class Handover:
    """A signal source for whole batches, whose loading is done by loader workers.

    Args:
        source: whose `load` gives a dict of arrays as its `specs` say, as
            `cache_tools.source.CachedExpert`; with workers=0 and without a grid any other too.
        frames: of the largest batch.
        workers: of the loader; 0 = no ring, what was loaded travels as the loader sends it.
        grid: of comparison, to which maps are resampled as intensities; any one, also in the
            other frame of `fd3d.grid.FRAMES`. On the CPU by the workers, rounded
            to the dtype that they are stored in; on CUDA by the device, which gets the maps as
            stored. None = as stored.
        relift: makes `bev` of the parts of `lift`, which `source` yields, on the device.
        follow: maps are moved as the apprentice's BEV augmentation moves the ground (mode `moved`).
        live: what `load` gives becomes maps only in `source.signals`, as `LiveSource` does; they
            are resampled after it.
        device: where the trainer wants the signals.
        slots: batches in flight for each worker, see `Ring`.
    """

    def __init__(
        self,
        *,
        source: SignalSource,
        frames: int,
        workers: int,
        grid: BEVGrid | None = None,
        device: torch.device | str = "cpu",
        slots: int = SLOTS,
        relift: Relift | None = None,
        follow: bool = False,
        live: bool = False,
    ) -> None:
        self._source = source
        self._relift = relift
        self._device = torch.device(device)
        self.ids = source.ids
        given = source.specs
        if relift is not None:
            given = {n: spec for n, spec in given.items() if n not in LIFT} | relift.specs
        self.grid = grid
        if grid is None:
            self.grid = source.grid if relift is None else relift.grid
        moves = moves_of(given, grid, follow=follow)
        self.specs = {
            name: moves[name].moved(spec) if name in moves else spec
            for name, spec in given.items()
            if name != EXACT
        }
        on_device = self._device.type == "cuda"
        late = on_device or live or relift is not None
        self._late_moves = moves if late else {}
        # Where the grid reaches beyond a map, or a moved map beyond itself.
        self._edges = next((move for move in moves.values() if move.leaves_gaps), None)
        self._ring = None
        layout = _layout(source.specs, {} if late else moves)
        if workers and layout:
            self._ring = Ring(layout=layout, frames=frames, workers=workers, slots=slots)
        self.load = Load(load=source.load, ring=self._ring, moves=None if late else moves)
        self._pinned = Pinned(self._device) if on_device else None
        self._kept: dict[str, Tensor] = {}

    def signals(
        self, loaded: list[Any] | InRing, frames: Batch | None = None
    ) -> dict[str, Tensor | list[Tensor]]:
        """Maps as (B, C, Y, X) float32 on the device, tables as B tensors, in the order loaded.

        `frames` are the apprentice's, still on the CPU, needed where the grid of comparison lies
        in another frame than the expert's, and for `relift`. "valid", (B, 1, Y, X) bool, is there
        where not every cell counts: the expert did not see all of them, or the source has only
        some (a map `EXACT` that is 1 there).

        On the CPU the maps that came through the ring are in memory that the next call writes to;
        autograd refuses a backward pass that still needs what it overwrote.
        """
        if not isinstance(loaded, InRing):
            found = self._source.signals(loaded, self._device)
        else:
            with self._ring.reading(loaded.ticket) as maps:
                found = self._pinned.send(maps) if self._pinned else self._copied(maps)
            for name in loaded.rest[0]:
                rows = [torch.from_numpy(frame[name]) for frame in loaded.rest]
                found[name] = [row.to(self._device, non_blocking=True).float() for row in rows]
        if self._relift is not None:
            bev = self._relift(found, frames)
            found = {n: value for n, value in found.items() if n not in LIFT} | {"bev": bev}
        for name, move in self._late_moves.items():
            found[name] = move(found[name], frames)[0]
        found = {
            name: value.float() if isinstance(value, Tensor) else value
            for name, value in found.items()
        }
        exact = found.pop(EXACT, None)
        if self._edges is not None:
            count = len(next(iter(found.values())))
            valid = self._edges.valid(frames).to(self._device)
            found["valid"] = valid.expand(count, -1, -1, -1)
        if exact is not None:
            found["valid"] = found.get("valid", True) & (exact > _WHOLLY)
        return found

    def _copied(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, slot in maps.items():
            if name not in self._kept:
                shape = (self._ring.frames, *slot.shape[1:])
                self._kept[name] = torch.empty(shape, dtype=torch.float32)
        return {name: self._kept[name][: len(slot)].copy_(slot) for name, slot in maps.items()}


class PairedFrames(Dataset):
    """An apprentice's view of frames, by batches, with what a handover loads for them.

    Args:
        frames: `fd3d.data.frames.FrameDataset`, or another with tokens and epochs.
        load: `Handover.load`; None = nothing is loaded.
    """

    def __init__(self, *, frames: Any, load: Load | None = None) -> None:
        self.frames = frames
        self._load = load

    def __len__(self) -> int:
        return len(self.frames)

    def set_epoch(self, epoch: int) -> None:
        self.frames.set_epoch(epoch)

    def __getitems__(self, rows: Sequence[int]) -> tuple[list[Batch], Any]:
        """The rows of one batch at once, as torch's loader asks where this method exists."""
        frames = [self.frames[row] for row in rows]
        if self._load is None:
            return frames, None
        return frames, self._load([self.frames.tokens[row] for row in rows], frames)


def collate_pairs(pair: tuple[list[Batch], Any]) -> tuple[Batch, Any]:
    """Join the apprentice's frames; what was loaded stays as it is, for `Handover.signals`."""
    return collate(pair[0]), pair[1]


@contextmanager
def dead_workers_told() -> Iterator[None]:
    """A loader worker that dies in this block raises `CheckFailed` with one sentence.

    torch raises a RuntimeError, wherever the trainer is at that moment; a trainer that is just
    receiving from the worker finds the connection closed first.
    """
    try:
        try:
            yield
        except (EOFError, OSError) as error:
            if not _in_a_connection(error):
                raise
            # torch's signal handler, which knows more, is about to raise: here, not further on.
            time.sleep(_SIGNAL)
            raise RuntimeError("DataLoader worker closed its connection") from error
    except RuntimeError as error:
        said = str(error).strip().partition("\n")[0].rstrip(". ")
        if not said.startswith("DataLoader worker"):
            raise
        raise CheckFailed(
            f"a loader worker died ({said}): if memory ran out, use fewer workers or smaller "
            "batches, and go on from the last save"
        ) from error


def _in_a_connection(error: Exception) -> bool:
    """Whether the error rose between processes of Python: not from a file, not in a worker."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__") == "multiprocessing.connection" for frame in frames)


def _layout(specs: dict[str, SignalSpec], moves: dict[str, Move]) -> dict[str, MapLayout]:
    """What lies in the ring: maps as they are, or as their moves leave them."""
    found = {}
    for name, spec in specs.items():
        if not spec.ragged:
            there = moves[name].moved(spec) if name in moves else spec
            found[name] = MapLayout(shape=tuple(there.shape), dtype=getattr(torch, spec.dtype))
    return found
