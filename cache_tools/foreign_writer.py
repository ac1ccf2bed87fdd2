"""Writes signals for `fd3d-cache import` where this project cannot be installed: copy this file
there. It needs Python 3.6 and numpy, nothing else. docs/cache.md shows its use."""

import json
import os

import numpy as np


class SignalsWriter:
    """One file per frame and signal in `folder`, each whole; the same loop run again goes on."""

    def __init__(self, folder, identity, signals):
        self.folder, self.signals = folder, signals
        self.about = {"format": "fd3d-signals", "format_version": 1}
        self.about.update(identity=identity, signals=signals)
        os.makedirs(folder, exist_ok=True)
        if not os.path.exists(os.path.join(folder, "begun.json")):
            self._write("begun.json", json.dumps(self.about).encode())
        with open(os.path.join(folder, "begun.json")) as file:
            if json.load(file) != json.loads(json.dumps(self.about)):
                raise ValueError(f"{folder} was begun with something else: use another folder")

    def has(self, frame):
        """True when an earlier run wrote the frame: the expert need not see it again."""
        names = [f"{frame}.{signal}.npy" for signal in self.signals]
        return all(os.path.exists(os.path.join(self.folder, name)) for name in names)

    def add(self, frame, **values):
        """One array for each signal: maps (C, Y, X), row 0 at y_min; tables (rows, columns)."""
        for name, spec in self.signals.items():
            value, shape = np.asarray(values[name], spec["dtype"]), list(spec["shape"])
            rows = min(len(value), shape[0]) if spec["ragged"] else shape[0]
            if list(value.shape) != [rows] + shape[1:] or not np.isfinite(value).all():
                raise ValueError(f"{name} of {frame}: wrong shape, NaN, or too large")
            self._write(f"{frame}.{name}.npy", value)

    def finish(self, frames):
        """Write signals.json: all frame keys, scenes in time order. The import needs it."""
        if not all(self.has(frame) for frame in frames):
            raise ValueError("frames are missing: run the expert on those that has() denies")
        self._write("signals.json", json.dumps(dict(self.about, frames=list(frames))).encode())

    def _write(self, name, content):
        if name[0] == "." or any(part in name for part in ("/", "\\", "\0", "..")):
            raise ValueError(f"frame keys name files: {name!r} leads elsewhere, or is hidden")
        with open(os.path.join(self.folder, f"{name}.{os.getpid()}.tmp"), "wb") as file:
            file.write(content) if isinstance(content, bytes) else np.save(file, content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, os.path.join(self.folder, name))
