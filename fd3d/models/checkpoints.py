"""Saving and loading the tensors of a network, and the digest that names them.

Own files are safetensors whose metadata says which architecture they hold. mmcv checkpoints (.pth)
of both generations of BEVDet are read too; which network they are of shows in their keys.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fd3d.durable import replacing
from fd3d.errors import UsageError
from fd3d.models.weight_files import is_torch_file, plain_tensors, read_metadata, read_weights

__all__ = ["Report", "load", "load_part", "presets_of", "read_metadata", "save", "tensors_digest"]

ARCHITECTURE = "fd3d_architecture"

# BEVDet's first generation stores its geometry as parameters; ours is rebuilt from the config.
REBUILT = tuple(f"img_view_transformer.{name}" for name in ("dx", "bx", "nx", "frustum"))


@dataclass(frozen=True, kw_only=True)
class Report:
    """What loading did, by state-dict key.

    loaded: copied into the network. missing: of the network, not in the file; unexpected: the
    reverse; both are empty unless `partial` was asked for. ignored: in the file and left out on
    purpose, as the network rebuilds it.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def save(path: Path | str, model: nn.Module, extra: Mapping[str, object] | None = None) -> None:
    """Write the tensors of `model` to `path`, all or nothing.

    `extra` goes into the metadata: strings as they are, anything else as JSON.
    """
    path = Path(path)
    metadata = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in (extra or {}).items()
    }
    metadata[ARCHITECTURE] = model.name
    tensors = {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, writing(path):
        save_file(tensors, partial, metadata=metadata)


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """What safetensors and torch raise on a full disk becomes the `OSError` that it is."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        known = re.search(r"os error (\d+)", str(error))
        # torch's zip writer says only where in the file it stopped.
        if not known and not re.search(r"PytorchStreamWriter|unexpected pos", str(error)):
            raise
        code = int(known[1]) if known else errno.ENOSPC
        raise OSError(code, os.strerror(code), str(path)) from None


def load(
    model: nn.Module, source: Path | str | Mapping[str, Tensor], *, partial: bool = False
) -> Report:
    """Copy the tensors of a checkpoint into `model`.

    Args:
        source: the file, or a state dict (or what holds one as `state_dict`).
        partial: report keys that only one side has, in place of refusing the checkpoint.

    Raises:
        UsageError: a file that is missing or damaged; another architecture, named by its preset
            where that is known; keys or shapes that are not the network's. The network is unchanged
            then.
    """
    if isinstance(source, Mapping):
        what, tensors = "the given state dict", plain_tensors(source, "the given mapping")
    else:
        what = str(source)
        metadata, tensors = read_weights(source)
        if not is_torch_file(Path(source)):
            _check_architecture(what, metadata, model)
    own = model.state_dict()
    ignored = tuple(name for name in REBUILT if name in tensors and name not in own)
    given = {name: value for name, value in tensors.items() if name not in ignored}
    missing = tuple(sorted(own.keys() - given.keys()))
    unexpected = tuple(sorted(given.keys() - own.keys()))
    faults = [f"misses {_some(missing)}"] if missing else []
    faults += [f"has unexpected {_some(unexpected)}"] if unexpected else []
    if not partial and (faults or _reshaped(own, given)):
        _name_the_layout(what, given, model)
    _check_values(what, own, given)
    if faults and not partial:
        raise UsageError(
            f"{what} does not fit {model.name}, as it {' and '.join(faults)}: give a checkpoint of "
            "the same architecture"
        )
    model.load_state_dict(given, strict=False)
    loaded = tuple(sorted(given.keys() & own.keys()))
    return Report(loaded=loaded, missing=missing, unexpected=unexpected, ignored=ignored)


def load_part(
    model: nn.Module, path: Path | str, *, prefix: str | tuple[str, ...]
) -> tuple[str, ...]:
    """Copy those tensors of a checkpoint whose names begin with `prefix`, or with one of several,
    whatever its architecture; their keys.

    Raises `UsageError` where the file lacks one of the network's, or holds it in another shape.
    """
    tensors = read_weights(path)[1]
    own = {name: value for name, value in model.state_dict().items() if name.startswith(prefix)}
    missing = tuple(sorted(own.keys() - tensors.keys()))
    if missing:
        raise UsageError(
            f"{path} misses {_some(missing)} of {model.name}: give a checkpoint that has this part"
        )
    given = {name: tensors[name] for name in own}
    _check_values(str(path), own, given)
    model.load_state_dict(given, strict=False)
    return tuple(sorted(given))


def tensors_digest(model: nn.Module) -> str:
    """Hex digest over names, types, shapes and bytes of the sorted state dict.

    It depends on neither device nor memory format, and changes with any bit of any tensor.
    """
    digest = hashlib.blake2b(digest_size=32)
    for name, value in sorted(model.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_architecture(what: str, metadata: Mapping[str, str], model: nn.Module) -> None:
    found = metadata.get(ARCHITECTURE)
    if found is None:
        raise UsageError(
            f"{what} does not say which architecture it holds: use a checkpoint that fd3d saved"
        )
    if found != model.name:
        raise UsageError(
            f"{what} holds {found}, but the network is {model.name}: build {found} or give a "
            f"checkpoint of {model.name}"
        )


def _check_values(what: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    reshaped = _reshaped(own, given)
    if reshaped:
        raise UsageError(
            f"{what} does not fit the network, as {_some(reshaped)}: give a checkpoint of the "
            "same architecture"
        )
    shared = [name for name in sorted(own.keys() & given.keys()) if own[name].is_floating_point()]
    whole = [name for name in shared if not given[name].is_floating_point()]
    if whole:
        raise UsageError(
            f"{what} holds whole numbers in {_some(whole)}: give a checkpoint of floating-point "
            "weights"
        )
    wild = [name for name in shared if not given[name].isfinite().all()]
    if wild:
        raise UsageError(
            f"{what} holds NaN or infinite numbers in {_some(wild)}: train it again, or give an "
            "earlier checkpoint"
        )


def _reshaped(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} is {tuple(given[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(own.keys() & given.keys())
        if own[name].shape != given[name].shape
    ]


def _name_the_layout(what: str, given: Mapping[str, Tensor], model: nn.Module) -> None:
    """`UsageError` that names the network which a checkpoint is of, where it is one of ours."""
    names = presets_of({name: tuple(value.shape) for name, value in given.items()})
    if names:
        choice = " or ".join(names)
        raise UsageError(f"{what} holds the tensors of {choice}, not {model.name}: build {choice}")


def presets_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """The names in `fd3d.models.names()` whose state dict has exactly these keys and shapes, but
    for geometry that is rebuilt. Networks that differ in picture and grid size have the same."""
    shapes = {name: tuple(shape) for name, shape in shapes.items() if name not in REBUILT}
    return tuple(name for name, own in _preset_shapes().items() if own == shapes)


@cache
def _preset_shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    from fd3d import models

    found = {}
    for name in models.names():
        with torch.device("meta"):
            state = models.build(name).state_dict()
        found[name] = {key: tuple(value.shape) for key, value in state.items()}
    return found


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
