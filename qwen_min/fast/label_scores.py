"""Label scores and losses of many prompts at once; scoring.py has their definitions.

Each prompt is computed once, with all its label words after it as a tree; what every prompt begins
with is computed once for all; and only the states that predict a label token meet the vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_min.fast import ranks
from qwen_min.fast.batching import DEFAULT_BATCH_TOKENS, common_prefix, token_budget_batches
from qwen_min.fast.layout import Past, Text, pack
from qwen_min.fast.memory import store_by_columns
from qwen_min.fast.packed import forward_packed
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt

# Rows of logits held at once: with V = 151,936 a row is 0.6 MB in fp32.
LOGIT_ROWS = 64
ROW_MULTIPLE = 64  # see `filler`
ALL = slice(None)  # rows
Texts = Sequence[tuple[int, ...]]  # token ids


@dataclass(frozen=True)
class LabelTree:
    """Label words as a tree of tokens, shared beginnings once. Node 0, the root: the prompt's end.

    Only tokens that something follows are inputs: a label's last token is a target only. Labels of
    one token each have an empty tree. For labels (8, 9), (8, 10, 11), (7,) the inputs are 8 and,
    after it, 10; the steps are ((0, 8), (1, 9)), ((0, 8), (1, 10), (2, 11)) and ((0, 7),).
    """

    tokens: tuple[int, ...]  # node i > 0 is tokens[i - 1]; parents before children
    parents: tuple[int, ...]  # of node i > 0, the node that it follows
    steps: tuple[tuple[tuple[int, int], ...], ...]  # per label: (node that predicts, next token)


@lru_cache(maxsize=128)  # most prompts have the same label tokens
def label_tree(labels: tuple[tuple[int, ...], ...]) -> LabelTree:
    """The tree of the given label words (token ids)."""
    inner = sorted({label[:t] for label in labels for t in range(1, len(label))}, key=len)
    node_of = {(): 0} | {beginning: i + 1 for i, beginning in enumerate(inner)}
    parents = tuple(node_of[beginning[:-1]] for beginning in inner)
    steps = [tuple((node_of[word[:t]], word[t]) for t in range(len(word))) for word in labels]
    return LabelTree(tuple(beginning[-1] for beginning in inner), parents, tuple(steps))


@torch.inference_mode()
def score_labels(
    model: Qwen,
    prompts: Sequence[Prompt],
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: Callable[[int], object] = lambda tokens: None,
) -> np.ndarray:
    """`score_label` of all labels for all prompts: float64 (n, C), in the order given.

    batch_tokens limits the tokens of one forward; `progress` is called with the prompts' tokens
    that are finished. Batch size and order change scores only by float rounding.
    """
    shared = common_prefix([prompt.ids for prompt in prompts])
    prefix: Past | None = None
    if shared:
        first = Text(prompts[0].ids[:shared], queries=1)
        _, (prefix,) = forward_packed(model, pack(model, [first], keep=True))
    scores = np.zeros((len(prompts), len(prompts[0].labels)))
    lengths = [len(p.ids) - shared + len(label_tree(p.labels).tokens) for p in prompts]
    store_by_columns(model, sum(lengths))
    for rows, together in ranks.own_batches(token_budget_batches(lengths, batch_tokens), prompts):
        batch = [(prompts[row].ids[shared:], label_tree(prompts[row].labels)) for row in rows]
        scores[rows] = score_batch(model, batch, prefix)
        progress(sum(len(prompts[row].ids) for row in together))
    return ranks.gathered(torch.from_numpy(scores)).numpy()


def filler(model: Qwen, texts: Sequence[Text]) -> list[Text]:
    """A text to add to `texts`, and to ignore, that makes their tokens a multiple of 64; or none.

    oneDNN, which multiplies bf16 matrices on a CPU, compiles code for each number of rows and keeps
    it: some milliseconds and up to 1 MB each. So there should be few such numbers.
    """
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return []
    more = -sum(len(text.ids) for text in texts) % ROW_MULTIPLE
    return [Text((0,) * more, queries=1)] if more else []


def score_batch(
    model: Qwen, batch: Sequence[tuple[tuple[int, ...], LabelTree]], prefix: Past | None
) -> np.ndarray:
    """Scores (rows, C) of one batch: per row, the prompt's ids after `prefix`, and its tree."""
    # 1. Prompt and tree are one text, whose branches do not see each other. The prompt's last token
    # predicts the first token of each label, a node of the tree the next one.
    texts = []
    for ids, tree in batch:
        parents = [len(ids) - 1 + node for node in tree.parents]
        texts.append(Text((*ids, *tree.tokens), parents, queries=1 + len(parents)))
    texts += filler(model, texts)
    past = None if prefix is None else [prefix] * len(texts)
    h, _ = forward_packed(model, pack(model, texts, past))  # (Σ queries, D)

    # 2. Of each step: the row of h that predicts it, its token, and the score it is added to.
    index, tokens, owner, first = [], [], [], 0
    for row, (_, tree) in enumerate(batch):
        for label, steps in enumerate(tree.steps):
            index += [first + node for node, _ in steps]
            tokens += [token for _, token in steps]
            owner += [row * len(tree.steps) + label] * len(steps)
        first += 1 + len(tree.tokens)
    log_probs = token_log_probs(model, h, torch.tensor(index), torch.tensor(tokens))

    # 3. Their sum over each label's tokens.
    classes = len(batch[0][1].steps)
    size = len(batch) * classes
    return np.bincount(owner, weights=log_probs, minlength=size).reshape(-1, classes)


