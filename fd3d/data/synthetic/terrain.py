"""The ground: a smooth height field of a few long waves, and where rays meet it.

Hills of a couple of metres keep depth from being a function of the image row and let crests hide
what lies behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Terrain:
    """h(x, y) = sum of amplitude * sin(k . (x, y) + phase), metres, global frame.

    k: (n, 2) radians per metre; amplitude: (n,) metres; phase: (n,) radians.
    """

    k: np.ndarray
    amplitude: np.ndarray
    phase: np.ndarray

    def height(self, xy: np.ndarray) -> np.ndarray:
        """Height in metres at `xy` (..., 2)."""
        return np.sin(xy @ self.k.T + self.phase) @ self.amplitude

    def gradient(self, xy: np.ndarray) -> np.ndarray:
        """Slope (..., 2), metres per metre, along x and y."""
        return (np.cos(xy @ self.k.T + self.phase) * self.amplitude) @ self.k

    def along(self, origin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(phase (n,), k (n, 2)) of the waves as seen from `origin` (3,), in float32.

        The height at origin + t d is then sum amplitude * sin(phase + t * (k . d)): along a ray
        every wave is a sine of t, which is all that the ray casters need.
        """
        phase = (self.k @ origin[:2] + self.phase) % (2 * np.pi)
        return phase.astype(np.float32), self.k.astype(np.float32)


def draw_terrain(rng: np.random.Generator) -> Terrain:
    """Three waves of 60 to 160 m in random directions; some places are almost flat."""
    direction = rng.uniform(0, 2 * np.pi, 3)
    length = np.array([rng.uniform(100, 160), rng.uniform(75, 110), rng.uniform(55, 80)])
    number = 2 * np.pi / length
    slope = rng.uniform(0.1, 0.6) * np.array([0.055, 0.035, 0.022]) * rng.uniform(0.6, 1.0, 3)
    return Terrain(
        k=np.stack([np.cos(direction), np.sin(direction)], axis=1) * number[:, None],
        amplitude=slope / number,
        phase=rng.uniform(0, 2 * np.pi, 3),
    )


def refine(
    terrain: Terrain, origin: np.ndarray, directions: tuple[np.ndarray, ...], t: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Newton's method for the ray parameter on the ground, from the guess `t`.

    directions: dx, dy, dz arrays of the shape of `t` (or broadcast to it), float32.
    Returns t and the height in metres by which that point still misses the ground.
    """
    dx, dy, dz = directions
    phase, k = terrain.along(origin)
    amplitude = terrain.amplitude.astype(np.float32)
    rates = [k[i, 0] * dx + k[i, 1] * dy for i in range(len(phase))]
    height = np.float32(origin[2])
    slope = None
    for _ in range(2):
        miss = height + t * dz
        # The slope hardly changes between the two steps, so the second one keeps the first one's.
        fresh = None if slope is not None else np.array(dz, dtype=np.float32, copy=True)
        for i, rate in enumerate(rates):
            angle = phase[i] + rate * t
            miss -= amplitude[i] * np.sin(angle)
            if fresh is not None:
                fresh = fresh - (amplitude[i] * rate) * np.cos(angle)
        slope = fresh if fresh is not None else slope
        step = miss / np.minimum(slope, np.float32(-1e-4))
        t = t - step
    return t, np.abs(step * slope)


def first_hit(
    terrain: Terrain, origin: np.ndarray, directions: np.ndarray, *, near: float, far: float
) -> np.ndarray:
    """Ray parameters (n,) float32 at which rays first meet the ground; inf where they do not.

    The rays start at `origin` (3,), above the ground, along `directions` (n, 3), which need not
    have unit length; `near` and `far` bound the parameter.
    """
    d = directions.astype(np.float32)
    phase, k = terrain.along(origin)
    amplitude = terrain.amplitude.astype(np.float32)
    hit = np.full(len(d), np.inf, dtype=np.float32)
    # Rays that stay above the highest crest cannot hit.
    top = np.float32(np.abs(amplitude).sum())
    active = np.flatnonzero(origin[2] + far * d[:, 2] < top)
    going = [k[i, 0] * d[active, 0] + k[i, 1] * d[active, 1] for i in range(len(phase))]
    going.append(d[active, 2])
    above = np.ones(len(active), dtype=np.float32)
    last = np.float32(0.0)
    for t in np.geomspace(near, far, 22).astype(np.float32):
        miss = np.float32(origin[2]) + t * going[-1]
        for i, rate in enumerate(going[:-1]):
            miss -= amplitude[i] * np.sin(phase[i] + t * rate)
        below = miss < 0
        if below.any():
            share = above[below] / np.maximum(above[below] - miss[below], np.float32(1e-6))
            hit[active[below]] = last + (t - last) * share
            stay = ~below
            active, miss = active[stay], miss[stay]
            going = [values[stay] for values in going]
        above, last = miss, t
    found = np.flatnonzero(np.isfinite(hit))
    dx, dy, dz = d[found].T
    finer, miss = refine(terrain, origin, (dx, dy, dz), hit[found])
    # A ray that grazes a crest can send Newton's method to another hill.
    good = (miss < 0.05) & (np.abs(finer - hit[found]) < 0.15 * hit[found])
    hit[found] = np.where(good, finer, hit[found])
    return hit
