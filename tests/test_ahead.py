"""Batches are prepared in order and once; on a GPU one step before they are used."""

from contextlib import nullcontext

import pytest
import torch

from fd3d.distill.ahead import Pinned, ahead


def test_on_the_cpu_an_item_is_prepared_when_it_is_asked_for():
    prepared = []

    def prepare(item):
        prepared.append(item)
        return 10 * item

    batches = ahead(range(3), prepare, "cpu")
    assert next(batches) == 0 and prepared == [0]
    assert list(batches) == [10, 20] and prepared == [0, 1, 2]


def test_on_a_gpu_each_item_is_started_before_the_one_in_use_and_none_is_lost(monkeypatch):
    """The order of events on a stand-in for torch's streams; what they promise is torch's."""
    told = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            return told[-1]

        def wait_event(self, event):
            told.append(f"{self.name} waits for {event}")

    main = Stream("main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    for item in ahead("abc", lambda item: told.append(f"prepare {item}") or item, "cuda"):
        told.append(f"step {item}")
    prepared = [f"prepare {item}" for item in "abc"]
    assert told == [
        *("side waits for main", prepared[0]),
        *("side waits for main", prepared[1], f"main waits for {prepared[0]}", "step a"),
        *("side waits for main", prepared[2], f"main waits for {prepared[1]}", "step b"),
        *(f"main waits for {prepared[2]}", "step c"),
    ]
    assert list(ahead([], str, "cuda")) == []


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
