"""Reading files of weights, whoever wrote them, without running code that they hold."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fd3d.errors import UsageError


def read_weights(path: Path | str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors by key of a safetensors file, or of one that torch saved.

    A torch file may be a bare state dict or, like mmcv's checkpoints and the EMA files of BEVDet's
    second generation, hold one as `state_dict`; the `module.` of data-parallel training is cut off.
    Raises `UsageError` for a file that is missing, damaged, or would need code to be run.
    """
    path = _existing(path)
    if is_torch_file(path):
        return {}, _read_torch(path)
    return _read_safetensors(path)


def read_metadata(path: Path | str) -> dict[str, str]:
    """Metadata of a safetensors file; empty for one that torch saved."""
    path = _existing(path)
    return {} if is_torch_file(path) else _read_safetensors(path, tensors=False)[0]


def plain_tensors(content: Mapping, what: str) -> dict[str, Tensor]:
    """The state dict in what a file or a caller gave; `UsageError` where there is none."""
    content = content.get("state_dict", content)
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise UsageError(f"{what} holds no state_dict of tensors: give a model checkpoint")
    return {name.removeprefix("module."): value for name, value in content.items()}


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no checkpoint at {path}: give the path of an existing file")
    return path


def is_torch_file(path: Path) -> bool:
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


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        # torch's own advice here is to switch its safety off.
        reason = re.split(r"(?<=\w)[.:,] ", str(error).strip())[0] or "it ends too early"
        raise UsageError(
            f"{path} is not a whole checkpoint of plain tensors ({reason}): download it again, or, "
            "if you trust whoever made it, re-save only its state_dict as docs/models.md shows"
        ) from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no state_dict of tensors: give a model checkpoint")
    return plain_tensors(content, str(path))
