"""The part that every training recipe shares: flags, schedule, loop, checkpoints, log.

A recipe builds a module whose forward returns a dict of named loss terms, and hands it to `fit`.
Everything else that a reader may want to change is in the recipe itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import PickleError

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration, set_seed
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from fd3d.errors import CheckFailed, UsageError
from fd3d.models import checkpoints
from fd3d.progress import Progress

# Length of a run that names none, as in the paper.
_EPOCHS = 24

# After so many steps a run with --minutes knows its pace and fixes its number of steps.
_PACE_STEPS = 20

# What a run writes and a new one must not replace.
_OWN = ("last.json", "log.jsonl", "summary.json", "model.safetensors")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that all training recipes have."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataroot", required=True, help="folder of the data set")
    data.add_argument("--version", required=True, help="its version folder, e.g. v1.0-trainval")
    data.add_argument("--split", default="train", help="split to train on (default: train)")
    data.add_argument("--workers", type=int, default=2, help="loader processes (0: in the trainer)")
    data.add_argument(
        "--keep-images-mb", type=int, default=0, help="RAM for decoded images, MB (0: none)"
    )
    data.add_argument(
        "--image-augment", action="store_true", help="random resize, crop, flip, tilt"
    )
    run = parser.add_argument_group("run")
    run.add_argument("--out", required=True, help="folder for checkpoints and logs")
    length = run.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, help=f"length of the training (default: {_EPOCHS})")
    length.add_argument("--steps", type=int, help="its length in optimizer steps instead")
    run.add_argument("--batch", type=int, default=8, help="frames a step and process")
    run.add_argument("--lr", type=float, default=2e-4, help="peak learning rate of AdamW")
    run.add_argument("--weight-decay", type=float, default=0.01)
    run.add_argument("--warmup", type=int, default=500, help="steps of linear warm-up (0: none)")
    run.add_argument("--clip", type=float, default=0.0, help="gradient norm limit (0: none)")
    run.add_argument("--seed", type=int, default=0, help="of weights and data order")
    run.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
    run.add_argument(
        "--minutes", type=float, default=0.0, help="shorten the run to fit this long (0: do not)"
    )
    run.add_argument("--max-steps", type=int, default=0, help="stop after so many steps (0: all)")
    run.add_argument("--save-steps", type=int, default=0, help="also save every so many steps")
    run.add_argument("--log-steps", type=int, default=10, help="log every so many steps")
    run.add_argument("--resume", action="store_true", help="go on from the last save in --out")
    run.add_argument("--tracker", default="", help="tensorboard, wandb, ... through Accelerate")
    run.add_argument("--cpu", action="store_true", help="train on the CPU even if there is a GPU")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, then the base rate divided by ten after 2/3 and 11/12 of all steps.

    Over 24 epochs these are the ends of epochs 16 and 22. The rate is a plain function of the
    step, so it is the same for any number of processes and after any resume.
    """

    base: float
    warmup: int
    steps: int

    def at(self, step: int) -> float:
        """Learning rate of step 0, 1, ... `steps` - 1."""
        rate = self.base
        if step < self.warmup:
            rate *= 1 - (1 - step / self.warmup) * (1 - 1e-3)
        passed = (step >= round(self.steps * 2 / 3)) + (step >= round(self.steps * 11 / 12))
        return rate * 0.1**passed


