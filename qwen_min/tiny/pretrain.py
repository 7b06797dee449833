"""Make the checkpoint in this directory: a small Qwen2, trained on public reviews and verdicts.

    python tests/real/make_reviews.py                        # fetches the reviews, prints DIR
    python -m qwen_min.tiny.pretrain --reviews DIR --output NEW_DIRECTORY

One meal is a review in a frame, a question, a verdict, another question and another verdict, all
drawn anew each time. Every token is predicted, as by any language model; the verdicts weigh as much
as all the rest. What zero-shot scoring asks later is in no meal: the default template's beginning
and end are known, each in other company, and so are 负面 and 正面, but not behind that end. On one
thread: the same seed then gives the same bytes, whatever the number of cores.
"""

import argparse
import json
import random
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as BaseTokenizer
from torch import Tensor

from qwen_min.command.cli import make_parser, run_command, seed
from qwen_min.config import QwenConfig
from qwen_min.errors import UserError
from qwen_min.fast.label_scores import score_labels
from qwen_min.files.data import Example, read_examples
from qwen_min.files.overlap import FED, text_hashes
from qwen_min.metrics import auc_roc
from qwen_min.model import Qwen
from qwen_min.prompt import DEFAULT_LABELS, build_prompts, shorten
from qwen_min.tokenizer import Tokenizer
from qwen_min.training import learning_rate, shuffled_batches

FRAMES = ["评论：{}\n", "文本：{}\n", "用户说：{}\n", "点评：{}\n", "内容：{}\n", "中文评论：{}\n"]
FRAMES += ["顾客留言：{}\n", "“{}”\n", "{}\n"]
QUESTIONS = ["情感倾向：", "情感：", "态度：", "评价：", "结论：", "倾向：", "总体来看：", "类别："]
QUESTIONS += ["判断：", "答案：", "情感极性：", "分类："]
VERDICTS = [("差评", "好评"), ("不满意", "满意"), ("不推荐", "推荐"), ("消极", "积极")]
VERDICTS += [("负向", "正向"), ("很差", "很好"), ("失望", "喜欢"), ("贬", "褒"), ("坏", "好")]
VERDICTS += [("否定", "肯定"), DEFAULT_LABELS, DEFAULT_LABELS]
MARKUP = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The pre-tokenizer of Qwen2's tokenizer.json.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONFIG = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}
CONFIG |= {"vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3}
CONFIG |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 1024}
CONFIG |= {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True}
CONFIG |= {"torch_dtype": "bfloat16"}
EPOCHS, ROWS, RATE, DECAY = 10, 32, 2e-3, 0.1
MAX_TOKENS = 64  # of a review
PASSAGE = 0.5  # share of meals in which a review begins at a later clause: shorter, and another end
NOISE = 0.1  # share of a review's tokens that are replaced by others in what the model reads
TEXT, VERDICT = 1, 2  # what a token is predicted as; 0: not at all


