"""Where the index of a data set lies, and how it comes to be there.

While an index is made, the devkit is asked for its splits and class names.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import uuid
from pathlib import Path

import numpy as np

from fd3d.classes import LABEL_OF
from fd3d.data.index_build import build_arrays
from fd3d.errors import UsageError

# Raised by hand when the arrays change their meaning: old folders are then left alone.
FORMAT = 1


def made_index(dataroot: Path, version: str, folder: Path | str | None) -> Path:
    """The folder of a data set's index, made first where it does not exist or the tables changed;
    see `fd3d.data.index.FrameIndex.open`."""
    tables = _check_tables(dataroot, version)
    home = folder or os.environ.get("FD3D_INDEX_DIR") or "~/.cache/fd3d/index"
    path = Path(home).expanduser() / f"{version}-{_fingerprint(tables)}"
    if not (path / "meta.json").is_file():
        print(f"making the frame index of {tables} in {path}", file=sys.stderr)
        _make(tables, path)
    return path


def _check_tables(dataroot: Path, version: str) -> Path:
    if not dataroot.is_dir():
        raise UsageError(
            f"dataroot {dataroot} is not a folder: give the one that holds samples and {version}"
        )
    tables = dataroot / version
    if Path(version).name != version or not (tables / "sample.json").is_file():
        found = sorted(path.parent.name for path in dataroot.glob("*/sample.json"))
        raise UsageError(
            f"version {version!r} is not in {dataroot}: found {', '.join(found) or 'no version'}"
        )
    return tables


def _fingerprint(tables: Path) -> str:
    """Changes when a table does, without reading the tables."""
    facts = [f"format {FORMAT}", str(tables.resolve())]
    for path in sorted(tables.glob("*.json")):
        stat = path.stat()
        facts.append(f"{path.name} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=8).hexdigest()


def _make(tables: Path, path: Path) -> None:
    """Build into a temporary folder and rename: readers see a whole index or none."""
    work = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        work.mkdir(parents=True)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UsageError(
            f"cannot keep the frame index in {path.parent} ({error.strerror}): set FD3D_INDEX_DIR "
            "to a folder that you may write to"
        ) from None
    try:
        try:
            arrays, description = build_arrays(
                tables=tables, label_of_category=_label_of_category, splits=_splits(tables)
            )
        except UsageError:
            raise
        except KeyError as error:
            raise UsageError(
                f"the tables in {tables} name a record or field {error} that they do not have: "
                "fetch the metadata of the data set again"
            ) from None
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(
                f"the tables in {tables} hold a value of the wrong kind ({error}): fetch the "
                "metadata of the data set again"
            ) from None
        for name, array in arrays.items():
            _save_array(work / f"{name}.npy", array)
        meta = {"dataroot": str(tables.parent.resolve()), "version": tables.name, **description}
        (work / "meta.json").write_text(json.dumps(meta))
        try:
            work.rename(path)
        except OSError:
            # Another process made the same index first; its content is the same.
            if not (path / "meta.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _save_array(path: Path, array: np.ndarray) -> None:
    try:
        np.save(path, array, allow_pickle=False)
    except OSError as error:
        # What numpy raises for a short write has no errno.
        code = error.errno or errno.ENOSPC
        raise OSError(code, os.strerror(code), str(path)) from None


def _label_of_category(category: str) -> int | None:
    from nuscenes.eval.detection.utils import category_to_detection_name

    return LABEL_OF.get(category_to_detection_name(category))


def _splits(tables: Path) -> dict[str, list[str]]:
    """Official splits that the devkit evaluates on this version, and the data set's own."""
    from nuscenes.utils.splits import create_splits_scenes

    own = tables / "splits.json"
    try:
        splits = json.loads(own.read_text()) if own.is_file() else {}
    except ValueError as error:
        raise UsageError(f"{own} is not JSON ({error}): repair or remove it") from None
    if not isinstance(splits, dict) or not all(
        isinstance(names, list) for names in splits.values()
    ):
        raise UsageError(f"{own} must hold lists of scene names by split: repair or remove it")
    for name, scenes in create_splits_scenes().items():
        if tables.name.endswith(official_version(name)):
            splits[name] = scenes
    return splits


def official_version(split: str) -> str:
    """How the name of a version ends that an official split belongs to, by the devkit's rule."""
    if split == "test":
        return "test"
    return "mini" if split.startswith("mini_") else "trainval"