def token_log_probs(model: Qwen, h: Tensor, index: Tensor, tokens: Tensor) -> np.ndarray:
    """log p(tokens[j] | state h[index[j]]), float64 (j,); LOGIT_ROWS rows of logits at a time."""
    found = np.zeros(len(index))
    for start in range(0, len(h), LOGIT_ROWS):
        logits = model.logits(h[start : start + LOGIT_ROWS])  # (≤ LOGIT_ROWS, V)
        log_sum_exp = logits.logsumexp(dim=-1)
        here = ((index >= start) & (index < start + LOGIT_ROWS)).nonzero()[:, 0]
        row = index[here].to(h.device) - start
        log_probs = logits[row, tokens[here].to(h.device)] - log_sum_exp[row]
        found[here.numpy()] = log_probs.cpu().double().numpy()
    return found


def last_states(
    model: Qwen, texts: Texts, counts: Sequence[int], checkpointing: bool, own: slice = ALL
) -> Tensor:
    """States of the last counts[i] tokens of text i, with gradient: (Σ counts, D).

    On a CPU the common prefix is computed once. Under dropout its texts share one draw there.
    own: the texts to compute. All texts decide the common prefix and the dropout masks.
    """
    # Nothing to share in a single text. On a GPU attention is faster without the explicit masks
    # that continuing a prefix needs.
    shared = common_prefix(texts) if len(texts) > 1 and model.device.type == "cpu" else 0
    # The tokens whose states are asked for must not be in the prefix.
    shared = min([shared, *(len(text) - n for text, n in zip(texts, counts, strict=True))])
    packed = [Text(text[shared:], queries=n) for text, n in zip(texts, counts, strict=True)]
    computed = list(range(len(packed)))[own]
    if shared:
        packed = [Text(texts[0][:shared], queries=1), *packed]
        computed = [0, *(i + 1 for i in computed)]
    ranks.share_dropout(packed, computed)
    batch = pack(model, [packed[i] for i in computed], first_is_prefix=shared > 0)
    h, _ = forward_packed(model, batch, checkpointing=checkpointing)
    return h[1:] if shared else h


def label_losses(
    model: Qwen,
    prompts: Sequence[Prompt],
    classes: Sequence[int],
    checkpointing: bool = False,
    class_weights: Sequence[float] | None = None,
    own: slice = ALL,
) -> Tensor:
    """Sum over the rows `own` of `label_loss` for the true class, with gradient.

    class_weights (C,): each row's loss is multiplied by its class's weight.
    """
    labels = [prompt.labels[y] for prompt, y in zip(prompts, classes, strict=True)]
    # A label's last token is a target only, not an input.
    texts = [(*p.ids, *label[:-1]) for p, label in zip(prompts, labels, strict=True)]
    h = last_states(model, texts, [len(label) for label in labels], checkpointing, own)
    labels, classes = labels[own], classes[own]
    targets = torch.tensor([token for label in labels for token in label], device=h.device)
    losses = F.cross_entropy(model.logits(h), targets, reduction="none")  # (tokens,)
    if class_weights is None:
        return losses.sum()
    by_token = [class_weights[y] for y, label in zip(classes, labels, strict=True) for _ in label]
    return losses @ losses.new_tensor(by_token)
