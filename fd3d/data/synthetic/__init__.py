"""Synthetic driving scenes in the nuScenes schema: `python -m fd3d.data.synthetic --help`."""

from fd3d.data.synthetic.generate import Made, generate

__all__ = ["Made", "generate"]