class EpochOrder(Sampler[int]):
    """A shuffled order that depends on (seed, epoch) alone, so that any epoch can be re-entered."""

    def __init__(self, *, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


def start(args: argparse.Namespace, identity: Mapping[str, object]) -> Accelerator:
    """Prepare the output folder and the accelerator; seed everything.

    `identity` names what the run depends on (signals id, cache id, expert); it and --steps are
    written beside the checkpoints, and resuming with another one is refused.
    """
    if args.steps is None and args.epochs is None:
        args.epochs = _EPOCHS
    least_of = {"batch": 1, "epochs": 1, "steps": 1, "log_steps": 1, "workers": 0}
    for flag, least in least_of.items():
        if getattr(args, flag) is not None and getattr(args, flag) < least:
            name = flag.replace("_", "-")
            raise UsageError(f"--{name} {getattr(args, flag)} is not possible: use {least} or more")
    if not 0 <= args.seed < 2**32:
        raise UsageError(f"--seed {args.seed} is not possible: use 0 to 2**32 - 1")
    if not 0 <= args.lr < math.inf:
        raise UsageError(f"--lr {args.lr} is not possible: use a number from 0")
    if args.tracker and args.tracker not in {str(name) for name in get_available_trackers()}:
        raise UsageError(f"tracker {args.tracker} is not installed: install it, or leave it out")
    if not args.out:
        raise UsageError("--out is empty: name a folder")
    out = Path(args.out)
    known = out / "run.json"
    if args.steps is not None:
        identity = {**identity, "steps": args.steps}
    if known.exists() and not args.resume:
        raise UsageError(f"{out} holds a run already: pass --resume to go on or another --out")
    foreign = [out / name for name in _OWN if (out / name).exists()]
    if foreign and not args.resume:
        raise UsageError(f"{foreign[0]} is in the way and is kept: choose another --out")
    if args.resume:
        if not known.exists():
            raise UsageError(f"{out} holds no run to resume: leave --resume out to start one")
        before = _read_json(known).get("identity")
        if not isinstance(before, dict):
            raise UsageError(f"{known} is damaged: start the run again in another --out")
        for name in sorted(set(before) | set(identity)):
            if before.get(name) != identity.get(name):
                raise UsageError(
                    f"{out} was trained with {_told(before, name)}, now it is "
                    f"{_told(identity, name)}: resume with the former or choose another --out"
                )
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        cpu=args.cpu,
        log_with=args.tracker or None,
        project_config=ProjectConfiguration(project_dir=str(out)),
    )
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        if not known.exists():
            write_json(known, {"identity": dict(identity), "arguments": vars(args)})
    accelerator.wait_for_everyone()
    if args.tracker:
        scalars = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, bool))}
        accelerator.init_trackers("fd3d", config={**scalars, **identity})
    set_seed(args.seed)
    return accelerator


def _told(identity: Mapping[str, object], name: str) -> str:
    return f"{name} {identity[name]}" if name in identity else f"no {name}"


