"""The modes `regate` and `replay`: the expert sees the world as the apprentice's augmentation moves
it, as an expert that runs in every step does.

`regate` is that expert. Its answers cannot be cached, since every draw is a new world. `replay`
draws a few augmentations of each frame once and for all; the expert answers to each when the cache
is built, and an apprentice meets only those. That is exact for everything an expert may be, for as
many times the bytes as there are draws.

The signal `replay` is stored in parts:

    replay_0, replay_1, ...  the `bev` map under each augmentation, (C, Y, X)
    replay_augment           (N, 9) the rows of the augmentations' matrices

The draws are a function of frame and number alone (`fd3d.augment.replayed`), so a data set makes
the same ones without the cache; the stored matrices are what it is checked against.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fd3d.augment import replayed
from fd3d.data.batch import Batch
from fd3d.errors import UsageError
from fd3d.models.precision import full_precision

AUGMENT = "replay_augment"
MOST = 64

# Two ways of making one matrix agree to this; two draws of a rotation do not.
_SAME = 1e-5


def part(number: int) -> str:
    """The name of the map under augmentation `number`, from 0."""
    return f"replay_{number}"


def count_of(parts: Iterable[str]) -> int:
    """How many augmentations there are among the names of what a cache stores."""
    return sum(is_map(name) for name in parts)


def is_map(name: str) -> bool:
    """True for the names that `part` gives."""
    return re.fullmatch(r"replay_\d+", name) is not None


def check_count(count: int) -> int:
    """`count` itself; a number of augmentations that cannot be stored raises `UsageError`."""
    if not 1 <= count <= MOST:
        raise UsageError(f"--replays {count} is not possible: use 1 to {MOST}")
    return count


def augmented(batch: Batch, matrices: Tensor) -> Batch:
    """The batch as a data set with these BEV augmentations would give it, (B, 3, 3) or (3, 3);
    cameras alone: the batch must hold no truth and no augmentation yet."""
    turn = matrices.to(batch.rots).expand(len(batch), 3, 3)
    with full_precision(batch.rots):
        wide = turn[:, None, None].double()
        return replace(
            batch,
            rots=(wide @ batch.rots.double()).float(),
            trans=(wide @ batch.trans.double()[..., None])[..., 0].float(),
            bev_augment=turn,
        )


def replay_signals(
    batch: Batch, count: int, answer: Callable[[Batch], Tensor]
) -> dict[str, Tensor]:
    """The parts of `replay` for B frames, float32, with the batch as their first axis.

    `answer` gives an expert's map (B, C, Y, X) of the batch under an augmentation.
    """
    draws = [
        [replayed(token, number).matrix() for number in range(count)] for token in batch.tokens
    ]
    matrices = torch.from_numpy(np.array(draws)[:, :, :3, :3]).to(batch.rots)  # (B, count, 3, 3)
    found = {part(n): answer(augmented(batch, matrices[:, n])) for n in range(count)}
    return {**found, AUGMENT: matrices.flatten(2)}


def number_of(stored: np.ndarray, frame: Batch) -> int:
    """Which of the stored matrices (N, 9) the frame's BEV augmentation is; another one raises
    `UsageError`."""
    wanted = frame.bev_augment.reshape(9).numpy()
    apart = np.abs(stored - wanted).max(axis=1)
    number = int(apart.argmin())
    if apart[number] > _SAME:
        raise UsageError(
            f"frame {frame.tokens[0]} has a BEV augmentation that the cache does not replay: draw "
            f"from its {len(stored)} (FrameDataset's replays), or build the cache again"
        )
    return number
