"""Dropout for a CPU with masks from a fast generator for each thread.

torch draws masks sequentially from a generator that all threads share. Inside `Masks` every dropout of any model,
including that in fused attention, takes 16 bits an element from its own generator. This is several times faster, and
the masks do not depend on other threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

LEVELS = 1 << 16  # of the random numbers: a rate is met to 1/131072
PIECE = 1 << 18  # attention weights at a time, 1 MB: what the cache of a core holds


class Masks(TorchFunctionMode):  # type: ignore[misc]
    """While entered, dropout in this thread follows the generator that starts at ``key``, a few integers.

    An element is dropped with probability p and otherwise multiplied by 1 / (1 − p), with p rounded to a multiple of
    1/65536 in both; a rate that rounds to 0 or 1 is left to torch.
    """

    def __init__(self, *key: int) -> None:
        super().__init__()
        self._bits = np.random.SFC64(key)

    def draw(self, shape: tuple[int, ...], rate: float) -> Any:
        """A tensor of ``shape``, uint8 as torch multiplies by it fastest: 0 where an element is dropped, else 1."""
        count = math.prod(shape)
        drawn = self._bits.random_raw(-(-count // 4)).view(np.int16)[:count].reshape(shape)
        return torch.from_numpy(np.less(drawn, _kept(rate) - LEVELS // 2).view(np.uint8))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch calls instead of each of its functions: ours for the two with dropout, itself for the others."""
        kwargs = kwargs or {}
        if function is dropout:
            return self._drop(*args, **kwargs)
        if function is scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        return function(*args, **kwargs)

    def _drop(self, x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if not training or inplace or not 0 < _kept(p) < LEVELS:
            return dropout(x, p, training, inplace)
        return x * self.draw(x.shape, p).to(x.dtype).mul_(LEVELS / _kept(p))

    def _attend(self, query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **settings: Any) -> Any:
        settings |= dict(zip(("dropout_p", "is_causal"), rest, strict=False))
        rate = settings.get("dropout_p", 0.0)
        is_plain = query.ndim == 4 and not settings.get("is_causal") and not settings.get("enable_gqa")
        is_learned = attn_mask is not None and attn_mask.requires_grad  # a bias that wants a gradient
        if not 0 < _kept(rate) < LEVELS or not is_plain or is_learned:
            return scaled_dot_product_attention(query, key, value, attn_mask, **settings)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape).masked_fill_(~attn_mask, torch.finfo(torch.float32).min)
        scale = settings.get("scale") or query.shape[-1] ** -0.5
        found: Any = _Attention.apply(query * scale, key, value, attn_mask, rate, self)
        return found.to(query.dtype)


def _kept(rate: float) -> int:
    """How many of the random numbers keep an element."""
    return round((1 - rate) * LEVELS)


class _Attention(torch.autograd.Function):  # type: ignore[misc]
    """softmax(Q Kᵀ + bias) with dropout, times V, in float32; (batch, heads, length, width) each.

    A few heads at a time, so that their weights stay in the cache from one operation to the next: torch's own way
    with dropout writes them all to memory several times, 12 MB each for four texts of 250 tokens and 12 heads.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)  # type: ignore[untyped-decorator]
    def forward(context: Any, query: Any, key: Any, value: Any, bias: Any, rate: float, masks: Masks) -> Any:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        weights = query.new_empty(*query.shape[:3], key.shape[2])
        out, kept = query.new_empty(*query.shape[:3], value.shape[3]), []
        bias = None if bias is None else bias.expand(weights.shape)
        for at in _pieces(weights.shape):
            q, k, v, p, o = (t[at].flatten(0, 1) for t in (query, key, value, weights, out))
            scores = q @ k.transpose(1, 2)
            if bias is not None:
                scores.view(weights[at].shape).add_(bias[at])
            torch.softmax(scores, dim=-1, out=p)
            kept.append(masks.draw(p.shape, rate))
            torch.bmm(torch.mul(p, kept[-1], out=scores), v, out=o)
        context.save_for_backward(query, key, value, weights, out.mul_(LEVELS / _kept(rate)))
        context.kept, context.rate = kept, rate
        return out

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(context: Any, gradient: Any) -> Any:
        query, key, value, weights, out = context.saved_tensors
        gradient = gradient.float()
        inner = (gradient * out).sum(-1, keepdim=True)  # = Σ_j P_ij ∂L/∂P_ij, as in FlashAttention (2205.14135)
        gradient = (gradient * (LEVELS / _kept(context.rate))).contiguous()
        found = [torch.empty_like(t) for t in (query, key, value)]
        for at, kept in zip(_pieces(weights.shape), context.kept, strict=True):
            q, k, v, p, g, n = (t[at].flatten(0, 1) for t in (query, key, value, weights, gradient, inner))
            to_query, to_key, to_value = (t[at].flatten(0, 1) for t in found)
            torch.bmm((p * kept).transpose(1, 2), g, out=to_value)
            scores = (g @ v.transpose(1, 2)).mul_(kept).sub_(n).mul_(p)
            torch.bmm(scores, k, out=to_query)
            torch.bmm(scores.transpose(1, 2), q, out=to_key)
        return *found, None, None, None


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Cut (batch, heads, length, length) into pieces of about `PIECE`: whole examples, or heads of one example."""
    batch, heads, length, width = shape
    most = max(1, PIECE // (length * width))
    for example in range(0, batch, step := max(1, most // heads)):
        for head in range(0, heads, min(most, heads)):
            yield slice(example, example + step), slice(head, head + min(most, heads))
