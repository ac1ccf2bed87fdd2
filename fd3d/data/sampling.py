"""Class-balanced sampling (CBGS, Zhu et al. 2019, arXiv:1908.09492) as BEVDepth trains with it."""

from __future__ import annotations

import numpy as np


def class_balanced(
    present: np.ndarray, *, rng: np.random.Generator | np.random.RandomState
) -> np.ndarray:
    """(n,) int64 rows of `present`, with repeats, so that every class is met about equally often.

    For each class about (sum of the classes' frame counts) / (number of classes) frames are drawn
    with replacement from those that hold it; the draws are concatenated in class order. Shuffle
    them before training. A class that no frame holds gets no draws.

    Args:
        present: (frames, classes) bool, which classes each frame holds.
        rng: where the draws come from; the same state gives the same frames.
    """
    present = np.asarray(present, dtype=bool)
    counts = present.sum(axis=0)
    share = 1.0 / present.shape[1]
    drawn = []
    for label in np.flatnonzero(counts):
        # Kept in this form: the rounding of the two divisions decides whether int() loses one.
        ratio = share / (counts[label] / counts.sum())
        frames = np.flatnonzero(present[:, label])
        drawn.append(rng.choice(frames, int(counts[label] * ratio)))
    return np.concatenate(drawn) if drawn else np.zeros(0, dtype=np.int64)
