"""Make the checkpoint in this directory: a small Qwen2, trained on public labelled reviews.

    python tests/real/make_reviews.py                        # fetches the reviews, prints DIR
    python -m qwen_min.tiny.pretrain --reviews DIR --output NEW_DIRECTORY
    python evaluate.py --method zero_shot --model NEW_DIRECTORY --data DIR/dev.tsv

A training sample is: a review in a frame, a question, a verdict, a second question, a second
verdict. All parts are drawn at random in each epoch. The model learns to predict every token except
the second question; the loss of the verdicts weighs as much as that of all other tokens.

No training sample is a prompt of zero-shot scoring. The frame and the question of the default
template occur, but never together; 负面 and 正面 occur, but never after that question.

Training runs on one thread: then the same seed gives the same bytes on any number of cores.
"""

import argparse
import random
import re
import shutil
import sys
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as BaseTokenizer
from torch import Tensor

from qwen_min.command.cli import make_parser, run_command, seed
from qwen_min.config import QwenConfig
from qwen_min.files.data import Example, read_examples
from qwen_min.files.disk import one_line_error
from qwen_min.files.overlap import FED, text_hashes
from qwen_min.model import Qwen
from qwen_min.prompt import DEFAULT_LABELS, shorten
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
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
QWEN2_SPLIT += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONFIG_FILE = Path(__file__).with_name("config.json")
CONFIG = QwenConfig.from_json(CONFIG_FILE)
EPOCHS, ROWS, RATE, DECAY = 10, 32, 2e-3, 0.1
MAX_TOKENS = 64  # of a review
LATER_START = 0.5  # share of samples whose review starts at a later clause, so that it is shorter
NOISE = 0.1  # share of a review's input tokens that are replaced by random ones
TEXT, VERDICT = 1, 2  # kinds of tokens, with a loss each; a token of kind 0 has no loss


def train_tokenizer(texts: list[str]) -> BaseTokenizer:
    """A byte-level BPE in which no token joins punctuation and a word: `：正面` is `：`, `正面`."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    qwen2 = [pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"), byte_level]
    apart = pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}\s]"), behavior="isolated")
    tokenizer = BaseTokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([apart, *qwen2])
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size - len(MARKUP),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,  # bytes, so four Chinese characters; longer tokens would be clauses
        show_progress=False,
    )
    words = [*FRAMES, *QUESTIONS, *(word for pair in VERDICTS for word in pair)]
    tokenizer.train_from_iterator(texts + 300 * words, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(qwen2)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in MARKUP])
    return tokenizer


def training_sample(tokenizer: Tokenizer, row: Example, rng: random.Random) -> Tensor:
    """One review with two verdicts, (T, 2): each token's id and kind (TEXT, VERDICT or 0)."""
    clauses = re.split(r"(?<=[，。！？；…,!?;\s])", row.text)
    start = rng.randrange(len(clauses)) if rng.random() < LATER_START else 0
    text = shorten(tokenizer, "".join(clauses[start:]) or row.text, MAX_TOKENS)
    question = rng.choice(QUESTIONS)
    # With the default template's question, leave out its frame (the first of FRAMES) and its label
    # words (the last two of VERDICTS).
    is_default = question == QUESTIONS[0]
    frame = rng.choice(FRAMES[1:] if is_default else FRAMES)
    verdict = rng.choice(VERDICTS[:-2] if is_default else VERDICTS)
    parts = [(frame.format(text) + question, TEXT), (verdict[row.label], VERDICT)]
    parts += [("\n" + rng.choice(QUESTIONS[1:]), 0), (rng.choice(VERDICTS)[row.label], VERDICT)]
    tokens = [(id_, kind) for part, kind in parts for id_ in tokenizer.encode(part)]
    return torch.tensor([*tokens, (tokenizer.markup["<|endoftext|>"], TEXT)])


def initial_model() -> Qwen:
    """Random weights, biases 0. Their standard deviation 1/√in keeps activations near 1.

    o_proj and down_proj add to the residual stream 2L times, so theirs is divided by √(2L).
    """
    model = Qwen(CONFIG)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            deviation = 0.02 if "embed" in name else parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                deviation /= (2 * CONFIG.num_hidden_layers) ** 0.5
            torch.nn.init.normal_(parameter, std=deviation)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return model


def loss_of(model: Qwen, ids: Tensor, kinds: Tensor) -> Tensor:
    """Mean cross-entropy over TEXT tokens plus mean over VERDICT tokens, in nats.

    ids, kinds (B, T), padded with 0: kind 0 has no loss.
    """
    noisy = (torch.rand(ids.shape) < NOISE) & (kinds == TEXT)
    inputs = torch.where(noisy, torch.randint(CONFIG.vocab_size, ids.shape), ids)
    # dtype: matrix products in bf16, for speed; weights, norms and softmax stay in fp32.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = model(inputs)[:, :-1]  # the state at position i predicts token i + 1
        masks = [kinds[:, 1:] == kind for kind in (TEXT, VERDICT)]
        return sum(F.cross_entropy(model.logits(h[mask]), ids[:, 1:][mask]) for mask in masks)


def train(model: Qwen, tokenizer: Tokenizer, rows: list[Example], args: argparse.Namespace) -> None:
    """Train with AdamW. The learning rate rises during 5 % of the steps, then falls to zero."""
    rng = random.Random(args.seed)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), weight_decay=DECAY)
    per_epoch, losses = -(-len(rows) // ROWS), []
    for epoch in range(args.epochs):
        samples = [training_sample(tokenizer, row, rng) for row in rows]
        for batch in shuffled_batches([len(s) for s in samples], ROWS, args.seed, epoch):
            padded = torch.nn.utils.rnn.pad_sequence([samples[i] for i in batch], batch_first=True)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(len(losses), args.epochs * per_epoch, RATE, warmup=0.05)
            optimizer.zero_grad()
            loss = loss_of(model, *padded.unbind(dim=-1))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}   loss {mean(losses[-per_epoch:]):.3f}", flush=True)


def pretrain(args: argparse.Namespace) -> int:
    """Write tokenizer, config, weights and hashes of the training texts into a new directory."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    out, rows = Path(args.output), read_examples(Path(args.reviews) / "train.tsv", DEFAULT_LABELS)
    with one_line_error(out, "name a new directory"):
        out.mkdir(parents=True)
    train_tokenizer([row.text for row in rows]).save(str(out / "tokenizer.json"))
    shutil.copyfile(CONFIG_FILE, out / "config.json")
    tokenizer, model = Tokenizer(out), initial_model()
    print(f"{len(rows)} reviews, {sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, tokenizer, rows, args)
    model.bfloat16()
    save_file(model.state_dict(), out / "model.safetensors", metadata={"format": "pt"})
    save_file({"texts": torch.from_numpy(text_hashes(row.text for row in rows))}, out / FED)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--reviews", metavar="DIR", required=True, help="the directory of train.tsv")
    add("--output", metavar="DIR", required=True, help="a new directory")
    add("--epochs", type=int, default=EPOCHS, help="passes over the reviews")
    add("--seed", type=seed, default=0, help="seed of all random draws")
    return run_command(pretrain, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
