"""The gain experiment's arithmetic: rows, weights, paired differences and their intervals."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gain
import gain_report

from fd3d.errors import UsageError


def run(row, seed, nds, data_seed=12, setting="plain"):
    names = {"setting": setting, "row": row, "seed": seed, "data_seed": data_seed}
    return {**names, "nds": nds, "map": nds / 2}


def test_rows_are_read_apart():
    assert gain_report.parts_of("fd3d gt areas/tiny@0.5") == ("fd3d gt areas", "tiny", "0.5")
    assert gain_report.parts_of("l2") == ("l2", "balanced", "")


@pytest.mark.parametrize(
    ("row", "weight"),
    [
        ("l2", 3.0),
        ("heatmap", 0.05),
        ("heatmap standardised", 5.0),
        ("heatmap with pv", 0.5),
        ("fd3d", 0.5),
        ("fgd", 0.5),
    ],
)
def test_a_factor_is_one_of_the_row_s_own_weight(row, weight):
    assert gain.weight_of(row, 0.5) == pytest.approx(weight)


def test_differences_are_paired_by_data_and_training_seed():
    runs = [run("none", 0, 0.10), run("none", 1, 0.20), run("l2", 0, 0.15), run("l2", 1, 0.22)]
    runs += [run("l2", 2, 0.90), run("none", 0, 0.5, data_seed=13)]
    assert gain_report.differences(runs, "l2", "nds", "none") == pytest.approx([5.0, 2.0])


def test_the_interval_is_student_s():
    mean, reach = gain_report.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # t(0.975, 4) = 2.776, standard error 0.7071.
    assert mean == 3.0 and reach == pytest.approx(2.776 * math.sqrt(0.5), rel=1e-3)
    assert math.isnan(gain_report.interval([1.0])[1])


def test_the_report_keeps_the_tuning_set_apart():
    runs = [
        run(row, seed, (0.1 if row == "none" else 0.2) + 0.01 * seed, data_seed)
        for row in ("none", "l2")
        for seed in (0, 1)
        for data_seed in (12, 13)
    ]
    runs += [run("none", 0, 0.9, data_seed=11), run("l2", 0, 0.1, data_seed=11)]
    together = gain_report.report(runs).partition("data seeds 12 and 13")[2]
    assert "| `l2` | 4 | 20.5 | 10.2 | +10.0 ± 0.0 | +5.0 ± 0.0 |" in together
    assert "-80.0" not in together


def test_rows_of_one_data_seed_are_not_pooled_with_rows_of_two():
    runs = [run("none", 0, 0.1, data_seed) for data_seed in (12, 13)]
    runs += [run("l2", 0, 0.2, data_seed=13)]
    together = gain_report.report(runs).partition("data seeds 12 and 13")[2]
    assert "`none`" in together and "`l2`" not in together


def test_differences_may_be_against_another_row():
    runs = [run("l2", seed, 0.2 + 0.01 * seed) for seed in (0, 1, 2)]
    runs += [run("fd3d", seed, 0.3 + 0.01 * seed) for seed in (0, 1)]
    text = gain_report.report(runs, "fd3d")
    assert "| `l2` | 3 | 21.0 | 10.5 | -10.0 ± 0.0 (2 pairs) | -5.0 ± 0.0 (2 pairs) |" in text


@pytest.mark.parametrize("row", ["l3", "l2/large", "l2@0.5/tiny", "l2@x"])
def test_rows_that_are_none_are_refused(row, tmp_path):
    args = gain.parse(["--work", str(tmp_path), "--rows", row, "--json", str(tmp_path / "r.json")])
    with pytest.raises(UsageError, match="row"):
        gain.main(args)
