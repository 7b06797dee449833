"""From logits to log-probabilities to label scores.

The score of class y for a text is the log-probability that the model gives to the label word's
tokens, one after the other, behind the prompt:

    s_y = Σ_t log p(y_t | prompt, y_<t),    log p(token) = logit(token) − log Σ_v exp logit(v)

It stands here as its definition, one full forward for each candidate, and below as the form that
runs: each prompt once, the label words behind it as a tree, the vocabulary projection only where a
token is scored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_min.fast.batching import DEFAULT_BATCH_TOKENS, common_prefix, token_budget_batches
from qwen_min.fast.layout import Cache
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt

# Rows of logits held at once: V = 151,936 in fp32 is 0.6 MB a row.
LOGIT_ROWS = 64


@torch.inference_mode()
def score_label(model: Qwen, prompt: Sequence[int], label: Sequence[int]) -> float:
    """The definition: one forward of prompt + label, then log-softmax, gather, sum."""
    ids = torch.tensor([[*prompt, *label]], device=model.lm_head_weight.device)  # (1, T)
    log_probs = model.logits(model(ids)).log_softmax(dim=-1)  # (1, T, V)
    # The state at position i predicts token i + 1, so the label's first token is predicted by the
    # prompt's last position.
    first = len(prompt) - 1
    predictions = log_probs[0, first : first + len(label)]  # (label tokens, V)
    return predictions.gather(1, torch.tensor(label, device=ids.device)[:, None]).sum().item()


@dataclass(frozen=True)
class LabelTree:
    """Label words that share beginnings, as a tree whose root is the end of the prompt.

    Only nodes that something follows are run through the model: a label's last token is predicted,
    never read. Labels of one token each have an empty tree. For labels (8, 9), (8, 10, 11), (7,)
    the tokens are 8 and, behind it, 10; the steps are ((0, 8), (1, 9)), ((0, 8), (1, 10), (2, 11))
    and ((0, 7),).
    """

    tokens: tuple[int, ...]  # of the inner nodes, parents before children
    visible: Tensor  # (nodes, nodes): row i marks node i and its ancestors
    steps: tuple[tuple[tuple[int, int], ...], ...]  # per label: (node, next token); 0 is the root


def label_tree(labels: Sequence[tuple[int, ...]]) -> LabelTree:
    """The tree of the given label words (token ids)."""
    inner = sorted({label[:t] for label in labels for t in range(1, len(label))}, key=len)
    node_of = {(): 0} | {beginning: i + 1 for i, beginning in enumerate(inner)}
    visible = [[child[: len(parent)] == parent for parent in inner] for child in inner]
    return LabelTree(
        tokens=tuple(beginning[-1] for beginning in inner),
        visible=torch.tensor(visible, dtype=torch.bool).view(len(inner), len(inner)),
        steps=tuple(
            tuple((node_of[label[:t]], label[t]) for t in range(len(label))) for label in labels
        ),
    )


@torch.inference_mode()
def score_labels(
    model: Qwen,
    prompts: Sequence[Prompt],
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: Callable[[int], object] = lambda rows: None,
) -> np.ndarray:
    """Scores of all labels for all prompts: float64 (n, C), in the order given.

    What every prompt begins with is run once. batch_tokens bounds the tokens of one forward;
    `progress` is called with the number of rows finished. Scores do not depend on batch or order
    beyond float rounding.
    """
    device = model.lm_head_weight.device
    shared = common_prefix([prompt.ids for prompt in prompts])
    prefix: Cache | None = None
    if shared:
        prefix_ids = torch.tensor(prompts[0].ids[:shared], device=device)
        _, prefix = model.model.forward_packed(prefix_ids, [shared])
    scores = np.zeros((len(prompts), len(prompts[0].labels)))
    trees = [label_tree(prompt.labels) for prompt in prompts]
    lengths = [len(p.ids) - shared + len(t.tokens) for p, t in zip(prompts, trees, strict=True)]
    for rows in token_budget_batches(lengths, batch_tokens):
        batch = [(prompts[row].ids[shared:], trees[row]) for row in rows]
        scores[rows] = _score_batch(model, batch, prefix)
        progress(len(rows))
    return scores


def _score_batch(
    model: Qwen, batch: Sequence[tuple[tuple[int, ...], LabelTree]], prefix: Cache | None
) -> np.ndarray:
    """Scores (rows, C) of prompts, what `prefix` holds of them left out, with their label trees."""
    device = model.lm_head_weight.device
    # 1. Each prompt with its tree behind it: one text, in which branches do not see each other. The
    # prompt's last token predicts the first token of each label, a node of the tree the next one.
    texts = [(*tail, *tree.tokens) for tail, tree in batch]
    ids = torch.tensor([token for text in texts for token in text], device=device)
    past = None if prefix is None else [layer * len(batch) for layer in prefix]
    visible = [_behind(len(tail), tree) for tail, tree in batch]
    predicting = [1 + len(tree.tokens) for _, tree in batch]
    h, _ = model.model.forward_packed(
        ids, [len(text) for text in texts], past, visible, last=predicting
    )  # (Σ predicting, D)

    # 2. Log-probability of each step: the token's logit less the log-sum-exp over the vocabulary.
    first = np.cumsum([0, *predicting])
    # Of each step: the row of h that predicts, the token, and the score that it adds to.
    at, tokens, owner = [], [], []
    for row, (_, tree) in enumerate(batch):
        for label, steps in enumerate(tree.steps):
            at += [int(first[row]) + node for node, _ in steps]
            tokens += [token for _, token in steps]
            owner += [row * len(tree.steps) + label] * len(steps)
    log_probs = token_log_probs(model, h, torch.tensor(at), torch.tensor(tokens))

    # 3. Their sum over each label's tokens.
    classes = len(batch[0][1].steps)
    size = len(batch) * classes
    return np.bincount(owner, weights=log_probs, minlength=size).reshape(-1, classes)


def _behind(prompt: int, tree: LabelTree) -> Tensor | None:
    """What each token of a prompt of so many tokens, and of the tree behind it, sees: (T, T)."""
    if not (nodes := len(tree.tokens)):
        return None
    seen = torch.ones(prompt + nodes, prompt + nodes, dtype=torch.bool).tril()
    seen[prompt:, prompt:] = tree.visible
    return seen


def token_log_probs(model: Qwen, h: Tensor, at: Tensor, tokens: Tensor) -> np.ndarray:
    """log p(tokens[j] | state h[at[j]]), float64 (j,). Logits are held by slices."""
    found = np.zeros(len(at))
    for start in range(0, len(h), LOGIT_ROWS):
        logits = model.logits(h[start : start + LOGIT_ROWS])  # (≤ LOGIT_ROWS, V)
        log_sum_exp = logits.logsumexp(dim=-1)
        mine = ((at >= start) & (at < start + LOGIT_ROWS)).nonzero()[:, 0]
        row = at[mine].to(h.device) - start
        log_probs = logits[row, tokens[mine].to(h.device)] - log_sum_exp[row]
        found[mine.numpy()] = log_probs.double().cpu().numpy()
    return found


def label_mass(scores: np.ndarray, labels: Sequence[Sequence[tuple[int, ...]]]) -> np.ndarray:
    """Probability (n,) that what follows each prompt begins with one of its label words.

    scores (n, C), and each row's C words as token ids. A word that begins with another one is part
    of that one's event already, and is not added again.
    """

    def counted(words: tuple[tuple[int, ...], ...]) -> list[bool]:
        return [not any(a != b and b[: len(a)] == a for a in words) for b in words]

    kinds = {words: counted(words) for words in set(map(tuple, labels))}  # mostly one
    own = np.array([kinds[tuple(words)] for words in labels])  # (n, C)
    return (np.exp(scores) * own).sum(axis=1)


def last_states(
    model: Qwen, texts: Sequence[tuple[int, ...]], last: Sequence[int], checkpointing: bool = False
) -> Tensor:
    """States of the last `last[i]` tokens of text i, with gradient: (sum(last), D).

    On a CPU, what all texts begin with is run once, beside what is their own. Under dropout they so
    share one draw there, where each running alone would have its own.
    """
    device = model.lm_head_weight.device
    # Of a single text nothing is shared. On a GPU attention is faster without the masks that
    # continuing needs.
    shared = common_prefix(texts) if len(texts) > 1 and device.type == "cpu" else 0
    # What is read must be a text's own.
    shared = min([shared, *(len(text) - n for text, n in zip(texts, last, strict=True))])
    own = [text[shared:] for text in texts]
    if shared:
        own, last = [texts[0][:shared], *own], [1, *last]
    ids = torch.tensor([token for text in own for token in text], device=device)
    h, _ = model.model.forward_packed(
        ids,
        [len(text) for text in own],
        shared_prefix=shared > 0,
        last=last,
        checkpointing=checkpointing,
    )
    return h[1:] if shared else h


def label_loss(
    model: Qwen, prompts: Sequence[Prompt], classes: Sequence[int], checkpointing: bool = False
) -> Tensor:
    """Σ over rows of −s_y for the true class y, with gradient: what lora_label_scoring minimises.

    Cross-entropy on the label's tokens alone; logits exist at their positions only, (Σ tokens, V).
    """
    labels = [prompt.labels[y] for prompt, y in zip(prompts, classes, strict=True)]
    # A label's last token is predicted, never read.
    texts = [(*p.ids, *label[:-1]) for p, label in zip(prompts, labels, strict=True)]
    h = last_states(model, texts, [len(label) for label in labels], checkpointing)
    targets = torch.tensor([token for label in labels for token in label], device=h.device)
    return F.cross_entropy(model.logits(h), targets, reduction="sum")
