"""The names that learn, and what a checkpoint must hold."""

import pytest
import torch
from torch import nn

from tc_lightning.trainable import check_names, gradient_report, keep_trainable, trainable_names


@pytest.fixture
def model():
    made = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1), nn.BatchNorm1d(1))
    made[0].requires_grad_(False)
    made[2].requires_grad_(False)
    return made


def test_names_and_the_part_of_a_state_dict_that_learns(model):
    assert trainable_names(model) == ["1.weight", "1.bias"]
    kept = keep_trainable(model.state_dict(), model)
    assert list(kept) == ["1.weight", "1.bias"] and torch.equal(kept["1.weight"], model[1].weight)


def test_exactly_these_names_in_these_shapes(model):
    state = keep_trainable(model.state_dict(), model)
    check_names(state, model)
    with pytest.raises(ValueError, match=r"of another run: 1 parameters missing \(1.bias\), 0 unexpected \(none\)"):
        check_names({"1.weight": state["1.weight"]}, model)
    with pytest.raises(ValueError, match=r"0 parameters missing \(none\), 1 unexpected \(0.weight\); check backbone and tune"):
        check_names(state | {"0.weight": model[0].weight}, model)
    with pytest.raises(ValueError, match=r"checkpoint's 1.weight is \(5, 3\), not \(1, 3\)"):
        check_names(state | {"1.weight": torch.zeros(5, 3)}, model)


def test_gradient_report(model):
    model.eval()
    model[1].bias.requires_grad_(False)
    model(torch.ones(1, 2)).sum().backward()
    assert gradient_report(model) == {"with": ["1.weight"], "without": [], "leaked": []}
    model[1].bias.requires_grad_(True)
    model[0].weight.grad = torch.zeros(3, 2)
    assert gradient_report(model) == {"with": ["1.weight"], "without": ["1.bias"], "leaked": ["0.weight"]}
