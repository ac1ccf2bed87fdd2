"""Batches are prepared in order and once; on a GPU one step before they are used."""

from dataclasses import dataclass

import pytest
import torch

from fd3d.distill.ahead import Pinned, ahead, tensors_in


def test_on_the_cpu_an_item_is_prepared_when_it_is_asked_for():
    prepared = []

    def prepare(item):
        prepared.append(item)
        return 10 * item

    batches = ahead(range(3), prepare, "cpu")
    assert next(batches) == 0 and prepared == [0]
    assert list(batches) == [10, 20] and prepared == [0, 1, 2]


def test_every_tensor_of_a_batch_is_found():
    @dataclass
    class Pair:
        image: torch.Tensor
        boxes: tuple

    one, two, three, four = (torch.zeros(n) for n in range(1, 5))
    found = list(tensors_in((Pair(one, (two, None)), {"bev": three, "tables": [four]}, "name")))
    assert [len(tensor) for tensor in found] == [1, 2, 3, 4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_maps_reach_the_gpu_unchanged_while_it_computes():
    device = torch.device("cuda")
    pinned, busy = Pinned(device), torch.randn(2048, 2048, device=device)
    source = torch.empty((2, 64, 64), dtype=torch.float16)

    def prepare(number):
        source.fill_(number)  # the ring's slot, used again at once
        return pinned.send({"bev": source})["bev"].float()

    for number, bev in enumerate(ahead(range(20), prepare, device)):
        busy = torch.tanh(busy @ busy)
        assert bool((bev == number).all())
