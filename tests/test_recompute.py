"""Activation checkpointing changes memory, not numbers."""

import copy

import pytest
import torch
from test_models_generations import batch_for, narrow
from test_models_network import ring_batch

from fd3d import models
from fd3d.models.bevdepth.network import BEVDepth
from fd3d.models.recompute import Recomputing, save_memory


def step(model, batch):
    """Loss terms, gradients, batch-norm statistics and the bytes held for the backward pass."""
    held = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        terms = model.loss(model(batch), batch)
    sum(terms.values()).backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    return terms, gradients, dict(model.named_buffers()), sum(held.values())


def both(model, batch, repeats=2):
    """The same steps with and without; every norm has learned more than once."""
    saving = copy.deepcopy(model)
    save_memory(saving)
    for _ in range(repeats):
        plain, saved = step(model, batch), step(saving, batch)
    return plain, saved


@pytest.mark.parametrize("generation", [1, 2])
def test_terms_gradients_and_statistics_stay_the_same(generation):
    torch.manual_seed(0)
    if generation == 1:
        model = models.build("bevdepth-tiny-l").train()
        batch = ring_batch(model)
    else:
        model = BEVDepth(narrow(2)).train()
        batch = batch_for(model)
        for module in model.modules():  # drawn once for each model otherwise
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    plain, saved = both(model, batch)
    for found, expected in zip(saved[:3], plain[:3], strict=True):
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], msg=name)
    assert any(name.endswith("num_batches_tracked") for name in plain[2])


def test_less_is_held():
    model = models.build("bevdepth-tiny-l").train()
    plain, saved = both(model, ring_batch(model), repeats=1)
    assert saved[3] < 0.7 * plain[3]


def test_evaluation_and_frozen_passes_compute_once():
    model = models.build("bevdepth-tiny-l")
    save_memory(model)
    counts = []
    block = next(m for m in model.img_backbone.modules() if isinstance(m, Recomputing))
    block.register_forward_hook(lambda *_: counts.append(1))
    batch = ring_batch(model)
    model.eval()(batch)
    with torch.no_grad():
        model.train()(batch)
    assert len(counts) == 2 * model.image.moments
