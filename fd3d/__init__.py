"""fd3d: distil camera-based 3D detectors from a cache of the expert's features."""

__version__ = "0.1.0"
