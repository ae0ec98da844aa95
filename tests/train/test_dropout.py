"""Dropout from a generator of its own: the rate, the scale, the gradient, and attention as torch computes it."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch.nn import functional

from hubfusion.train import dropout
from hubfusion.train.dropout import Masks


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
def test_the_rate_and_the_mean_are_those_asked_for(rate: float) -> None:
    """A million draws: the share that is dropped has a standard deviation of at most 0.0005."""
    with Masks(0):
        found = functional.dropout(torch.ones(1000, 1000), rate)
    kept = found[found != 0]
    assert abs(float((found == 0).float().mean()) - rate) < 0.0025
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)), rtol=1e-4, atol=0)


def test_neighbors_and_rows_drop_independently() -> None:
    dropped = Masks(0).draw((1000, 1000), 0.5).numpy() == 0
    for other in (np.roll(dropped, 1, axis=1), np.roll(dropped, 4, axis=1), np.roll(dropped, 1, axis=0)):
        assert abs(np.corrcoef(dropped.ravel(), other.ravel())[0, 1]) < 0.005


def test_a_key_names_one_sequence_of_masks() -> None:
    a, b, c = Masks(1, 2), Masks(1, 2), Masks(2, 1)
    first = a.draw((64,), 0.5)
    assert torch.equal(first, b.draw((64,), 0.5))
    assert not torch.equal(first, a.draw((64,), 0.5))
    assert not torch.equal(first, c.draw((64,), 0.5))


def test_the_gradient_goes_where_the_value_went() -> None:
    x = torch.randn(50, 7, requires_grad=True)
    with Masks(3):
        kept = torch.nn.Dropout(0.3)(x)
    kept.sum().backward()
    assert 0 < int((kept == 0).sum()) < 350
    torch.testing.assert_close(x.grad * x, kept)


def test_what_is_no_random_dropout_stays_as_it_is() -> None:
    x = torch.randn(40)
    with Masks(0):
        assert torch.equal(functional.dropout(x, 0.5, training=False), x)
        assert torch.equal(functional.dropout(x, 0.0), x)
        assert torch.equal(functional.dropout(x, 1.0), torch.zeros(40))
        with pytest.raises(ValueError, match="between 0 and 1"):
            functional.dropout(x, 1.5)


@pytest.mark.parametrize("mask", ["none", "bool", "additive", "one for all", "by head"])
def test_attention_drops_entries_of_the_weights_that_torch_computes(mask: str) -> None:
    """With the identity as values the output is the weights, after dropout; torch's own come from dropout 0."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 64, 8), torch.randn(2, 3, 64, 8)
    value = torch.eye(64).expand(2, 3, 64, 64)
    allowed = torch.ones(2, 1, 64, 64, dtype=torch.bool)
    allowed[1, ..., 50:] = False
    bias = {
        "none": None,
        "bool": allowed,
        "additive": torch.where(allowed, 0.25, -1e9),
        "one for all": torch.randn(64, 64),
        "by head": torch.randn(1, 3, 64, 64),
    }[mask]
    wanted = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.5)
    with Masks(0):
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.5, dropout_p=0.25)
        plain = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.5)
    torch.testing.assert_close(plain, wanted)
    kept = found != 0
    torch.testing.assert_close(found[kept], wanted[kept] / 0.75, rtol=1e-4, atol=1e-6)
    assert abs(float((found == 0)[wanted > 1e-12].float().mean()) - 0.25) < 0.02  # 20,000 entries: sd 0.003


def test_a_bias_that_learns_gets_its_gradient() -> None:
    query, bias = torch.randn(2, 3, 8, 4), torch.zeros(1, 3, 8, 8, requires_grad=True)
    with Masks(0):
        functional.scaled_dot_product_attention(query, query, query, bias, 0.5).square().sum().backward()
    assert bias.grad is not None and float(bias.grad.abs().min()) > 0


def test_attention_in_bfloat16_is_near_that_in_float32() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 32, 8).requires_grad_() for _ in range(3))
    with Masks(0):
        wanted = functional.scaled_dot_product_attention(query, key, value, dropout_p=0.25)
    with Masks(0), torch.autocast("cpu", dtype=torch.bfloat16):
        found = functional.scaled_dot_product_attention(*(t.bfloat16() for t in (query, key, value)), dropout_p=0.25)
        found.float().sum().backward()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)
    assert query.grad is not None and bool(query.grad.isfinite().all())


@pytest.mark.parametrize("piece", [64, 700, 1 << 18])  # one head at a time, a few, all
def test_the_gradient_of_attention_is_that_of_the_formula(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """The reference writes attention out with the masks that the identity as values makes visible."""
    monkeypatch.setattr(dropout, "PIECE", piece)
    torch.manual_seed(1)
    query, key, value = (torch.randn(3, 7, 4, 5).transpose(1, 2).requires_grad_() for _ in range(3))  # as models do
    bias = torch.zeros(3, 1, 7, 7).masked_fill_(torch.arange(7) > torch.tensor([6, 4, 5])[:, None, None, None], -1e9)
    weights = (query @ key.transpose(-2, -1) * 0.3 + bias).softmax(-1)
    with Masks(0):
        visible = attend(query, key, torch.eye(7).expand(3, 4, 7, 7), bias)
    factors = torch.where(visible != 0, 4 / 3, 0.0)
    wanted = (weights * factors) @ value
    with Masks(0):
        found = attend(query, key, value, bias)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    direction = torch.randn(3, 4, 7, 5)
    for a, b in zip(
        torch.autograd.grad(found, (query, key, value), direction),
        torch.autograd.grad(wanted, (query, key, value), direction),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.3, dropout_p=0.25)


def test_threads_do_not_disturb_each_others_masks() -> None:
    found: dict[int, torch.Tensor] = {}

    def draw(key: int) -> None:
        with Masks(key):
            found[key] = torch.stack([functional.dropout(torch.ones(100), 0.5) for _ in range(50)])

    threads = [threading.Thread(target=draw, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = dict(found)
    for key in range(4):
        draw(key)
        assert torch.equal(found[key], together[key])
