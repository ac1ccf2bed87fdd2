"""The recipes end to end, as a user runs them: train, cache, distil, resume, evaluate."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fd3d import models
from fd3d.data.batch import collate
from fd3d.data.frames import FrameDataset
from fd3d.data.index import FrameIndex
from fd3d.distill.trainee import Trainee
from fd3d.models import checkpoints
from recipes import distill_bevdepth
from recipes.training import EpochOrder

ROOT = Path(__file__).parents[1]
VERSION = "v1.0-synthetic"


def run(*argv: object, ok: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert "Traceback" not in done.stderr or not ok, done.stderr
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def flags(synthetic):
    return [
        "--dataroot",
        synthetic.dataroot,
        "--version",
        VERSION,
        "--batch",
        2,
        "--workers",
        0,
    ] + [
        "--warmup",
        4,
        "--lr",
        1e-3,
        "--log-steps",
        1,
    ]


@pytest.fixture(scope="module")
def expert(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("expert")
    run("recipes/train.py", "--model", "bevdepth-tiny-h", "--out", out, "--max-steps", 4, *flags)
    return out / "model.safetensors"


@pytest.fixture(scope="module")
def cache(expert, synthetic, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "expert.zarr"
    run(
        "-m",
        "cache_tools.cli",
        "build",
        *("--expert", "bevdepth-tiny-h", "--checkpoint", expert, "--dataroot", synthetic.dataroot),
        *("--version", VERSION, "--split", "train", "--out", out, "--workers", 0),
        *("--signals", "bev,detections,heatmap"),
    )
    return out


def distil(flags, out, *more, ok=True):
    return run(
        "recipes/distill_bevdepth.py",
        *("--model", "bevdepth-tiny-l", "--out", out, *flags, *more),
        ok=ok,
    )


@pytest.mark.parametrize("distiller", ["l2", "heatmap"])
def test_live_and_cached_give_the_same_losses_for_fifty_steps(
    distiller, flags, expert, cache, tmp_path
):
    """The same apprentice, weights and batches at every step; only the source differs."""
    common = ["--model", "bevdepth-tiny-l", "--out", tmp_path, "--distiller", distiller, *flags]
    live_flags = ["--expert", "bevdepth-tiny-h", "--expert-checkpoint", expert]
    cached_args = distill_bevdepth.parse([*map(str, common), "--cache", str(cache)])
    live_args = distill_bevdepth.parse([*map(str, common + live_flags), "--source", "live"])
    index = FrameIndex.open(dataroot=cached_args.dataroot, version=VERSION)
    cached = distill_bevdepth.make_source(cached_args, index)
    live = distill_bevdepth.make_source(live_args, index)
    runs = []
    live.expert.model.img_bev_encoder_neck.register_forward_hook(lambda *_: runs.append(1))

    torch.manual_seed(0)
    model = models.build("bevdepth-tiny-l")
    trainee = Trainee(model, distill_bevdepth.make_distiller(cached_args, model, cached, cached))
    frames = FrameDataset(
        index=index, positions=index.split("train"), image=model.image, truth=True
    )
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=1e-3)
    order = EpochOrder(length=len(frames), seed=0)
    for step in range(50):
        order.set_epoch(step)
        rows = list(order)[:2]
        batch = collate([frames[row] for row in rows])
        tokens = [frames.tokens[row] for row in rows]
        signals = {
            source: source.signals([source.load(token) for token in tokens], "cpu")
            for source in (cached, live)
        }
        outputs = trainee.model(batch)
        (from_cache,) = trainee.distiller(outputs, signals[cached], batch).values()
        with torch.no_grad():
            (from_live,) = trainee.distiller(outputs, signals[live], batch).values()
        assert from_cache.item() == pytest.approx(from_live.item(), rel=1e-3), step
        from_cache.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(runs) == 50


@pytest.mark.parametrize("source", ["cached", "live"])
def test_the_recipe_trains_from_either_source_and_records_it(
    source, flags, expert, cache, tmp_path
):
    where = {
        "cached": ["--cache", cache],
        "live": ["--expert", "bevdepth-tiny-h", "--expert-checkpoint", expert],
    }
    words = ["--distiller", "l2", "--epochs", 1, "--source", source, *where[source]]
    distil(flags, tmp_path / "run", *words)
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    kept = checkpoints.read_metadata(tmp_path / "run" / "model.safetensors")
    for name in ("signals_id", "cache_id") if source == "cached" else ("expert",):
        assert identity[name] and identity[name] in json.dumps(kept)
    assert all("l2" in step for step in log_of(tmp_path / "run"))


def test_a_resumed_run_equals_an_unbroken_one(flags, tmp_path):
    common = ["--distiller", "none", "--epochs", 4]
    distil(flags, tmp_path / "whole", *common)
    distil(flags, tmp_path / "broken", *common, "--max-steps", 5)
    distil(flags, tmp_path / "broken", *common, "--resume")
    whole, broken = log_of(tmp_path / "whole"), log_of(tmp_path / "broken")
    assert [step["step"] for step in broken] == [step["step"] for step in whole]
    for one, other in zip(whole, broken, strict=True):
        assert one["task0.heatmap"] == pytest.approx(other["task0.heatmap"], rel=1e-5)
        assert one["lr"] == other["lr"]


def test_resuming_with_another_cache_or_over_a_run_is_refused(flags, cache, tmp_path):
    common = ["--distiller", "l2", "--epochs", 1, "--cache", cache]
    distil(flags, tmp_path / "run", *common)
    again = distil(flags, tmp_path / "run", *common, ok=False)
    assert again.returncode == 2 and "--resume" in again.stderr
    record = tmp_path / "run" / "run.json"
    values = json.loads(record.read_text())
    values["identity"]["cache_id"] = "0" * 32
    record.write_text(json.dumps(values))
    other = distil(flags, tmp_path / "run", *common, "--resume", ok=False)
    assert other.returncode == 2 and "cache_id" in other.stderr
    assert "Traceback" not in again.stderr + other.stderr


def test_losses_do_not_depend_on_the_number_of_workers(flags, cache, tmp_path):
    common = ["--distiller", "l2", "--compare", "apprentice", "--cache", cache, "--max-steps", 5]
    for workers in (0, 2):
        distil(flags, tmp_path / str(workers), *common, "--workers", workers)
    told = [
        [{**step, "seconds": 0, "wait": 0} for step in log_of(tmp_path / name)]
        for name in ("0", "2")
    ]
    assert len(told[0]) == 5 and told[0] == told[1]


def test_class_balanced_frames_and_a_given_backbone(flags, tmp_path):
    backbone = models.build("bevdepth-tiny-l").img_backbone.state_dict()
    file = tmp_path / "resnet.pth"
    torch.save({name: torch.full_like(value, 0.25) for name, value in backbone.items()}, file)
    common = ["recipes/train.py", "--model", "bevdepth-tiny-l", *flags, "--cbgs", "--lr", 1e-30]
    out = tmp_path / "run"
    done = run(*common, "--backbone", file, "--max-steps", 1, "--out", out)
    # Two scenes of five frames: ten classes' worth of draws are more, or fewer, than they are.
    assert "training bevdepth-tiny-l on" in done.stdout and "on 10 frames" not in done.stdout
    trained = load_file(out / "model.safetensors")
    assert bool((trained["img_backbone.conv1.weight"] == 0.25).all())
    again = run(*common[:-3], "--resume", "--out", out, ok=False)
    assert again.returncode == 2 and "cbgs" in again.stderr


def test_a_refused_run_leaves_its_folder_free(flags, cache, tmp_path):
    common = ["recipes/train.py", "--model", "bevdepth-tiny-l", *flags, "--out", tmp_path]
    assert run(*common, "--batch", 1000, ok=False).returncode == 2
    run(*common, "--max-steps", 1)
    again = run(*common, "--max-steps", 1, ok=False)
    assert again.returncode == 2 and "holds a run already" in again.stderr
    common = ["--cache", cache, "--model", "bevdepth-r50l"]
    far = distil(flags, tmp_path / "far", *common, "--distiller", "l2", ok=False)
    assert far.returncode == 2 and "cannot be compared" in far.stderr
    planes = distil(flags, tmp_path / "far", *common, ok=False)
    assert planes.returncode == 2 and "--terms gen_bev,focal" in planes.stderr
    assert not (tmp_path / "far").exists()


def test_two_trainings_into_one_folder_are_refused(flags, tmp_path):
    common = ["recipes/train.py", "--model", "bevdepth-tiny-l", *flags, "--out", tmp_path]
    run(*common, "--max-steps", 2)
    ready = "from recipes.run_folder import hold; from pathlib import Path; import sys; "
    ready += "hold(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", ready, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        refused = run(*common, "--resume", ok=False)
        other.kill()
    assert refused.returncode == 2 and f"process {other.pid} is training" in refused.stderr
    run(*common, "--resume", "--max-steps", 3)


def test_a_run_of_so_many_steps_ends_there_and_drops_at_its_own_thirds(flags, tmp_path):
    common = ["recipes/train.py", "--model", "bevdepth-tiny-l", *flags, "--warmup", 0]
    common += ["--out", tmp_path]
    run(*common, "--steps", 12, "--max-steps", 5)
    for other in (["--steps", 11], ["--epochs", 6]):
        refused = run(*common, *other, "--resume", ok=False)
        assert refused.returncode == 2, refused.stderr
        assert "with steps 12" in refused.stderr or "now it is epochs 6" in refused.stderr
    run(*common, "--steps", 12, "--resume")
    rates = [step["lr"] for step in log_of(tmp_path)]
    assert rates == pytest.approx([1e-3] * 8 + [1e-4] * 3 + [1e-5])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == summary["planned_steps"] == 12 and summary["epochs"] is None


def test_learning_rate_per_epoch_is_the_same_with_two_processes(flags, tmp_path):
    common = ["recipes/train.py", "--model", "bevdepth-tiny-l", "--epochs", 12, "--cpu", *flags]
    common += ["--warmup", 0]
    run(*common, "--out", tmp_path / "one")
    # `accelerate launch --cpu` starts a single process whatever it is told.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    run(*launch, *common, "--out", tmp_path / "two")
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2

    def last_rates(folder):
        return {step["epoch"]: step["lr"] for step in log_of(folder)}

    one, two = last_rates(tmp_path / "one"), last_rates(tmp_path / "two")
    assert one == pytest.approx(two)
    assert [one[epoch] for epoch in (7, 8, 10, 11)] == pytest.approx([1e-3, 1e-4, 1e-4, 1e-5])


def test_evaluation_writes_a_results_file_and_scores(flags, expert, synthetic, tmp_path):
    run(
        "recipes/evaluate.py",
        *("--model", "bevdepth-tiny-h", "--checkpoint", expert, "--dataroot", synthetic.dataroot),
        *("--version", VERSION, "--split", "val", "--out", tmp_path, "--workers", 0, "--control"),
    )
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert 0.0 <= scores["nds"] <= 1.0 and scores["checkpoint"]["fd3d_architecture"]
    assert json.loads((tmp_path / "results.json").read_text())["meta"]["use_camera"] is True


@pytest.mark.parametrize(
    "change, said",
    [
        (["--dataroot", "nowhere"], "dataroot"),
        (["--version", "v9"], "version"),
        (["--split", "dev"], "split"),
        (["--model", "bevdepth-r18"], "bevdepth-tiny-l"),
        (["--cache", "nowhere.zarr"], "nowhere.zarr"),
        (["--source", "live"], "--cache"),
        (["--source", "live", "--cache", ""], "--expert"),
        (["--standardise"], "--standardise"),
        (["--log-steps", "0"], "--log-steps"),
        (["--batch", "100000"], "--batch"),
        (["--steps", "0"], "--steps"),
        (["--weight", "inf"], "--weight"),
        (["--steps", "5", "--epochs", "24"], "--epochs"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(change, said, flags, cache, tmp_path):
    done = distil(flags, tmp_path / "out", "--distiller", "l2", "--cache", cache, *change, ok=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert said in done.stderr.strip().splitlines()[-1]
