"""Training the token vectors as well: the ablation that every other run forbids.

In a tied checkpoint a token's row of the embedding is also its row of the LM head. A run that
scores label words and may change that row can raise the word's logit for any text, without the
layers learning anything of the task: is it the task that is learnt, or the label's vector that is
dragged? `movement` reports how far the rows went.

What is trained: `model.embed_tokens.weight`, and in an untied checkpoint whose label words are
scored `lm_head.weight` too, since the words' vectors are there. A classifier's loss does not reach
an untied LM head, which stays frozen.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from qwen_min.command.terminal import text_table, visible
from qwen_min.errors import UserError
from qwen_min.files.run import write_atomically
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt
from qwen_min.tokenizer import Tokenizer

FILE = "embeddings.safetensors"
TOGETHER = "token_vectors"  # in an adapter's metadata: it was trained with such a file
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Fp32Embedding(nn.Embedding):
    """An embedding whose weight is fp32 and whose output is of the dtype that it replaced."""

    def __init__(self, weight: Tensor):
        # dtype: a step is about as long as bf16 numbers of the entries' size are apart, and would
        # be rounded to a whole spacing or to nothing; so would a token's summed gradient.
        super().__init__(*weight.shape, _weight=weight.detach().float().clone(), _freeze=False)
        self.dtype = weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).to(self.dtype)


def trained_by(record: dict) -> bool:
    """Whether a run, by its record, trained token vectors; older ones could not."""
    return bool(record["arguments"].get("train_embeddings"))


def token_vectors(model: Qwen, label_words: bool) -> dict[str, nn.Parameter]:
    """The matrices (V, D) that such a run trains; label_words: whether these are scored."""
    untied = not model.config.tie_word_embeddings
    names = [EMBEDDING] + [LM_HEAD] * (untied and label_words)
    return {name: model.get_parameter(name) for name in names}


def unfreeze(model: Qwen, label_words: bool) -> dict[str, nn.Parameter]:
    """Put fp32 parameters in the place of the token vectors, in place, and return them by name.

    A tied LM head follows: it reads the embedding's weight, and `Qwen.logits` casts it.
    """
    model.model.embed_tokens = Fp32Embedding(model.model.embed_tokens.weight)
    if LM_HEAD in token_vectors(model, label_words):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().float().clone())
    return token_vectors(model, label_words)


def write(path: Path, parameters: dict[str, Tensor], base_fingerprint: str) -> None:
    """Write the trained token vectors, fp32, and which base they belong to."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in parameters.items()}
    write_atomically(path, to_bytes(tensors, {"base_fingerprint": base_fingerprint}))


@torch.no_grad()
def load(path: Path, model: Qwen, label_words: bool, base_fingerprint: str) -> None:
    """Put what `write` wrote in the place of the model's token vectors, in their dtype.

    Rounded to bf16 here or, in training, at each use: the same numbers. Raises UserError for
    anything else, or where the file is of another base.
    """
    own = token_vectors(model, label_words)
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = set(file.keys()), file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in names}
        if metadata.get("base_fingerprint") != base_fingerprint:
            raise ValueError("they belong to another base")
        expected = {name: list(parameter.shape) for name, parameter in own.items()}
        found = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if found != expected or any(t.dtype != torch.float32 for t in tensors.values()):
            raise ValueError(f"found {found}, expected {expected}, in float32")
    except (OSError, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: not the token vectors that train.py wrote ({reason}); train again"
        ) from None
    for name, tensor in tensors.items():
        # A copy: the model's own may be mapped from the checkpoint's file.
        own[name].data = tensor.to(device=own[name].device, dtype=own[name].dtype).clone()


@torch.no_grad()
def movement(before: Tensor, after: Tensor, rows: Collection[int]) -> dict:
    """How far vectors went, as means over `rows`: cosine of each with where it was, lengths before
    and after, and the change's length as a share of the length before. Both (V, D)."""
    index = torch.tensor(sorted(rows))
    a, b = before[index].double().cpu(), after[index].double().cpu()
    lengths = a.norm(dim=1), b.norm(dim=1)
    cosines = (a * b).sum(dim=1) / (lengths[0] * lengths[1]).clamp_min(1e-30)
    return {
        "tokens": len(index),
        "cosine": cosines.mean().item(),
        "norm_before": lengths[0].mean().item(),
        "norm_after": lengths[1].mean().item(),
        "change": ((b - a).norm(dim=1) / lengths[0].clamp_min(1e-30)).mean().item(),
    }


def movements(
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
) -> dict[str, list[dict]]:
    """`movement` of each matrix, (V, D) by name: of every label token, of the other tokens in the
    prompts, and of all that are left."""
    labels = sorted({token for prompt in prompts for ids in prompt.labels for token in ids})
    seen = {token for prompt in prompts for token in prompt.ids} - set(labels)
    unseen = set(range(len(before[EMBEDDING]))) - seen - set(labels)
    groups = {f"label {visible(tokenizer.decode([t]))} ({t})": {t} for t in labels}
    groups |= {"others in the prompts, mean": seen, "all others, mean": unseen}
    return {
        name: [
            {"vectors": group, **movement(before[name], after[name], rows)}
            for group, rows in groups.items()
            if rows
        ]
        for name in before
    }


def format_movements(found: dict[str, list[dict]]) -> str:
    """A table for each trained matrix: which token vectors went how far."""
    heads = ["", "tokens", "cosine", "|before|", "|after|", "|change|/|before|"]
    keys = ("cosine", "norm_before", "norm_after", "change")
    parts = []
    for name, groups in found.items():
        rows = [
            [group["vectors"], str(group["tokens"]), *(f"{group[key]:.6f}" for key in keys)]
            for group in groups
        ]
        parts.append(f"{name}: how far its rows moved\n" + text_table(heads, rows))
    return "\n\n".join(parts)
