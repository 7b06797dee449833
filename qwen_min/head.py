"""Hidden states pooled to one vector per text, and the linear head on top of them.

A linear probe asks how much a frozen model's states already tell about the classes: the states are
computed once, and a logistic regression is fitted on them until its gradient is nearly zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_min.metrics import log_loss
from qwen_min.model import Qwen

POOLINGS = ("last", "mean")
# Strengths of the L2 penalty that are tried, strongest first: each solution starts the next.
L2_GRID = tuple(10.0**e for e in (1, 0.5, 0, -0.5, -1, -1.5, -2, -2.5, -3))


@dataclass(frozen=True)
class LinearHead:
    """Class scores W h + b of a pooled hidden state h."""

    weight: Tensor  # W (C, D), fp32
    bias: Tensor | None  # b (C,)
    layer: int  # whose output h is: 0 the embedding, L the last layer, after the final norm
    pooling: str  # "last" token or "mean" over the prompt's tokens

    def scores(self, features: Tensor) -> np.ndarray:
        """Pooled states (n, D) → float64 (n, C)."""
        bias = None if self.bias is None else self.bias.cpu()
        return F.linear(features.cpu(), self.weight.cpu(), bias).double().numpy()


@torch.inference_mode()
def pooled_state(
    model: Qwen, prompt: Sequence[int], pooling: str = "last", layer: int | None = None
) -> Tensor:
    """One forward of the prompt; the last token's state, or the mean over all tokens: (D,), fp32.

    layer: whose output, numbered as in LinearHead; None: the last one's.
    """
    ids = torch.tensor([prompt], device=model.device)  # (1, T)
    last = model.config.num_hidden_layers
    h = model(ids) if layer in (None, last) else model.model.residual_stream(ids, layer)
    h = h[0].float()  # (T, D)
    return h[-1] if pooling == "last" else h.mean(dim=0)


def head_loss(model: Qwen, weight: Tensor, prompt: Sequence[int], label: int) -> Tensor:
    """Cross-entropy of softmax(W h) with the true class, with gradient: what lora_head minimises.

    h is the last token's state after the final norm, weight (C, D) in fp32.
    """
    h = model(torch.tensor([prompt], device=model.device))[0, -1]  # (D,)
    return F.cross_entropy(weight @ h.float(), torch.tensor(label, device=weight.device))


def solve_logistic(
    x: Tensor,
    y: Tensor,
    num_classes: int,
    l2: float,
    start: Tensor | None = None,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Minimise mean cross-entropy + l2/2 · |W|² by L-BFGS in float64, until the largest gradient is
    at most 1e-7, in at most 1,000 iterations.

    x (n, D), y (n,) → (C, D + 1): W, and as last column the bias, which is not penalised.
    class_weights w (C,), float64: the mean is then Σ w_y · loss / Σ w_y over the rows, so
    scikit-learn's LogisticRegression(C=1 / (l2 · Σ w_y), class_weight=w) has the same minimum.
    """
    x, zeros = x.double(), torch.zeros(num_classes, x.shape[1] + 1, dtype=torch.float64)
    parameters = (zeros if start is None else start.double().clone()).requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=1000,
        tolerance_grad=1e-7,
        tolerance_change=0,  # a small step does not mean that the optimum is near
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weight, bias = parameters[:, :-1], parameters[:, -1]
        loss = F.cross_entropy(F.linear(x, weight, bias), y, class_weights)
        loss = loss + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return parameters.detach()


def fit_head(
    train: Tensor,
    train_labels: np.ndarray,
    held_out: Tensor,
    held_out_labels: np.ndarray,
    num_classes: int,
    class_weights: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], dict]:
    """A probe on one layer's features; log-loss on the held-out part chooses its penalty.

    train (n, D), held_out (m, D) → weight (C, D) and bias (C,), fp32, and what was found: l2,
    held_out_log_loss, held_out_accuracy. Features are standardised with the training part's mean
    and standard deviation, so that the penalty treats all alike. The result is folded back into W
    and b: the head applies to the states as they are. class_weights (C,), float64: in both losses.
    """
    mean, deviation = train.double().mean(dim=0), train.double().std(dim=0)
    deviation = deviation.clamp_min(1e-6)  # a constant feature becomes 0
    x, z = (train.double() - mean) / deviation, (held_out.double() - mean) / deviation
    y = torch.from_numpy(train_labels)
    tried, solution = [], None
    for l2 in L2_GRID:
        solution = solve_logistic(x, y, num_classes, l2, solution, class_weights)
        scores = F.linear(z, solution[:, :-1], solution[:, -1]).numpy()
        accuracy = float((scores.argmax(axis=1) == held_out_labels).mean())
        loss = log_loss(held_out_labels, scores, class_weights)
        found = {"l2": l2, "held_out_log_loss": loss, "held_out_accuracy": accuracy}
        tried.append((found, solution))
    found, solution = min(tried, key=lambda pair: pair[0]["held_out_log_loss"])
    weight = solution[:, :-1] / deviation
    bias = solution[:, -1] - weight @ mean
    return (weight.float(), bias.float()), found


def fit_layers(
    features: Tensor,
    layers: Sequence[int],
    labels: np.ndarray,
    training: Sequence[int],
    held_out: Sequence[int],
    num_classes: int,
    pooling: str,
    class_weights: Sequence[float] | None = None,
) -> tuple[dict[int, dict], LinearHead]:
    """`fit_head` on each of `layers`: what each found, and the head of least held-out log-loss.

    features (n, L + 1, D), of all layers, or (n, 1, D), of one; labels (n,). training and held_out
    are rows of both. class_weights (C,) as in `fit_head`.
    """
    found, heads = {}, {}
    w = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)
    for layer in layers:
        x = features[:, layer if features.shape[1] > 1 else 0]
        (weight, bias), found[layer] = fit_head(
            x[training], labels[training], x[held_out], labels[held_out], num_classes, w
        )
        heads[layer] = LinearHead(weight, bias, layer, pooling)
    return found, heads[min(found, key=lambda layer: found[layer]["held_out_log_loss"])]
