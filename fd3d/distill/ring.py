"""Shared memory, allocated once, in which loader workers leave maps for the trainer.

torch's own way puts every tensor of every batch into a new piece of shared memory; mapping its
pages costs several times what copying the numbers does. Here each worker has a few slots, each
large enough for one batch. It fills one that is free, and a `Ticket` of a few numbers travels
through the loader's queue instead of the maps. The trainer reads the slot and gives it back; a
worker that finds none free waits, which bounds the memory however slow the trainer is.
"""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from fd3d.errors import CheckFailed, UsageError

# What a loader prefetches for each worker (2, torch's default) and one in the trainer's hands:
# then no worker waits for a slot while the trainer works on a batch.
SLOTS = 3

# Where Linux keeps shared memory. A process that outgrows it is killed by a bus error, so its room
# is looked at beforehand.
_MEMORY = Path("/dev/shm")
_NAP = 5e-4  # seconds between two looks for a free slot
_LOOKS_PER_CHECK = 1000  # looks after which a waiting worker sees whether its trainer lives


@dataclass(frozen=True, kw_only=True)
class MapLayout:
    """Shape and dtype of one frame of a map."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """Where a batch of `frames` frames lies; `serial` tells the uses of a slot apart."""

    worker: int
    slot: int
    serial: int
    frames: int


class Ring:
    """Slots for batches of maps, some for each loader worker.

    May be forked with, or sent to, the workers of one loader. One loop over the loader at a time:
    when its workers start anew they take all slots, also those of tickets that nobody redeemed.

    Args:
        layout: the maps of a frame by name.
        frames: of the largest batch.
        workers: of the loader.
        slots: batches in flight for each worker, at least 2: accelerate's loaders fetch a batch
            before they hand out the one before it.
    """

    def __init__(
        self, *, layout: Mapping[str, MapLayout], frames: int, workers: int, slots: int = SLOTS
    ) -> None:
        if min(frames, workers) < 1 or slots < 2:
            raise UsageError(
                f"a ring of {slots} slots for {workers} workers and batches of {frames} cannot "
                "work: give at least 2 slots, 1 worker and 1 frame"
            )
        self.layout = dict(layout)
        self.frames, self.workers, self.slots = frames, workers, slots
        _check_room(self.nbytes)
        # share_memory_ copies, and so touches every page now instead of in the first steps.
        self._maps = {
            name: torch.empty((workers, slots, frames, *one.shape), dtype=one.dtype).share_memory_()
            for name, one in self.layout.items()
        }
        # A slot is free when both agree. Each has one writer, so there is nothing to lock: the
        # worker counts the uses of its slots, the trainer notes which use it has done with.
        self._used = torch.zeros((workers, slots), dtype=torch.int64).share_memory_()
        self._done = torch.zeros((workers, slots), dtype=torch.int64).share_memory_()
        # Slots that this process, a worker, has not used yet.
        self._fresh: set[int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of shared memory."""
        one = sum(prod(m.shape) * m.dtype.itemsize for m in self.layout.values())
        return one * self.workers * self.slots * self.frames

    @contextmanager
    def filling(self, frames: int) -> Iterator[tuple[Ticket, dict[str, Tensor]]]:
        """In a worker: a ticket and the memory behind it, maps (frames, *shape), to be filled.

        Waits for a free slot. Where the block raises, the slot stays free.
        """
        worker = _worker(self.workers)
        if frames > self.frames:
            raise UsageError(f"the ring holds batches of {self.frames} frames, not of {frames}")
        slot = self._wait(worker)
        ticket = Ticket(
            worker=worker, slot=slot, serial=int(self._used[worker, slot]) + 1, frames=frames
        )
        self._used[worker, slot] = ticket.serial
        try:
            yield ticket, self._views(ticket)
        except BaseException:
            self._fresh.add(slot)
            raise

    @contextmanager
    def reading(self, ticket: Ticket) -> Iterator[dict[str, Tensor]]:
        """In the trainer: the maps (frames, *shape) of a ticket, valid inside the block only; the
        slot is given back at its end. A ticket can be redeemed once."""
        self._check(ticket)
        try:
            yield self._views(ticket)
            self._check(ticket)
        finally:
            if int(self._used[ticket.worker, ticket.slot]) == ticket.serial:
                self._done[ticket.worker, ticket.slot] = ticket.serial

    def in_use(self) -> int:
        """Number of slots that are filled, or being filled, and not given back."""
        return int((self._used != self._done).sum())

    def _views(self, ticket: Ticket) -> dict[str, Tensor]:
        return {
            name: memory[ticket.worker, ticket.slot, : ticket.frames]
            for name, memory in self._maps.items()
        }

    def _check(self, ticket: Ticket) -> None:
        used = int(self._used[ticket.worker, ticket.slot])
        if used != ticket.serial or int(self._done[ticket.worker, ticket.slot]) == used:
            raise CheckFailed(
                "a batch was taken from the ring twice, or after another loop over the loader "
                "began: use each batch once, before the next loop"
            )

    def _wait(self, worker: int) -> int:
        if self._fresh is None:
            self._fresh = set(range(self.slots))
        for look in itertools.count(1):
            for slot in range(self.slots):
                free = bool(self._used[worker, slot] == self._done[worker, slot])
                if free or slot in self._fresh:
                    self._fresh.discard(slot)
                    return slot
            trainer = multiprocessing.parent_process()
            if look % _LOOKS_PER_CHECK == 0 and trainer is not None and not trainer.is_alive():
                # Nobody will ever read this batch, nor an error message.
                raise SystemExit(1)
            time.sleep(_NAP)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_fresh": None}


def _worker(workers: int) -> int:
    info = get_worker_info()
    if info is None or info.id >= workers:
        raise UsageError(
            f"the ring was made for {workers} workers of one loader and is filled by no other "
            "process: make it with the loader's num_workers"
        )
    return info.id


def _check_room(size: int) -> None:
    if not _MEMORY.is_dir():
        return
    free = shutil.disk_usage(_MEMORY).free
    if size > free:
        raise UsageError(
            f"maps on their way from loader workers need {size / 1e6:.0f} MB of shared memory and "
            f"{_MEMORY} has {free / 1e6:.0f} MB free: use fewer workers or smaller batches, or "
            "enlarge it (docker run --shm-size)"
        )
