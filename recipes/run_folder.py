"""The folder of a run: what may be there before, what a save leaves, where a resume goes on.

    run.json     what the run depends on, and its flags
    log.jsonl    a line of the first step and of every --log-steps'th
    last.json    how far it has come, and the name of the one save that counts
    state-*/     that save: weights, optimizer, random states
    lock         held by the process that trains into the folder

A kill at any moment leaves a run that can be resumed.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from pickle import PickleError
from typing import TextIO

from accelerate import Accelerator
from safetensors import SafetensorError

from cache_tools.layout import cache_around
from fd3d.durable import write_durably, write_json
from fd3d.errors import UsageError
from fd3d.models import checkpoints

# What a run writes and a new one must not replace.
_OWN = ("last.json", "log.jsonl", "summary.json", "model.safetensors", "head.safetensors")


@dataclass(kw_only=True)
class Position:
    """How far a run has come: what a save remembers beside weights and random states.

    Steps and batches are those done, the latter in the epoch; `steps` is the whole run's length.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    steps: int


def check_out(out: Path, identity: Mapping[str, object], *, resume: bool) -> None:
    """Refuse a folder that holds another's files, or a run that is not the one to go on with."""
    known = out / "run.json"
    cache = cache_around(out)
    if cache is not None:
        raise UsageError(f"--out {out} lies in the cache {cache}: choose a folder of its own")
    if not resume:
        present = [out / name for name in _OWN if (out / name).exists()]
        if present and known.exists():
            raise UsageError(f"{out} holds a run already: pass --resume to go on or another --out")
        if present:
            raise UsageError(f"{present[0]} is in the way and is kept: choose another --out")
        # run.json alone is left of a run that was refused or ended before it began.
        return
    if not known.exists():
        raise UsageError(f"{out} holds no run to resume: leave --resume out to start one")
    before = _read_json(known).get("identity")
    if not isinstance(before, dict):
        raise UsageError(f"{known} is damaged: start the run again in another --out")
    for name in sorted(set(before) | set(identity)):
        if before.get(name) != identity.get(name):
            if name == "frames":
                raise UsageError(
                    f"{out} was trained on the frames that its cache held then, and now it holds "
                    "others: choose another --out"
                )
            raise UsageError(
                f"{out} was trained with {_told(before, name)}, now it is "
                f"{_told(identity, name)}: resume with the former or choose another --out"
            )


def hold(out: Path) -> None:
    """Lock the folder for as long as this process lives; one that is locked raises `UsageError`.

    Workers of a launcher that was killed may still be training into it.
    """
    # Left open on purpose: the system takes the lock back when the process ends, however it ends.
    lock = os.open(out / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 20).decode(errors="replace").strip() or "of another machine"
        raise UsageError(
            f"process {holder} is training into {out}: wait until it ends, or end it"
        ) from None
    except OSError:
        return  # a file system without locks
    os.ftruncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())


def _told(identity: Mapping[str, object], name: str) -> str:
    return f"{name} {identity[name]}" if name in identity else f"no {name}"


def save(accelerator: Accelerator, out: Path, position: Position) -> None:
    """Save weights, optimizer and random states; the newest complete save is the one that counts.

    The state goes into a folder of its own, then a pointer is replaced in one move, then older
    folders go: a kill at any moment leaves a save to resume from. Once for each step.
    """
    accelerator.wait_for_everyone()
    name = f"state-{position.step:08d}"
    with checkpoints.writing(out / name):
        accelerator.save_state(str(out / name))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(out / "last.json", {**asdict(position), "state": name})
        for old in out.glob("state-*"):
            if old.name != name:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def open_log(path: Path, step: int) -> TextIO:
    """The log open for appending, without what a killed run wrote after its last save."""
    kept = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    # A kill may have torn the last line.
    write_durably(path, "".join(line for line in kept if _early(line, step)).encode())
    return path.open("a")


def _early(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, TypeError, KeyError):
        return False


def load(accelerator: Accelerator, out: Path) -> Position:
    """Go back to the last save in `out`."""
    saved = _read_json(out / "last.json")
    numbers = {field.name: saved.get(field.name) for field in fields(Position)}
    state = saved.get("state")
    if not (all(type(n) is int for n in numbers.values()) and isinstance(state, str)):
        raise UsageError(f"{out / 'last.json'} is damaged: start the run again in another --out")
    try:
        accelerator.load_state(str(out / state))
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, SafetensorError, PickleError):
        raise UsageError(
            f"the save {out / state} is missing or damaged: start the run again in another --out"
        ) from None
    return Position(**numbers)


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text())
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UsageError(f"{path} is damaged: start the run again in another --out")
    return values
