"""Training of the token vectors (--train-embeddings), which stay frozen in every other run.

In a tied checkpoint a token's row of the embedding is also its row of the LM head. If a run scores
label words and trains these rows, it can raise a word's logit for every text, without learning the
task in the layers. `movement` measures how far the rows moved, to see which of the two happened.

Trained is `model.embed_tokens.weight`, and also `lm_head.weight` if the checkpoint is untied and
label words are scored: their vectors are there. A classifier's loss has no gradient for an untied
LM head, which stays frozen.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from qwen_min.command.terminal import text_table, visible
from qwen_min.errors import UserError
from qwen_min.files.disk import read_safetensors, write_atomically
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt
from qwen_min.tokenizer import Tokenizer

Matrices = dict[str, Tensor]  # (V, D), by name
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Fp32Embedding(nn.Embedding):
    """An embedding with an fp32 weight. Its output has the dtype of the weight it replaces."""

    def __init__(self, weight: Tensor):
        # dtype: a step is about as large as the spacing of bf16 numbers near the weights, so in
        # bf16 it would be rounded to 0 or to a whole spacing. The same holds for summed gradients.
        super().__init__(*weight.shape, _weight=weight.detach().float().clone(), _freeze=False)
        self.dtype = weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).to(self.dtype)


def token_vectors(model: Qwen, scores_words: bool) -> dict[str, nn.Parameter]:
    """The matrices (V, D) to train, by name. scores_words: whether label words are scored."""
    lm_head = scores_words and not model.config.tie_word_embeddings
    names = [EMBEDDING, LM_HEAD] if lm_head else [EMBEDDING]
    return {name: model.get_parameter(name) for name in names}


def unfreeze(model: Qwen, scores_words: bool) -> dict[str, nn.Parameter]:
    """Replace the model's token vectors by trainable fp32 parameters; returns these by name.

    A tied LM head needs no change: it reads the embedding's weight, and `Qwen.logits` casts it.
    """
    model.model.embed_tokens = Fp32Embedding(model.model.embed_tokens.weight)
    if LM_HEAD in token_vectors(model, scores_words):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().float().clone())
    return token_vectors(model, scores_words)


def write(path: Path, parameters: Matrices, base_fingerprint: str) -> None:
    """Write the trained token vectors, fp32, and the fingerprint of their base."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
    write_atomically(path, to_bytes(tensors, {"base_fingerprint": base_fingerprint}))


@torch.no_grad()
def load(path: Path, model: Qwen, scores_words: bool, base_fingerprint: str) -> None:
    """Replace the model's token vectors by those in a file of `write`, cast to their dtype.

    In training they are cast at each use, which gives the same numbers. Raises UserError if the
    file is damaged, or if its names, shapes, dtype or base differ from the expected ones.
    """
    own = token_vectors(model, scores_words)
    kind = "the token vectors that train.py wrote for this base"
    tensors, metadata = read_safetensors(path, kind, "train again")
    found = {name: (list(t.shape), t.dtype) for name, t in tensors.items()}
    found["base"] = metadata.get("base_fingerprint")
    expected = {name: (list(p.shape), torch.float32) for name, p in own.items()}
    expected["base"] = base_fingerprint
    if found != expected:
        raise UserError(f"{path}: not {kind} (found {found}, expected {expected}); train again")
    for name, tensor in tensors.items():
        # A new tensor, since the model's own may be mapped from the checkpoint's file.
        own[name].data = tensor.to(device=own[name].device, dtype=own[name].dtype).clone()


@torch.no_grad()
def movement(before: Tensor, after: Tensor, rows: Collection[int]) -> dict:
    """How far `rows` of a matrix (V, D) moved, as means over them: the cosine between a row before
    and after, both lengths, and the length of the change divided by the length before."""
    index = torch.tensor(sorted(rows))
    a, b = before[index].cpu().double(), after[index].cpu().double()
    return {
        "tokens": len(index),
        "cosine": torch.cosine_similarity(a, b, dim=1).mean().item(),
        "norm_before": a.norm(dim=1).mean().item(),
        "norm_after": b.norm(dim=1).mean().item(),
        "change": ((b - a).norm(dim=1) / a.norm(dim=1).clamp_min(1e-30)).mean().item(),
    }


def movements(
    before: Matrices, after: Matrices, tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> dict[str, list[dict]]:
    """For each matrix (V, D), by name, the `movement` of three kinds of rows: every label token,
    the other tokens in the prompts together, and all other tokens together."""
    labels = {token for prompt in prompts for ids in prompt.labels for token in ids}
    in_prompts = {token for prompt in prompts for token in prompt.ids} - labels
    others = set(range(len(before[EMBEDDING]))) - in_prompts - labels
    groups = {f"label {visible(tokenizer.decode([t]))} ({t})": {t} for t in sorted(labels)}
    groups |= {"others in the prompts, mean": in_prompts, "all others, mean": others}
    groups = {group: rows for group, rows in groups.items() if rows}
    return {
        name: [{"vectors": g, **movement(matrix, after[name], rows)} for g, rows in groups.items()]
        for name, matrix in before.items()
    }


def format_movements(found: dict[str, list[dict]]) -> str:
    """A table for each trained matrix: how far its rows moved."""
    heads = ["", "tokens", "cosine", "|before|", "|after|", "|change|/|before|"]
    keys = ("cosine", "norm_before", "norm_after", "change")
    parts = []
    for name, groups in found.items():
        rows = [[g["vectors"], str(g["tokens"]), *(f"{g[k]:.6f}" for k in keys)] for g in groups]
        parts.append(f"{name}: how far its rows moved\n" + text_table(heads, rows))
    return "\n\n".join(parts)
