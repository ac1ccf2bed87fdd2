"""Costs: the paper's numbers, the parts behind them, and the command."""

import json

import pytest
import torch

from fd3d import efficiency, models
from fd3d.errors import UsageError, exit_code


@pytest.mark.parametrize(
    ("name", "paper", "parameters"),
    [
        ("bevdepth-r50l", 322.17, 53_217_566),
        ("bevdepth-r50h", 1288.70, 53_217_566),
        ("bevdepth-r50l-single", 194.942, 52_885_214),
    ],
)
def test_the_paper_numbers_are_reproduced(name, paper, parameters):
    found = efficiency.cost(name)
    assert found["gflops_paper"] == pytest.approx(paper, rel=1e-4)
    assert found["parameters"] == parameters


# GMAC of bevdepth-r50l and -r50h as counted on the original code; BEV nets = depth blocks,
# pre-process and BEV backbone.
ORIGINAL = {
    "image backbone": (176.16, 704.66),
    "image neck": (26.58, 106.30),
    "camera gate": (1.11, 4.43),
    "BEV nets": (48.77, 195.09),
    "deformable convolution": (5.51, 22.03),
    "depth and context": (0.40, 1.62),
    "BEV pyramid": (42.14, 168.58),
    "head": (24.82, 99.28),
}


@pytest.mark.parametrize("size", [0, 1], ids=["low", "high"])
def test_every_part_is_that_of_the_original(size):
    found = efficiency.cost(("bevdepth-r50l", "bevdepth-r50h")[size])
    parts = {name: row["gmac_plain"] for name, row in found["parts"].items()}
    parts["BEV nets"] = sum(
        parts.pop(name) for name in ("depth blocks", "pre-process", "BEV backbone")
    )
    assert set(parts) == set(ORIGINAL)
    for name, value in parts.items():
        assert value == pytest.approx(ORIGINAL[name][size], rel=5e-3, abs=5e-3), name


@pytest.mark.parametrize("name", models.names())
def test_parts_add_up_to_the_whole(name):
    found = efficiency.cost(name)
    for key in ("parameters", "gmac_plain", "gflops_paper"):
        assert sum(row[key] for row in found["parts"].values()) == pytest.approx(found[key])


def test_the_count_is_that_of_a_real_pass():
    """torch's own counter sees the few products of geometry besides."""
    from torch.utils.flop_counter import FlopCounterMode

    model = models.build("bevdepth-tiny-l").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(efficiency.blank_batch(model))
    counted = efficiency.giga_multiply_adds(model)
    assert counted == pytest.approx(counter.get_total_flops() / 2e9, rel=5e-3)
    assert model.img_view_transformer.training is False


def test_the_command_prints_json_and_measures_where_asked(capsys):
    words = ["bevdepth-tiny-l", "--json", "--measure", "--device", "cpu", "--seconds", "0.1"]
    assert exit_code(lambda: efficiency.main(efficiency.parse(words))) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["name"] == "bevdepth-tiny-l" and found["parts"]["head"]["parameters"] > 0
    run = found["measured"]
    assert run["fps"] > 0 and run["peak_mib"] > 50 and run["passes"] >= 3


def test_the_table_names_every_part(capsys):
    efficiency.main(efficiency.parse(["bevdet-r50-4d-depth"]))
    said = capsys.readouterr().out
    assert "74,901,440 trainable parameters" in said and "depth and context" in said


def test_unknown_names_and_devices_are_refused():
    with pytest.raises(UsageError, match="'r50' is not known: choose from bevdepth-r50h"):
        efficiency.main(efficiency.parse(["r50"]))
    with pytest.raises(UsageError, match="--device foo cannot be used"):
        efficiency.main(efficiency.parse(["--device", "foo"]))
