"""Makes a whole data set, scene by scene, in several processes, and goes on where it was stopped.

A scene is done when its table rows lie in the folder of unfinished work; the tables are joined,
that folder is removed and synthetic.json is written last, so a folder with synthetic.json is whole.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from fd3d.data.synthetic.parameters import DEVKIT_SPLITS, GENERATOR_VERSION, Parameters
from fd3d.data.synthetic.scene import make_scene
from fd3d.data.synthetic.tables import write_json, write_tables
from fd3d.data.synthetic.things import KINDS
from fd3d.errors import UsageError
from fd3d.progress import Progress

RECORD = "synthetic.json"
_UNFINISHED = ".unfinished"


@dataclass(frozen=True, kw_only=True)
class Made:
    """What `generate` did.

    frames: keyframes of the data set; made: those rendered by this call; seconds: this call took;
    per_frame: annotations in an average keyframe by category.
    """

    out: Path
    parameters: Parameters
    frames: int
    made: int
    seconds: float
    per_frame: dict[str, float]

    @property
    def rate(self) -> float:
        """Keyframes a second in this call."""
        return self.made / max(self.seconds, 1e-9)


def generate(
    *,
    out: Path | str,
    scenes: int,
    val_scenes: int = 0,
    frames: int = 20,
    seed: int = 0,
    width: int = 1600,
    camera_hz: int = 4,
    reach: float = 50.0,
    version: str = "v1.0-synthetic",
    workers: int = 2,
    quiet: bool = False,
) -> Made:
    """Make a data set in the nuScenes schema below `out`; the same arguments give the same bytes.

    Args:
        out: a folder that is new, empty, or holds an unfinished run with the same arguments, which
            is then finished; a finished one is left as it is.
        scenes, val_scenes: how many scenes of the splits train and val.
        frames: keyframes a scene, half a second apart.
        seed: decides everything together with the other arguments; `workers` does not.
        width: of the images, in pixels; the height is 9/16 of it.
        camera_hz: images a second of each camera, keyframes among them.
        reach: metres from the car within which things are put.
        version: name of the folder of tables.
        workers: processes.
        quiet: print no progress.

    Raises:
        UsageError: an argument makes no sense, or `out` holds something else.
    """
    parameters = Parameters(
        scenes=scenes,
        val_scenes=val_scenes,
        frames=frames,
        seed=seed,
        width=width,
        camera_hz=camera_hz,
        reach=reach,
        version=version,
    )
    if workers < 1:
        raise UsageError(f"{workers} workers cannot work: use --workers 1 or more")
    started = time.monotonic()
    out = Path(out)
    record = _claim(out, parameters)
    made = 0
    if record is None:
        unfinished = out / _UNFINISHED
        names = parameters.scene_names()
        todo = [i for i in range(len(names)) if not _rows_path(unfinished, i).exists()]
        with Progress(
            total=len(names) * frames,
            unit="frames",
            title=f"rendering {len(names)} scenes",
            done=(len(names) - len(todo)) * frames,
            quiet=quiet,
        ) as progress:
            for _ in _scenes(parameters, todo, out, workers):
                progress.advance(frames)
                made += frames
        rows = [json.loads(_rows_path(unfinished, i).read_text()) for i in range(len(names))]
        write_tables(out, parameters, rows)
        record = _record(parameters, rows)
        write_json(out / RECORD, record)
        shutil.rmtree(unfinished)
    return Made(
        out=out,
        parameters=parameters,
        frames=record["keyframes"],
        made=made,
        seconds=time.monotonic() - started,
        per_frame=record["annotations_per_keyframe"],
    )


def _rows_path(unfinished: Path, number: int) -> Path:
    return unfinished / f"{number:05d}.json"


def _claim(out: Path, parameters: Parameters) -> dict | None:
    """The record of a finished data set, or None once the folder is ready to be written to."""
    wanted = {"generator_version": GENERATOR_VERSION, "parameters": parameters.to_dict()}
    for name in (RECORD, f"{_UNFINISHED}/parameters.json"):
        path = out / name
        if path.is_file():
            found = json.loads(path.read_text())
            if {key: found.get(key) for key in wanted} != wanted:
                raise UsageError(
                    f"{out} holds a synthetic data set made with other parameters: "
                    "choose another --out or remove that folder"
                )
            return found if name == RECORD else None
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            f"{out} is not empty and was not made by this command: choose a new folder for --out"
        )
    (out / _UNFINISHED).mkdir(parents=True, exist_ok=True)
    write_json(out / _UNFINISHED / "parameters.json", wanted)
    return None


def _scenes(parameters: Parameters, todo: list[int], out: Path, workers: int) -> Iterator[int]:
    """Make the scenes `todo`, yielding each one's number when it is done."""
    workers = min(workers, len(todo))
    if workers <= 1:
        for number in todo:
            yield _finish_scene(parameters, number, out)
        return
    # Fresh processes: forking one that has run torch or BLAS threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        futures = [pool.submit(_finish_scene, parameters, number, out) for number in todo]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _finish_scene(parameters: Parameters, number: int, out: Path) -> int:
    rows = make_scene(parameters, number, out)
    write_json(_rows_path(out / _UNFINISHED, number), rows)
    return number


def _record(parameters: Parameters, scenes: list[dict[str, list]]) -> dict:
    """What synthetic.json says: the arguments, the generator's version, and what came out."""
    keyframes = sum(len(rows["sample"]) for rows in scenes)
    names = {parameters.token("category", kind.category): kind.category for kind in KINDS.values()}
    counts: Counter[str] = Counter()
    for rows in scenes:
        for row in rows["instance"]:
            counts[names[row["category_token"]]] += row["nbr_annotations"]
    return {
        "generator": "fd3d.data.synthetic",
        "generator_version": GENERATOR_VERSION,
        "parameters": parameters.to_dict(),
        "keyframes": keyframes,
        "splits_for_the_devkit": DEVKIT_SPLITS,
        "annotations_per_keyframe": {
            name: round(counts[name] / keyframes, 3) for name in sorted(counts)
        },
    }
