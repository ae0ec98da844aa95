"""Statistics that a contributor may publish beside a finetune: diagonal Fisher information or activation products.

`fisher_diagonal` makes ``fisher.safetensors`` for the method `fisher`, `activation_products` makes
``regmean.safetensors`` for `regmean`. Both need torch and run on the device of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hubfusion.errors import RecipeError


def fisher_diagonal(model: Any, batches: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Write E_x E_{y~p(y|x)} [(∂ log p(y|x) / ∂θ)²] for every parameter, float32; returns the number of examples.

    ``model`` returns ``logits`` (n, classes) for a batch without labels. The expectation over y is exact, so a batch
    costs one backward pass an example and class; 256 examples are the paper's (arXiv 2111.09832).
    """
    import torch

    sums = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    count = 0
    model.eval()
    for batch in batches:
        logs = torch.log_softmax(model(**batch).logits.float(), dim=-1)
        for row in logs:
            count += 1
            for label in row:
                grads = torch.autograd.grad(label, list(parameters.values()), retain_graph=True, allow_unused=True)
                weight = label.detach().exp()
                for name, grad in zip(parameters, grads, strict=True):
                    if grad is not None:
                        sums[name] += weight * grad.float() ** 2
    _check(count)
    _save({n: s / count for n, s in sums.items()}, path)
    return count


def activation_products(model: Any, batches: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Write XᵀX (d_in, d_in) of the inputs of every linear layer, float32; returns the number of rows of X.

    Rows are tokens that the batch's ``attention_mask`` keeps (all, without one). The names are the layers' weights'.
    Paper: arXiv 2212.09849.
    """
    import torch

    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    products = {n: torch.zeros(m.in_features, m.in_features, dtype=torch.float64) for n, m in layers.items()}
    mask: Any = None
    rows = 0

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach()
            x = x[mask] if mask is not None and x.shape[:-1] == mask.shape else x.reshape(-1, x.shape[-1])
            products[name] += (x.T.double() @ x.double()).cpu()

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
                rows += int(mask.sum()) if mask is not None else next(iter(batch.values())).numel()
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    _check(rows)
    _save({f"{n}.weight": p.float() for n, p in products.items()}, path)
    return rows


def _check(count: int) -> None:
    if not count:
        raise RecipeError("statistics: at least one example is needed, got none")


def _save(tensors: Mapping[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, path)
