"""Hidden states pooled to one vector a text, and the linear head on top of them.

A linear probe asks how much a frozen model's states already tell about the classes: the states are
computed once, and a logistic regression on them is solved to its optimum.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from qwen_min.errors import UserError
from qwen_min.fast.batching import token_budget_batches
from qwen_min.files.run import write_atomically
from qwen_min.metrics import log_loss
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt
from qwen_min.scoring import last_states, score_labels

POOLINGS = ("last", "mean")
# Strengths of the L2 penalty that are tried, strongest first: each solution starts the next.
L2_GRID = tuple(10.0**e for e in (1, 0.5, 0, -0.5, -1, -1.5, -2, -2.5, -3))
CACHE_ROWS = 256  # rows in one file of cached features: what a killed run can lose


@dataclass(frozen=True)
class LinearHead:
    """Class scores W h + b of a pooled hidden state h."""

    weight: Tensor  # (C, D), fp32
    bias: Tensor | None  # (C,)
    layer: int  # whose output h is: 0 the embedding, L the last, after the final norm
    pooling: str  # "last" token or "mean" over the prompt's tokens

    def scores(self, features: Tensor) -> np.ndarray:
        """features (n, D) → float64 (n, C)."""
        bias = None if self.bias is None else self.bias.cpu()
        return F.linear(features.cpu(), self.weight.cpu(), bias).double().numpy()


@torch.inference_mode()
def pooled_state(model: Qwen, prompt: Sequence[int], pooling: str = "last") -> Tensor:
    """The definition: one forward; the final state of the last token, or the mean of all (D,)."""
    h = model(torch.tensor([prompt], device=model.lm_head_weight.device))[0].float()  # (T, D)
    return h[-1] if pooling == "last" else h.mean(dim=0)


@torch.inference_mode()
def pooled_features(
    model: Qwen,
    prompts: Sequence[Prompt],
    pooling: str,
    all_layers: bool,
    batch_tokens: int,
    progress: Callable[[int], object] = lambda rows: None,
) -> Tensor:
    """`pooled_state` of many prompts: fp32 (n, S, D) on the CPU.

    S = 1: after the last layer alone. With all_layers S = L + 1: the embedding and every layer,
    numbered as in LinearHead, all from one pass.
    """
    device = model.lm_head_weight.device
    layers = model.config.num_hidden_layers + 1 if all_layers else 1
    features = torch.zeros(len(prompts), layers, model.config.hidden_size)
    lengths = [len(prompt.ids) for prompt in prompts]
    for rows in token_budget_batches(lengths, batch_tokens):
        sizes = [lengths[row] for row in rows]
        ids = torch.tensor([token for row in rows for token in prompts[row].ids], device=device)
        streams: list[Tensor] | None = [] if all_layers else None
        last = [1] * len(rows) if pooling == "last" else None
        h, _ = model.model.forward_packed(ids, sizes, last=last, streams=streams)
        ends = torch.tensor(sizes, device=device).cumsum(0) - 1
        pooled = [_pool(stream, sizes, ends, pooling) for stream in streams or []]
        pooled.append(h.float() if pooling == "last" else _pool(h, sizes, ends, pooling))
        features[rows] = torch.stack(pooled, dim=1).cpu()
        progress(len(rows))
    return features


def _pool(x: Tensor, sizes: list[int], ends: Tensor, pooling: str) -> Tensor:
    """States of texts laid end to end (N, D) → one vector a text (n, D), fp32."""
    if pooling == "last":
        return x[ends].float()
    return torch.stack([text.float().mean(dim=0) for text in x.split(sizes)])


def score_rows(
    model: Qwen,
    prompts: Sequence[Prompt],
    head: LinearHead | None,
    batch_tokens: int,
    progress: Callable[[int], object] = lambda rows: None,
) -> np.ndarray:
    """Class scores (n, C): of the label words, or of the head where there is one."""
    if head is None:
        return score_labels(model, prompts, batch_tokens, progress)
    every = head.layer != model.config.num_hidden_layers
    features = pooled_features(model, prompts, head.pooling, every, batch_tokens, progress)
    return head.scores(features[:, head.layer if every else 0])


def cached_features(
    directory: Path,
    weights: str,
    model: Qwen,
    prompts: Sequence[Prompt],
    pooling: str,
    all_layers: bool,
    batch_tokens: int,
    progress: Callable[[int], object] = lambda rows: None,
) -> Tensor:
    """`pooled_features`, kept in `directory`: what is there under the right key is not run again.

    weights: the fingerprint of base and adapter. The key also covers dtype, pooling, layers and the
    prompts' ids, and with these the tokenizer, the template, the cut and the texts. Rows are kept
    by files of CACHE_ROWS, so that a killed run loses a file at most. Raises UserError where
    nothing can be kept.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{directory}: {error.strerror}; name a directory for features by --feature-cache"
        ) from None
    setting = f"{weights} {model.lm_head_weight.dtype} {pooling} {all_layers}"
    parts = []
    for start in range(0, len(prompts), CACHE_ROWS):
        chunk = prompts[start : start + CACHE_ROWS]
        key = hashlib.sha256(f"{setting} {[prompt.ids for prompt in chunk]}".encode()).hexdigest()
        path = directory / f"{key}.safetensors"
        try:
            part = load(path.read_bytes())["features"]
            progress(len(chunk))
        except (OSError, SafetensorError, KeyError):  # absent, or damaged
            part = pooled_features(model, chunk, pooling, all_layers, batch_tokens, progress)
            if not part.isfinite().all():
                raise UserError(
                    "a hidden state is not finite; fetch the weights again, or try --dtype float32"
                ) from None
            write_atomically(path, save({"features": part}))
        parts.append(part)
    return torch.cat(parts)


