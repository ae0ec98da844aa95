from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from hubfusion.contribute.statistics import activation_products, fisher_diagonal
from hubfusion.errors import RecipeError

torch = pytest.importorskip("torch")


class Logistic(torch.nn.Module):
    """Two classes with logits (0, w·x): its Fisher information is known in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.5, -1.0]))
        self.unused = torch.nn.Parameter(torch.zeros(3))

    def forward(self, x):
        z = x @ self.w
        return SimpleNamespace(logits=torch.stack([torch.zeros_like(z), z], dim=-1))


def test_the_fisher_diagonal_of_logistic_regression_is_its_closed_form(tmp_path):
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]])
    assert fisher_diagonal(Logistic(), [{"x": x[:2]}, {"x": x[2:]}], tmp_path / "f.safetensors") == 3
    p = 1 / (1 + np.exp(-(x.numpy() @ np.array([0.5, -1.0]))))
    expected = ((p * (1 - p))[:, None] * x.numpy() ** 2).mean(axis=0)
    found = load_file(tmp_path / "f.safetensors")
    np.testing.assert_allclose(found["w"], expected, rtol=1e-5)
    assert found["unused"].tolist() == [0, 0, 0]


class Layers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

    def forward(self, x, attention_mask=None):
        return self.second(torch.relu(self.first(x)))


def test_activation_products_are_those_of_the_tokens_that_count(tmp_path):
    model, x = Layers(), torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    path = tmp_path / "r.safetensors"
    assert activation_products(model, [{"x": x, "attention_mask": mask}], path) == 8
    kept = x[mask.bool()].double()
    hidden = torch.relu(model.first(x[mask.bool()])).detach().double()
    found = load_file(path)
    assert set(found) == {"first.weight", "second.weight"}
    np.testing.assert_allclose(found["first.weight"], (kept.T @ kept).numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["second.weight"], (hidden.T @ hidden).numpy(), rtol=1e-5, atol=1e-6)


def test_no_examples_are_refused(tmp_path):
    for make in (fisher_diagonal, activation_products):
        with pytest.raises(RecipeError, match="at least one example is needed"):
            make(Layers(), [], tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
