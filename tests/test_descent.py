"""One optimizer step, and how hard each term pulls in it."""

import pytest
import torch
from accelerate import Accelerator

from recipes import descent


def test_the_gradient_of_a_term_is_that_of_its_weighted_value():
    one = torch.tensor([3.0, 4.0], requires_grad=True)
    terms = {"square": one.square().sum(), "sum": one.sum()}
    found = descent.gradient_norms(terms, {"square": 0.5}, [one])
    assert found == pytest.approx({"grad.square": 5.0, "grad.sum": 2**0.5})


def test_a_head_that_learns_along_is_clipped_apart():
    """A large gradient of one group leaves the other's step as it is."""
    small, large = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [small]}, {"params": [large]}], lr=1.0)
    terms = {"small": small.sum(), "large": 1e6 * large.sum()}
    descent.descend(Accelerator(cpu=True), optimizer, terms, {}, clip=2.0)
    assert float(small.detach()) == -1.0 and float(large.detach()) == pytest.approx(-2.0)
