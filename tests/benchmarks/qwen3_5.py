#!/usr/bin/env python3
"""Compare Qwen3.5's chunked form with transformers' torch path: forward, LoRA training, memory.

    python tests/benchmarks/qwen3_5.py                      # both dtypes, about 10 minutes
    python tests/benchmarks/qwen3_5.py --dtype float32 --rounds 3
    python tests/benchmarks/qwen3_5.py --quick              # only checks that the benchmark works

The checkpoint is made in a temporary directory: random weights in the shape of Qwen3.5-0.8B, cut to
four layers, three of them with the gated delta rule, and to a smaller vocabulary, so that the
layers are what is measured. transformers runs without its optional kernels (flash-linear-attention,
causal-conv1d), with its own default attention and without a cache.

mixer     the gated delta rule of one layer, with its projections, on random states.
forward   hidden states of all tokens, without gradient. Label scoring reads the last token's state
          only, and this project then spares most of the last layer. With four layers instead of 24
          this would count six times as much, so all states are computed here.
training  a step of LoRA with AdamW: forward, loss of one label token for each text, backward. PEFT
          trains the same matrices on the transformers model. They are q, k, v and o of attention,
          and in_proj_qkv, in_proj_z and out_proj of the delta rule.

Both programs run in one process in turn, one round after the other; each round gives the ratio of
their times, transformers' by ours. Freed memory is kept for both, as in this project's commands.
The decays are drawn as transformers draws them for training from nothing. They fade fast: its
products then meet denormal numbers, which cost time and which the form here avoids; the trained
decays of a released model may be milder. The table has the median of the rounds and, for the ratio,
the smallest and the largest. Before that, results and the losses of some steps must agree;
otherwise the exit status is 1. Peak memory is that of a new process that scores 4, 16 or 64 texts
in batches of 4. It should not grow with their number.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from common import answer, in_process, print_table

from lora import inject_lora
from qwen_min.command.cli import positive_int
from qwen_min.fast.delta import gated_delta_net
from qwen_min.fast.label_scores import score_labels
from qwen_min.fast.layout import Text, pack
from qwen_min.fast.memory import keep_freed_memory
from qwen_min.fast.packed import forward_packed
from qwen_min.files.weights import load_model
from qwen_min.prompt import Prompt

SHAPE = {
    **{"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 4, "head_dim": 256},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True},
    **{"linear_num_key_heads": 16, "linear_num_value_heads": 16},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj"]
R, ALPHA, RATE, TEXTS, STEPS = 8, 16, 2e-4, 4, 3
# Largest allowed difference of states or losses, relative to their length. fp32: rounding in four
# layers. bf16: a step of 1/128 at each of 8 additions to the residual.
BOUNDS = {"float32": 1e-5, "bfloat16": 0.05}
NUMBERS = (4, 16, 64)  # of texts, for the peak memory
PROGRAMS = ("ours", "transformers")
COLUMNS = {"work": "", "dtype": "", "ours_ms": ".0f", "transformers_ms": ".0f"}
COLUMNS |= {"ratio": ".2f", "least": ".2f", "most": ".2f"}
Call = Callable[[], torch.Tensor]


def make_checkpoint(args: argparse.Namespace) -> None:
    from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    config = Qwen3_5TextConfig(vocab_size=args.vocabulary, **SHAPE)
    # In bf16 throughout: in either dtype both programs then compute with the same numbers.
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(args.model)


def load(program: str, args: argparse.Namespace):
    if program == "ours":
        return load_model(args.model, args.dtype)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()


def states(program: str, model, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states of all tokens of ids (B, T): (B, T, D)."""
    if program == "ours":
        h, _ = forward_packed(model, pack(model, [Text(row) for row in ids.tolist()]))
        return h.view(*ids.shape, -1)
    return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state


