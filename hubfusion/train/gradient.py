"""The gradient of one optimizer batch: in slices without padding, on all cores.

The examples are cut into slices of near-equal length. Each slice's loss is divided by the size of the whole batch, so
the slices' gradients add up to what a plain trainer takes of the padded batch. Slices, dropout masks and the order of
the sum depend on the seed and the lengths alone: one core and eight find the same gradient to the last bit.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from queue import SimpleQueue
from typing import Any

import torch

from hubfusion.train.device import OVERHEAD, TRAINING_BUDGET, Cores, as_inputs, autocast
from hubfusion.train.dropout import Masks
from hubfusion.train.recipe import Training
from hubfusion.train.tokens import Tokens, by_length


class Gradient:
    """Gradients of ``model`` on batches of ``tokens`` and ``target`` (n,): integers are classes, floats are numbers.

    A core has a copy of the modules, whose parameters are the same memory and whose gradients are its own.
    """

    def __init__(self, model: Any, tokens: Tokens, target: Any, training: Training, cores: Cores) -> None:
        self._tokens, self._lengths, self._target, self._training = tokens, tokens.lengths, target, training
        self._model, self.cores, self._device = model, cores, model.device.type
        self.examples = len(tokens)
        self._free: SimpleQueue[Any] = SimpleQueue()
        for _ in range(cores.count):
            self._free.put(_share(model))

    def add(self, batch: list[int], step: int) -> Any:
        """Add the gradient of the batch's mean loss to the model's; the loss, a tensor ()."""
        slices = list(by_length(self._lengths, batch, TRAINING_BUDGET[self._device], OVERHEAD[self._device]))
        jobs = [(rows, len(batch), (self._training.seed, step, number)) for number, rows in enumerate(slices)]
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        total = torch.zeros((), device=self._device)
        for loss, gradients in self.cores.map(lambda job: self._work(*job), jobs):
            total += loss
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return total

    def _work(self, rows: list[int], size: int, key: tuple[int, ...]) -> tuple[Any, list[Any]]:
        """Loss and gradients of one slice of a batch of ``size``."""
        model = self._free.get()
        try:
            model.train()
            with Masks(*key) if self._device == "cpu" else nullcontext():
                loss = self._loss(model, rows) / size
            loss.backward()
            return loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]
        finally:
            model.zero_grad(set_to_none=True)
            self._free.put(model)

    def _loss(self, model: Any, rows: list[int]) -> Any:
        with autocast(self._device, self._training.precision):
            logits = model(**as_inputs(self._tokens, rows, self._device)).logits.float()
        wanted = self._target[rows].to(self._device)
        if wanted.is_floating_point():
            return torch.nn.functional.mse_loss(logits[:, 0], wanted.float(), reduction="sum")
        return torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")


def _share(model: Any) -> Any:
    """A copy of the modules whose parameters are the same memory and have gradients of their own."""
    return copy.deepcopy(model, {id(p): p.detach().requires_grad_(p.requires_grad) for p in model.parameters()})
