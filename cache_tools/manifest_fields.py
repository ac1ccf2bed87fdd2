"""The parts of a manifest as JSON objects, taken back field by field."""

from __future__ import annotations

import reprlib
from dataclasses import fields
from pathlib import Path
from typing import Any

from cache_tools.presets import SignalCodec
from fd3d.distill.signals import SignalSpec
from fd3d.errors import UsageError
from fd3d.grid import BEVGrid

_RESTORE = "rebuild the cache or restore the file"


class Taker:
    """Takes typed fields out of a JSON object; what is missing, wrong or left over is named, in
    `UsageError`, with `fix`."""

    def __init__(self, path: Path, values: Any, prefix: str = "", *, fix: str = _RESTORE) -> None:
        self._path, self._prefix, self._fix, self._taken = path, prefix, fix, set()
        if not isinstance(values, dict):
            self._refuse(prefix.rstrip("."), "is not an object")
        self._values = values

    def __call__(self, name: str, kind: type) -> Any:
        self._taken.add(name)
        if name not in self._values:
            self._refuse(self._prefix + name, "is missing")
        value = self._values[name]
        # JSON spells 4.0 as 4.0 but people write 4; bool is an int to Python and not to us.
        good = isinstance(value, (int, float) if kind is float else kind)
        if not good or (isinstance(value, bool) and kind is not bool):
            self._refuse(self._prefix + name, f"is {reprlib.repr(value)}, not {kind.__name__}")
        return value

    def optional(self, name: str, kind: type) -> Any:
        self._taken.add(name)
        return None if self._values.get(name) is None else self(name, kind)

    def finish(self, *also: str) -> None:
        unknown = sorted(set(self._values) - self._taken - set(also))
        if unknown:
            self._refuse(self._prefix + unknown[0], "is not a field of this format")

    def _refuse(self, name: str, what: str) -> None:
        raise UsageError(f"{self._path}: {name} {what}: {self._fix}")


def shallow(values: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, each as it is."""
    return {field.name: getattr(values, field.name) for field in fields(values)}


def check_spec(name: str, spec: SignalSpec) -> SignalSpec:
    """`spec` itself; one that no cache can hold under `name` raises `UsageError`."""
    good_shape = bool(spec.shape) and all(isinstance(n, int) and n > 0 for n in spec.shape)
    if spec.name != name or spec.dtype not in ("float16", "float32") or not good_shape:
        raise UsageError(
            f"signal {name!r} has spec {spec}: give it its own name, dtype float16 or float32, and "
            f"a shape of positive whole numbers"
        )
    if not name.isidentifier():
        raise UsageError(f"signal {name!r} names a folder: use letters, digits and underscores")
    return spec


def spec_to_dict(spec: SignalSpec) -> dict[str, Any]:
    """A signal's spec as plain JSON values; `spec_from_dict` is the way back."""
    grid = spec.grid.to_dict() if spec.grid else None
    return {**shallow(spec), "shape": list(spec.shape), "grid": grid}


def spec_from_dict(take: Taker) -> SignalSpec:
    """The spec that `take` holds, checked."""
    grid = take.optional("grid", dict)
    spec = SignalSpec(
        name=take("name", str),
        shape=tuple(take("shape", list)),
        dtype=take("dtype", str),
        ragged=take("ragged", bool),
        grid=BEVGrid.from_dict(grid) if grid else None,
    )
    take.finish()
    return check_spec(spec.name, spec)


def codec_from_dict(take: Taker) -> SignalCodec:
    """The codec that `take` holds; `dataclasses.asdict` is the way there."""
    kinds = {"str": str, "int": int, "float": float, "bool": bool}
    codec = SignalCodec(
        **{field.name: take(field.name, kinds[field.type]) for field in fields(SignalCodec)}
    )
    take.finish()
    return codec
