"""Time of day and weather of a scene."""

from __future__ import annotations

import numpy as np

from fd3d.data.synthetic.world import Light

_WEATHER = ("clear", "overcast", "dusk", "night", "rain", "fog")
_SHARE = (0.52, 0.3, 0.06, 0.03, 0.06, 0.03)


def draw_light(rng: np.random.Generator) -> Light:
    """Sun, sky, haze and noise of one scene."""
    name = str(rng.choice(_WEATHER, p=_SHARE))
    azimuth = rng.uniform(0, 2 * np.pi)
    low = name == "dusk"
    elevation = np.radians(rng.uniform(12, 25) if low else rng.uniform(28, 70))
    direction = np.array(
        [
            np.cos(elevation) * np.cos(azimuth),
            np.cos(elevation) * np.sin(azimuth),
            np.sin(elevation),
        ]
    )
    warm, cold = np.array([1.08, 0.98, 0.85]), np.array([0.92, 0.98, 1.1])
    bright = rng.uniform(0.85, 1.12)
    plans = {
        "clear": (0.5 * cold, 0.62 * warm, 0.75, (196, 208, 220), (90, 140, 205), 0.003, 3.0, 0),
        "overcast": (0.8 * cold, 0.14 * warm, 0.4, (196, 200, 204), (165, 172, 182), 0.006, 3.5, 0),
        "dusk": (
            0.36 * cold,
            0.5 * warm * warm,
            0.6,
            (206, 160, 120),
            (70, 80, 130),
            0.005,
            5.0,
            0,
        ),
        "night": (0.3 * cold, 0.06 * cold, 0.2, (42, 44, 54), (12, 14, 24), 0.006, 7.0, 0),
        "rain": (0.64 * cold, 0.08 * warm, 0.3, (158, 164, 170), (130, 138, 146), 0.009, 5.0, 1500),
        "fog": (0.76 * cold, 0.06 * warm, 0.2, (205, 207, 208), (200, 202, 204), 0.016, 3.0, 0),
    }
    ambient, sun, shadow, haze, zenith, density, noise, drops = plans[name]
    return Light(
        name=name,
        ambient=np.asarray(ambient) * bright,
        sun=np.asarray(sun) * bright,
        sun_direction=direction,
        shadow=shadow,
        haze=np.asarray(haze, dtype=np.float64) * min(bright, 1.05),
        zenith=np.asarray(zenith, dtype=np.float64) * bright,
        haze_per_metre=density * rng.uniform(0.7, 1.3),
        noise=noise * rng.uniform(0.7, 1.3),
        drops=drops,
    )