def training_step(program: str, args: argparse.Namespace, ids: torch.Tensor) -> Call:
    """One step of LoRA on the texts; the loss predicts a token behind each of them."""
    model = load(program, args)
    head = model.get_parameter("model.embed_tokens.weight")  # the checkpoint is tied
    if program == "ours":
        inject_lora(model, TARGETS, R, ALPHA, dropout=0.0)
    else:
        from peft import LoraConfig, get_peft_model

        # In place. PEFT has no dropout by default.
        get_peft_model(model, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=TARGETS))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if "lora_A" in name:  # of each shape the same numbers in both programs
            generator = torch.Generator().manual_seed(sum(parameter.shape))
            drawn = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            parameter.data.copy_(drawn)
    optimizer = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0)

    def step() -> torch.Tensor:
        logits = torch.nn.functional.linear(states(program, model, ids)[:, -1], head).float()
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def mixer(program: str, args: argparse.Namespace, ids: torch.Tensor) -> Call:
    model, size = load(program, args), SHAPE["hidden_size"]
    net, drawn = model.model.layers[0].linear_attn, torch.Generator().manual_seed(0)
    x = torch.randn(*ids.shape, size, generator=drawn).to(net.out_proj.weight.dtype)
    if program == "transformers":
        return torch.inference_mode()(lambda: net(x).float())
    batch = pack(model, [Text(row) for row in ids.tolist()])
    run = torch.inference_mode()(lambda: gated_delta_net(net, x.flatten(0, 1), batch, None)[0])
    return lambda: run().view_as(x).float()


def forward(program: str, args: argparse.Namespace, ids: torch.Tensor) -> Call:
    model = load(program, args)
    return torch.inference_mode()(lambda: states(program, model, ids).float())


def score(args: argparse.Namespace, ids: torch.Tensor) -> object:
    """Score two labels of one token behind each text, four texts at a time."""
    model = load(args.only, args)
    if args.only == "ours":
        prompts = [Prompt(tuple(row), ((1,), (2,)), False) for row in ids.tolist()]
        return score_labels(model, prompts, TEXTS * ids.shape[1])
    with torch.inference_mode():
        for part in ids.split(TEXTS):
            model(input_ids=part, use_cache=False, logits_to_keep=1).logits.float().log_softmax(-1)


def milliseconds(call: Call) -> float:
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def compare(work: str, args: argparse.Namespace, ids: torch.Tensor) -> dict:
    """Check that both programs agree, then time them in turn."""
    calls = [WORK[work](program, args, ids) for program in PROGRAMS]
    found, expected = (torch.stack([call() for _ in range(STEPS)]) for call in calls)
    worst = ((found - expected).norm() / expected.norm()).item()
    print(f"{work}, {args.dtype}: results differ by {worst:.1e} of their length", flush=True)
    if not worst <= BOUNDS[args.dtype]:
        sys.exit("error: that is too much; the times cannot be compared")
    times = [[milliseconds(call) for call in calls] for _ in range(args.rounds)]
    ours, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = [b / a for a, b in times]
    values = (work, args.dtype, ours, theirs, statistics.median(ratios), min(ratios), max(ratios))
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", choices=BOUNDS, help="default: both")
    parser.add_argument("--rounds", type=positive_int, default=7)
    parser.add_argument("--vocabulary", type=positive_int, default=32768, help="rows (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="two rounds, short texts")
    for hidden in ("--model", "--only", "--texts"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_freed_memory()  # like the commands
    count, tokens = int(args.texts or TEXTS), 70 if args.quick else 256
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(0, args.vocabulary, (count, tokens), generator=drawn)
    if args.only:
        make_checkpoint(args) if args.only == "make" else score(args, ids)
        return answer({})
    args.rounds, numbers = (2, NUMBERS[:2]) if args.quick else (args.rounds, NUMBERS)
    dtypes = [args.dtype] if args.dtype else list(BOUNDS)
    with tempfile.TemporaryDirectory() as args.model:
        in_process("--model", args.model, "--only", "make")
        peaks, rows = [], []
        # While this process is small: on Linux a new process starts with its parent's peak.
        for dtype, texts in itertools.product(dtypes, numbers):
            flags = ["--model", args.model, "--dtype", dtype, "--texts", str(texts), "--only"]
            found = {program: in_process(*flags, program)["peak_mib"] for program in PROGRAMS}
            peaks.append({"texts": texts, "dtype": dtype, **found})
        print("peak memory, MiB")
        print_table(peaks, {"texts": "d", "dtype": "", "ours": ".0f", "transformers": ".0f"})
        for dtype, work in itertools.product(dtypes, WORK):
            args.dtype = dtype
            rows.append(compare(work, args, ids))
    print_table(rows, COLUMNS)


WORK = {"mixer": mixer, "forward": forward, "training": training_step}

if __name__ == "__main__":
    main()