def train_tokenizer(texts: list[str]) -> BaseTokenizer:
    """A byte-level BPE whose tokens never join punctuation to a word: `：正面` is `：`, `正面`."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    qwen2 = [pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"), byte_level]
    apart = pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}\s]"), behavior="isolated")
    tokenizer = BaseTokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([apart, *qwen2])
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"] - len(MARKUP),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,  # four characters: longer ones would be whole clauses
        show_progress=False,
    )
    words = [*FRAMES, *QUESTIONS, *(word for pair in VERDICTS for word in pair)]
    tokenizer.train_from_iterator(texts + 300 * words, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(qwen2)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in MARKUP])
    return tokenizer


def meal(tokenizer: Tokenizer, row: Example, rng: random.Random) -> list[tuple[int, int]]:
    """One review in a frame, with two verdicts: (id, what it is predicted as) for each token."""
    clauses = re.split(r"(?<=[，。！？；…,!?;\s])", row.text)
    start = rng.randrange(len(clauses)) if rng.random() < PASSAGE else 0
    text = shorten(tokenizer, "".join(clauses[start:]) or row.text, MAX_TOKENS)
    question = rng.choice(QUESTIONS)
    # The default template's own beginning and end never meet, nor its words that end.
    known = question == QUESTIONS[0]
    frame, verdict = rng.choice(FRAMES[known:]), rng.choice(VERDICTS[: -2 if known else None])
    parts = [(frame.format(text) + question, TEXT), (verdict[row.label], VERDICT)]
    parts += [("\n" + rng.choice(QUESTIONS[1:]), 0), (rng.choice(VERDICTS)[row.label], VERDICT)]
    tokens = [(id_, kind) for part, kind in parts for id_ in tokenizer.encode(part)]
    return [*tokens, (tokenizer.markup["<|endoftext|>"], TEXT)]


def initial_model(config: QwenConfig) -> Qwen:
    """Weights of a size that keeps activations near 1; the two that write to the stream smaller."""
    model = Qwen(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            deviation = 0.02 if "embed" in name else parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                deviation /= (2 * config.num_hidden_layers) ** 0.5
            torch.nn.init.normal_(parameter, std=deviation)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return model


def loss_of(model: Qwen, ids: Tensor, kinds: Tensor) -> Tensor:
    """Mean cross-entropy of the texts' tokens plus that of the verdicts'. ids, kinds (B, T)."""
    noisy = (torch.rand(ids.shape) < NOISE) & (kinds == TEXT)
    read = torch.where(noisy, torch.randint(CONFIG["vocab_size"], ids.shape), ids)
    # dtype: products in bf16, for speed; weights, norms and softmax stay in fp32.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = model(read)[:, :-1]  # the state at position i predicts token i + 1
        chosen = [kinds[:, 1:] == kind for kind in (TEXT, VERDICT)]
        return sum(F.cross_entropy(model.logits(h[c]), ids[:, 1:][c]) for c in chosen)


def train(model: Qwen, tokenizer: Tokenizer, rows: list[Example], args: argparse.Namespace) -> None:
    """Passes over the reviews with AdamW; the rate rises for a twentieth, then falls to zero."""
    rng, started = random.Random(args.seed), time.perf_counter()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), weight_decay=DECAY)
    per_epoch = -(-len(rows) // ROWS)
    for epoch in range(args.epochs):
        losses = []
        meals = [torch.tensor(meal(tokenizer, row, rng)) for row in rows]
        for batch in shuffled_batches([len(m) for m in meals], ROWS, args.seed, epoch):
            padded = torch.nn.utils.rnn.pad_sequence([meals[i] for i in batch], batch_first=True)
            step = epoch * per_epoch + len(losses)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.epochs * per_epoch, RATE, warmup=0.05)
            optimizer.zero_grad()
            loss = loss_of(model, *padded.unbind(dim=-1))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        seconds, mean = time.perf_counter() - started, np.mean(losses)
        print(f"epoch {epoch + 1}   {seconds:.0f} s   loss {mean:.3f}", flush=True)


def pretrain(args: argparse.Namespace) -> int:
    """Tokenizer, weights, and the hashes of what they were made from, into a new directory."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    out, files = Path(args.output), [Path(args.reviews) / f"{n}.tsv" for n in ("train", "dev")]
    rows, held_out = (read_examples(file, DEFAULT_LABELS) for file in files)
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output {out}: {error.strerror}; name a new directory") from None
    train_tokenizer([row.text for row in rows]).save(str(out / "tokenizer.json"))
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    tokenizer, model = Tokenizer(out), initial_model(QwenConfig.from_json(out / "config.json"))
    print(f"{len(rows)} reviews, {sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, tokenizer, rows, args)
    model.bfloat16()
    save_file(model.state_dict(), out / "model.safetensors", metadata={"format": "pt"})
    hashes = torch.from_numpy(text_hashes(row.text for row in rows))
    save_file({"texts": hashes}, out / FED)
    scores = score_labels(model, build_prompts(tokenizer, [row.text for row in held_out]))
    labels = np.array([row.label for row in held_out])
    right, auc = (scores.argmax(axis=1) == labels).mean(), auc_roc(labels, scores)
    print(f"zero-shot on {len(labels)} other reviews: accuracy {right:.4f}, AUC {auc:.4f}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--reviews", metavar="DIR", required=True, help="train.tsv and dev.tsv")
    parser.add_argument("--output", metavar="DIR", required=True, help="a new directory")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the reviews")
    parser.add_argument("--seed", type=seed, default=0, help="of everything drawn at random")
    return run_command(pretrain, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