def head_loss(
    model: Qwen,
    weight: Tensor,
    prompts: Sequence[Prompt],
    classes: Sequence[int],
    checkpointing: bool = False,
) -> Tensor:
    """Σ over rows of the cross-entropy of W h, with gradient: what lora_head minimises.

    h is the last token's final state, weight (C, D) in fp32.
    """
    h = last_states(model, [p.ids for p in prompts], [1] * len(prompts), checkpointing)  # (rows, D)
    targets = torch.tensor(classes, device=weight.device)
    return F.cross_entropy(F.linear(h.float(), weight), targets, reduction="sum")


def save_head(path: Path, head: LinearHead) -> None:
    """Write a head; layer and pooling stand in the file's metadata, as JSON under one key.

    Several keys would be written in an order that changes: equal heads, unequal files.
    """
    tensors = {"weight": head.weight.cpu().contiguous()}
    if head.bias is not None:
        tensors["bias"] = head.bias.cpu().contiguous()
    metadata = json.dumps({"layer": head.layer, "pooling": head.pooling})
    write_atomically(path, save(tensors, {"head": metadata}))


def load_head(path: Path) -> LinearHead:
    """Read what `save_head` wrote. Raises UserError for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in names}
        weight, bias = tensors.pop("weight"), tensors.pop("bias", None)
        head = LinearHead(weight, bias, **json.loads(metadata["head"]))
        whole = (
            weight.ndim == 2
            and weight.dtype == torch.float32
            and (bias is None or bias.shape == weight.shape[:1])
        )
        if tensors or not whole or type(head.layer) is not int or head.pooling not in POOLINGS:
            raise ValueError(f"tensors {sorted(names)}, {metadata}")
        return head
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a head that train.py wrote ({reason}); train again") from None


def solve_logistic(
    x: Tensor, y: Tensor, num_classes: int, l2: float, start: Tensor | None = None
) -> Tensor:
    """Minimise mean cross-entropy + l2/2 · |W|² by L-BFGS, in float64, to convergence.

    x (n, D), y (n,) → (C, D + 1): W, and the bias, which is not penalised, as its last column.
    """
    x, parameters = x.double(), torch.zeros(num_classes, x.shape[1] + 1, dtype=torch.float64)
    if start is not None:
        parameters.copy_(start)
    parameters.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=1000,
        tolerance_grad=1e-7,
        tolerance_change=0,  # the gradient alone says when it is done
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weight, bias = parameters[:, :-1], parameters[:, -1]
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + l2 / 2 * weight.square().sum()
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
) -> tuple[tuple[Tensor, Tensor], dict]:
    """A probe on one layer's features, its penalty chosen by log-loss on the held-out part.

    train (n, D), held_out (m, D) → weight (C, D) and bias (C,), fp32, and what was found: l2,
    held_out_log_loss, held_out_accuracy. Features are standardised by the training part's mean and
    deviation, for the penalty to weigh all alike; the result is folded back into W and b, so that
    the head applies to the states as they are.
    """
    mean, deviation = train.double().mean(dim=0), train.double().std(dim=0)
    deviation = deviation.clamp_min(1e-6)  # a constant feature stays one, at zero
    x, z = (train.double() - mean) / deviation, (held_out.double() - mean) / deviation
    y = torch.from_numpy(train_labels)
    best, solution = None, None
    for l2 in L2_GRID:
        solution = solve_logistic(x, y, num_classes, l2, start=solution)
        scores = F.linear(z, solution[:, :-1], solution[:, -1]).numpy()
        found = {
            "l2": l2,
            "held_out_log_loss": log_loss(held_out_labels, scores),
            "held_out_accuracy": float((scores.argmax(axis=1) == held_out_labels).mean()),
        }
        if best is None or found["held_out_log_loss"] < best[1]["held_out_log_loss"]:
            best = solution, found
    solution, found = best
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
) -> tuple[dict[int, dict], LinearHead]:
    """`fit_head` on each of `layers`; what each found, and the head that held-out log-loss prefers.

    features (n, S, D) as `pooled_features` gives them; training and held_out are rows of it.
    """
    found: dict[int, dict] = {}
    heads: dict[int, LinearHead] = {}
    for layer in layers:
        x = features[:, layer if features.shape[1] > 1 else 0]
        (weight, bias), found[layer] = fit_head(
            x[training], labels[training], x[held_out], labels[held_out], num_classes
        )
        heads[layer] = LinearHead(weight, bias, layer, pooling)
    return found, heads[min(found, key=lambda layer: found[layer]["held_out_log_loss"])]


def format_layers(found: dict[int, dict], chosen: int) -> str:
    """A line for each layer: its accuracy and log-loss on the held-out part, its penalty."""
    return "\n".join(
        ["layer   held-out accuracy   log-loss         L2"]
        + [
            f"{layer:5d}   {row['held_out_accuracy']:17.4f}   {row['held_out_log_loss']:8.4f}   "
            f"{row['l2']:8.4f}{'   chosen' if layer == chosen else ''}"
            for layer, row in found.items()
        ]
    )


def candidate_layers(argument: str, last: int) -> list[int]:
    """ "last" → [L]; "best" → every layer from the embedding, 0, to L; a number → that one."""
    if argument in ("last", "best"):
        return [last] if argument == "last" else list(range(last + 1))
    if not argument.isdecimal() or int(argument) > last:
        raise UserError(f"--layer {argument!r}: expected last, best or a number from 0 to {last}")
    return [int(argument)]
