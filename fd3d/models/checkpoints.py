"""Saving and loading the tensors of a network, and the digest that names them.

Own files are safetensors whose metadata says which architecture they hold. mmcv checkpoints (.pth)
of BEVDet's first generation are read too, through torch's restricted unpickler, which runs no code.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fd3d.durable import replacing
from fd3d.errors import UsageError

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


def read_metadata(path: Path | str) -> dict[str, str]:
    """Metadata of an own checkpoint, the architecture under `ARCHITECTURE`; empty for mmcv's."""
    path = _existing(path)
    if _is_torch_file(path):
        return {}
    return _read_safetensors(path, tensors=False)[0]


def load(model: nn.Module, path: Path | str, *, partial: bool = False) -> Report:
    """Copy the tensors of the checkpoint at `path` into `model`.

    Raises `UsageError` for a file that is missing, damaged, of another architecture, or whose keys
    or shapes are not the network's; the network is unchanged then. With `partial`, keys that only
    one side has are reported instead.
    """
    path = _existing(path)
    if _is_torch_file(path):
        tensors = _read_mmcv(path)
    else:
        metadata, tensors = _read_safetensors(path)
        _check_architecture(path, metadata, model)
    own = model.state_dict()
    ignored = tuple(name for name in REBUILT if name in tensors and name not in own)
    given = {name: value for name, value in tensors.items() if name not in ignored}
    missing = tuple(sorted(own.keys() - given.keys()))
    unexpected = tuple(sorted(given.keys() - own.keys()))
    _check_values(path, own, given)
    if (missing or unexpected) and not partial:
        faults = [f"misses {_some(missing)}"] if missing else []
        faults += [f"has unexpected {_some(unexpected)}"] if unexpected else []
        raise UsageError(
            f"{path} does not fit {model.name}, as it {' and '.join(faults)}: give a checkpoint of "
            "the same architecture"
        )
    model.load_state_dict(given, strict=False)
    loaded = tuple(sorted(given.keys() & own.keys()))
    return Report(loaded=loaded, missing=missing, unexpected=unexpected, ignored=ignored)


def load_part(model: nn.Module, path: Path | str, *, prefix: str) -> tuple[str, ...]:
    """Copy those tensors of a checkpoint whose names begin with `prefix`, whatever its
    architecture; their keys.

    Raises `UsageError` where the file lacks one of the network's, or holds it in another shape.
    """
    path = _existing(path)
    tensors = _read_mmcv(path) if _is_torch_file(path) else _read_safetensors(path)[1]
    own = {name: value for name, value in model.state_dict().items() if name.startswith(prefix)}
    missing = tuple(sorted(own.keys() - tensors.keys()))
    if missing:
        raise UsageError(
            f"{path} misses {_some(missing)} for the {prefix.rstrip('.')} of {model.name}: give a "
            "checkpoint that has this part"
        )
    given = {name: tensors[name] for name in own}
    _check_values(path, own, given)
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


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no checkpoint at {path}: give the path of an existing file")
    return path


def _is_torch_file(path: Path) -> bool:
    """True for files of torch.save: a zip archive, or pickles (before torch 1.6)."""
    # Safetensors begin with the length of their header; read as one, these four bytes would mean
    # more than the format allows, so the two kinds cannot be confused.
    with open(path, "rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"\x80\x02\x8a\x0a")


def _read_safetensors(path: Path, tensors: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118
            return file.metadata() or {}, found
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(
            f"{path} is not a whole checkpoint ({error}): copy or train it again"
        ) from None


def _read_mmcv(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        # torch's own advice here is to switch its safety off.
        reason = re.split(r"(?<=\w)[.:,] ", str(error).strip())[0] or "it ends too early"
        raise UsageError(
            f"{path} is not a whole checkpoint of plain tensors ({reason}): download it again or "
            "re-save only its state_dict"
        ) from None
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise UsageError(f"{path} holds no state_dict of tensors: give a model checkpoint")
    return {name.removeprefix("module."): value for name, value in content.items()}


def _check_architecture(path: Path, metadata: Mapping[str, str], model: nn.Module) -> None:
    found = metadata.get(ARCHITECTURE)
    if found is None:
        raise UsageError(
            f"{path} does not say which architecture it holds: use a checkpoint that fd3d saved"
        )
    if found != model.name:
        raise UsageError(
            f"{path} holds {found}, but the network is {model.name}: build {found} or give a "
            f"checkpoint of {model.name}"
        )


def _check_values(path: Path, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    reshaped = [
        f"{name} is {tuple(given[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(own.keys() & given.keys())
        if own[name].shape != given[name].shape
    ]
    if reshaped:
        raise UsageError(
            f"{path} does not fit the network, as {_some(reshaped)}: give a checkpoint of the "
            "same architecture"
        )
    shared = [name for name in sorted(own.keys() & given.keys()) if own[name].is_floating_point()]
    whole = [name for name in shared if not given[name].is_floating_point()]
    if whole:
        raise UsageError(
            f"{path} holds whole numbers in {_some(whole)}: give a checkpoint of floating-point "
            "weights"
        )
    wild = [name for name in shared if not given[name].isfinite().all()]
    if wild:
        raise UsageError(
            f"{path} holds NaN or infinite numbers in {_some(wild)}: train it again, or give an "
            "earlier checkpoint"
        )


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
