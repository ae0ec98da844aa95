"""Linear probing: compute the features of the frozen encoder once, then train any number of heads on them.

The encoder runs without dropout, unlike in a trainer with a frozen body, so one pass serves all heads and seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hubfusion.errors import EvaluationError
from hubfusion.evaluate.protocols import Head, Pooling, Protocol
from hubfusion.train import Precision
from hubfusion.train.device import INFERENCE_BUDGET, OVERHEAD, Cores, as_inputs, autocast, pick_device
from hubfusion.train.finetune import quiet, seeded
from hubfusion.train.tokens import Tokens, by_length

Features = dict[Pooling, np.ndarray]


def load_encoder(folder: Path) -> Any:
    """The bare encoder in ``folder``, float32, on the device; safetensors only, no code from the folder."""
    from transformers import AutoModel

    with quiet():
        try:
            model, report = AutoModel.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise EvaluationError(f"{folder}: not an encoder we can load: {line}") from None
    if missing := sorted(n for n in report["missing_keys"] if "pooler" not in n):
        raise EvaluationError(f"{folder}: encoder parameter {missing[0]} is missing")
    return model.to(pick_device()).eval()


def compute_features(
    encoder: Any, tokens: Tokens, wanted: Sequence[int], precision: Precision = Precision.FLOAT32
) -> Features:
    """Both poolings of the last layer, float32, each (n, hidden): mean over real tokens, and the first token.

    Only the ``wanted`` rows are computed; the others stay 0.
    """
    device = encoder.device.type

    def work(rows: list[int]) -> tuple[list[int], Features]:
        inputs = as_inputs(tokens, rows, device)
        with torch.inference_mode():
            with autocast(device, precision):
                last = encoder(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].unsqueeze(-1).float()
            means = (last * mask).sum(1) / mask.sum(1)
        return rows, {Pooling.MEAN: means.cpu().numpy(), Pooling.FIRST: last[:, 0].cpu().numpy()}

    width = int(encoder.config.hidden_size)
    found = {p: np.zeros((len(tokens), width), dtype=np.float32) for p in Pooling}
    batches = by_length(tokens.lengths, wanted, INFERENCE_BUDGET[device], OVERHEAD[device])
    with Cores(device) as cores:
        for rows, features in cores.map(work, batches):
            for pooling, values in features.items():
                found[pooling][rows] = values
    if not all(np.isfinite(f).all() for f in found.values()):
        raise EvaluationError("linear probing: the encoder's features are not finite")
    return found


def predict_by_head(protocol: Protocol, train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Train the protocol's head on ``train`` (n, d) and ``labels`` (n,); its predictions for ``test`` (m, d)."""
    if protocol.head is Head.TWO_LAYER:
        return _two_layer(protocol, train, labels, test)
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train)
    if labels.dtype.kind == "f":
        model = Ridge(alpha=1 / protocol.inverse_penalty)
    elif len(np.unique(labels)) == 1:
        return np.full(len(test), labels[0])
    else:
        model = LogisticRegression(C=protocol.inverse_penalty, max_iter=1000)
    predictions: np.ndarray = model.fit(scaler.transform(train), labels).predict(scaler.transform(test))
    return predictions


def _two_layer(protocol: Protocol, train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """RoBERTa's classification head (dropout, dense, tanh, dropout, dense), trained by the protocol's recipe."""
    training, width = protocol.training, train.shape[1]
    is_number = labels.dtype.kind == "f"
    outputs = 1 if is_number else int(labels.max()) + 1
    device = pick_device()
    with seeded(training.seed):
        head = torch.nn.Sequential(
            torch.nn.Dropout(0.1),
            torch.nn.Linear(width, width),
            torch.nn.Tanh(),
            torch.nn.Dropout(0.1),
            torch.nn.Linear(width, outputs),
        ).to(device)
        optimizer = torch.optim.AdamW(head.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
        total = training.epochs * -(-len(train) // training.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (total - step) / total)
        x, y = torch.from_numpy(train).to(device), torch.from_numpy(labels).to(device)
        order = np.random.default_rng([7, training.seed])
        for _ in range(training.epochs):
            for rows in np.array_split(order.permutation(len(train)), total // training.epochs):
                out = head(x[rows])
                lost = torch.nn.functional
                loss = lost.mse_loss(out[:, 0], y[rows]) if is_number else lost.cross_entropy(out, y[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
        with torch.inference_mode():
            out = head.eval()(torch.from_numpy(test).to(device)).float().cpu()
    found: np.ndarray = (out[:, 0] if is_number else out.argmax(dim=1)).numpy()
    return found