def fit(
    *,
    args: argparse.Namespace,
    accelerator: Accelerator,
    module: nn.Module,
    dataset: Dataset,
    collate: Callable,
    inputs: Callable[[object], tuple],
    weights: Mapping[str, float],
    export: Callable[[nn.Module, dict], None],
) -> dict:
    """Train `module` and return the run's summary (also written to OUT/summary.json).

    Args:
        module: `module(*inputs(item))` gives named, unweighted loss terms; the one thing that is
            wrapped for data parallelism, so every trained parameter must be in it.
        inputs: from what the loader yields to the module's arguments, on the device; runs outside
            the module's autocast (a live expert runs here).
        weights: of loss terms by name; terms that are not named weigh 1.
        export: called with the trained module and the run's record at the end.
    """
    out = Path(args.out)
    order = EpochOrder(length=len(dataset), seed=args.seed)
    loader = DataLoader(
        dataset,
        batch_size=args.batch,
        sampler=order,
        num_workers=args.workers,
        collate_fn=collate,
        drop_last=True,
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    module, optimizer, loader = accelerator.prepare(
        module, optimizer, loader, device_placement=[True, True, False]
    )
    if len(loader) == 0:
        raise UsageError(
            f"{len(dataset)} frames do not fill one batch of {args.batch} on each of "
            f"{accelerator.num_processes} processes: lower --batch"
        )
    total = args.steps or args.epochs * len(loader)
    schedule = Schedule(base=args.lr, warmup=args.warmup, steps=total)
    position = {"epoch": 0, "batch": 0, "step": 0, "steps": total}
    # A run that was killed before its first save starts over.
    if args.resume and (out / "last.json").exists():
        position = _load(accelerator, out)
        schedule = Schedule(base=args.lr, warmup=args.warmup, steps=position["steps"])
    log = _open_log(out / "log.jsonl", position["step"]) if accelerator.is_main_process else None
    quiet = not accelerator.is_main_process
    last = args.max_steps or schedule.steps
    times: list[float] = []
    waits: list[float] = []
    began = time.monotonic()
    module.train()
    with Progress(
        total=schedule.steps, unit="steps", title=out.name, done=position["step"], quiet=quiet
    ) as progress:
        while position["step"] < min(last, schedule.steps):
            order.set_epoch(position["epoch"])
            dataset.set_epoch(position["epoch"])
            batches = skip_first_batches(loader, position["batch"])
            mark = time.monotonic()
            for item in batches:
                ready = time.monotonic()
                rate = schedule.at(position["step"])
                for group in optimizer.param_groups:
                    group["lr"] = rate
                terms = module(*inputs(item))
                loss = sum(weights.get(name, 1.0) * term for name, term in terms.items())
                accelerator.backward(loss)
                if args.clip:
                    accelerator.clip_grad_norm_(module.parameters(), args.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                values = {name: float(term.detach()) for name, term in terms.items()}
                if not math.isfinite(sum(values.values())):
                    raise CheckFailed(f"loss is not finite at step {position['step']}: {values}")
                now = time.monotonic()
                times.append(now - mark)
                waits.append(ready - mark)
                position["step"] += 1
                position["batch"] += 1
                if log and position["step"] % args.log_steps in (0, 1):
                    record = {
                        "step": position["step"],
                        "epoch": position["epoch"],
                        "lr": rate,
                        "seconds": times[-1],
                        "wait": waits[-1],
                        **values,
                    }
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                    if args.tracker:
                        accelerator.log({**values, "lr": rate}, step=position["step"])
                progress.advance(1, f"loss {sum(values.values()):.3f}")
                if position["step"] == _PACE_STEPS and args.minutes:
                    schedule = _fit_in(args, schedule, times, accelerator)
                    progress.total, position["steps"] = schedule.steps, schedule.steps
                    last = args.max_steps or schedule.steps
                if args.save_steps and position["step"] % args.save_steps == 0:
                    _save(accelerator, out, position)
                if position["step"] >= min(last, schedule.steps):
                    break
                mark = time.monotonic()
            else:
                position["epoch"], position["batch"] = position["epoch"] + 1, 0
            _save(accelerator, out, position)
    summary = {
        "steps": position["step"],
        "planned_steps": total,
        "epochs": args.epochs,
        "batch": args.batch,
        "processes": accelerator.num_processes,
        "seed": args.seed,
        "ema": False,
        "seconds": time.monotonic() - began,
        "seconds_per_step": statistics.median(times) if times else 0.0,
        "wait_per_step": statistics.median(waits) if waits else 0.0,
        "parameters": sum(p.numel() for p in module.parameters()),
    }
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        export(accelerator.unwrap_model(module), json.loads((out / "run.json").read_text()))
        write_json(out / "summary.json", summary)
    accelerator.end_training()
    return summary


def tell(args: argparse.Namespace, accelerator: Accelerator, summary: Mapping) -> None:
    """Say what the run made and what to run next."""
    weights = Path(args.out) / "model.safetensors"
    accelerator.print(
        f"made {weights} in {summary['steps']} steps, {summary['seconds']:.0f} s\n"
        f"next: python recipes/evaluate.py --model {args.model} --checkpoint {weights} "
        f"--dataroot {args.dataroot} --version {args.version} --split val --out {args.out}/val"
    )


def _fit_in(
    args: argparse.Namespace, schedule: Schedule, times: list[float], accelerator: Accelerator
) -> Schedule:
    """The schedule shortened to `--minutes`, by the pace of the slowest process so far."""
    pace = torch.tensor([statistics.median(times)], device=accelerator.device)
    pace = float(accelerator.gather(pace).max())
    steps = min(schedule.steps, max(2 * _PACE_STEPS, int(args.minutes * 60 / pace)))
    if steps < schedule.steps:
        accelerator.print(
            f"{Path(args.out).name}: {pace:.2f} s a step, so {steps} of {schedule.steps} steps to "
            f"end within --minutes {args.minutes:g}"
        )
    return Schedule(base=schedule.base, warmup=min(schedule.warmup, steps // 4), steps=steps)


def _save(accelerator: Accelerator, out: Path, position: dict) -> None:
    """Save weights, optimizer and random states; the newest complete save is the one that counts.

    The state goes into a folder of its own, then a pointer is replaced in one move, then older
    folders go: a kill at any moment leaves a save to resume from.
    """
    accelerator.wait_for_everyone()
    name = f"state-{position['step']:08d}"
    with checkpoints.writing(out / name):
        accelerator.save_state(str(out / name))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(out / "last.json", {**position, "state": name})
        for old in out.glob("state-*"):
            if old.name != name:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _open_log(path: Path, step: int):
    """The log open for appending, without what a killed run wrote after its last save."""
    kept = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    # A kill may have torn the last line.
    path.write_text("".join(line for line in kept if _early(line, step)))
    return path.open("a")


def _early(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, TypeError, KeyError):
        return False


def _load(accelerator: Accelerator, out: Path) -> dict:
    position = _read_json(out / "last.json")
    numbers = (position.get(name) for name in ("epoch", "batch", "step", "steps"))
    if not (all(type(n) is int for n in numbers) and isinstance(position.get("state"), str)):
        raise UsageError(f"{out / 'last.json'} is damaged: start the run again in another --out")
    state = out / position.pop("state")
    try:
        accelerator.load_state(str(state))
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, SafetensorError, PickleError):
        raise UsageError(
            f"the save {state} is missing or damaged: start the run again in another --out"
        ) from None
    return position


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text())
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UsageError(f"{path} is damaged: start the run again in another --out")
    return values


def write_json(path: Path, values: Mapping) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of either."""
    path = Path(path)
    temporary = path.with_name(path.name + f".{os.getpid()}.partial")
    temporary.write_text(json.dumps(values, indent=1, default=str) + "\n")
    temporary.replace(path)
