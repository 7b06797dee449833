#!/usr/bin/env python3
"""Compare a checkpoint's numbers here with those of transformers, module by module.

    python tests/parity.py --model tiny
    python tests/parity.py --model Qwen/Qwen2.5-0.5B-Instruct --text 房间小，但是很干净。
    python tests/parity.py --model DIR --adapter ADAPTER       # the same LoRA, loaded by PEFT
    python tests/parity.py --model DIR --save ours.safetensors
    python tests/parity.py --model COPY --reference ours.safetensors

Three programs read a few prompts: the definition (qwen_min/model.py), the fast form (qwen_min/fast)
and, as the reference, transformers with eager attention. The table has a row for each module, in
the order of computation, and of the difference of its outputs from the reference's

    abs   the largest,
    rel   the largest, relative to the reference's largest output,
    own   in another dtype than float32: the mean, relative to the mean distance of the reference's
          outputs from its own in float32 (the definition's, for --reference).

A * is beyond the bound. Errors reach all later modules, so the first one names the place. At the
end are the logits of all tokens, the scores of two label words, and greedy tokens.

Bounds. In float32, rel ≤ 5e-5: a sum of n products in another order differs by about sqrt(n) 2^-24
of its size, which is 4e-6 for n = 4,864. In 24 layers some hundred such sums follow each other, and
their errors add up like the steps of a random walk. (Measured on a 0.5B: 5e-6.) In another dtype,
own ≤ 2: two programs that round independently, both as far from float32 as the other, are sqrt(2)
of this distance apart; the rest is for chance. It is a mean, because a few outputs are so large
that one rounding step of theirs outweighs all others. A label score is a sum of a logit and a
log-sum-exp for each token, so its bound is twice that of a logit for each. Greedy tokens must be
the same in float32; elsewhere a token that is nearly as likely may come first.

--reference names a file that takes the place of transformers: `input_ids` (tokens,) and `logits`
(tokens, V), or both with the texts as first dimension, in the dtype that they were computed in.
`lengths` (texts,) divides texts that stand end to end. What else it holds under the name of a
module is compared, too. --save writes such a file, in float32, with all outputs of the definition.

The exit status is 0 if all is within the bounds, 1 if not, and 2 for a mistake of the user.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

# For a script, Python adds the script's folder to the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qwen_min.command.cli import make_parser, run_command
from qwen_min.command.terminal import text_table
from qwen_min.command.trained import attach_adapter
from qwen_min.config import QwenConfig
from qwen_min.errors import UserError
from qwen_min.fast.generation import generate_answers
from qwen_min.fast.label_scores import score_labels
from qwen_min.fast.layout import Text, pack
from qwen_min.fast.packed import forward_packed
from qwen_min.files.disk import read_safetensors, refuse_malformed, write_atomically
from qwen_min.files.hub import resolve_model
from qwen_min.files.output import refuse_inputs
from qwen_min.files.tokens import read_tokenizer
from qwen_min.files.weights import DTYPES, FLOAT32, load_model, read_tensors
from qwen_min.files.weights import checkpoint_fingerprint as fingerprint
from qwen_min.lab.generation import greedy
from qwen_min.model import Qwen, rotary_cos_sin
from qwen_min.prompt import DEFAULT_LABELS, DEFAULT_TEMPLATE, FIELD, Prompt, check_lengths
from qwen_min.scoring import score_label

RELATIVE, OWN = 5e-5, 2.0  # the bounds; see above
TEXTS = ("房间小，但是很干净。", "等了两个小时，菜还是凉的！", "Kind staff; I'd come back.")
NEW_TOKENS = 20
FAILED = [-1] * NEW_TOKENS  # where logits are not finite
# Means over the vocabulary of the logits at each position, from transformers' own tests.
PINNED_IDS, PINNED_BOUND = [1, 306, 4658, 278, 6593, 310, 2834, 338], 1e-2
PINNED = {
    "Qwen2-0.5B": [-1.9537, -1.6193, -1.4123, -1.4673, -1.8511, -1.9309, -1.9826, -2.1776],
    "Qwen3-0.6B-Base": [-1.4577, 1.3261, 3.8498, 3.4229, 2.9009, 1.8813, 2.1530, 2.1431],
}
ROTARY, LOGITS = "model.rotary_emb", "logits"
SCORES, GREEDY = "label_scores", "greedy_tokens"
# By name, in the order of computation: (tokens of all texts, features), but scores (texts, labels).
Outputs = dict[str, Tensor]
Ids = Sequence[int]


class Difference(NamedTuple):
    """A cell of the table: abs, rel and perhaps own, and whether they are beyond the bound."""

    numbers: tuple[str, ...]
    beyond: bool

    def __str__(self) -> str:
        return "".join(f"{number:>8}" for number in self.numbers) + " *"[self.beyond]


@contextmanager
def recorded(root: nn.Module, outputs: Outputs, tokens: int) -> Iterator[None]:
    """Within the block, what each module of `root` puts out is added to `outputs`."""

    def keep(name: str) -> Callable:
        def hook(_module: nn.Module, _inputs: tuple, output: object) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, Tensor) and output.numel() % tokens == 0:
                outputs[name] = output.reshape(tokens, -1).clone()

        return hook

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in root.named_modules()
        if name not in ("", "model") and not isinstance(module, nn.Identity)
    ]
    yield
    for hook in hooks:
        hook.remove()


def run_texts(root: nn.Module, forward: Callable[[Tensor], Tensor], texts: list[Ids]) -> Outputs:
    """One text after the other; forward maps ids (1, T) to logits (1, T, V)."""
    parts: list[Outputs] = []
    for ids in texts:
        parts.append({})
        with recorded(root, parts[-1], len(ids)):
            logits = forward(torch.tensor([ids]))[0]
        parts[-1][LOGITS] = logits
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def by_definition(model: Qwen, texts: list[Ids], prompts: list[Prompt]) -> Outputs:
    def forward(ids: Tensor) -> Tensor:
        return model.logits(model(ids))

    # Not a module here. transformers has it in the activations' dtype.
    rotary = model.config.rotary_dim, model.config.rope_theta
    angles = [rotary_cos_sin(torch.arange(len(ids)), *rotary)[0][:, 0] for ids in texts]
    outputs = {ROTARY: torch.cat(angles).to(model.lm_head_weight.dtype)}
    outputs |= run_texts(model, forward, texts)
    scores = [[score_label(model, p.ids, label) for label in p.labels] for p in prompts]
    new = greedy(model, prompts[0].ids, NEW_TOKENS) or FAILED
    return outputs | {SCORES: torch.tensor(scores), GREEDY: torch.tensor(new)}


def by_fast_form(model: Qwen, texts: list[Ids], prompts: list[Prompt]) -> Outputs:
    """All texts at once. Norms are no calls of modules here; `streams` has the layers' outputs."""
    batch, streams = pack(model, [Text(ids) for ids in texts]), []
    outputs = {ROTARY: batch.cos[:, 0].to(model.lm_head_weight.dtype)}
    with recorded(model, outputs, len(batch.ids)):
        h, _ = forward_packed(model, batch, streams)
    outputs |= {f"model.layers.{i}": x for i, x in enumerate(streams[1:])}
    outputs |= {"model.norm": h, LOGITS: model.logits(h)}
    (new,) = generate_answers(model, prompts[:1], NEW_TOKENS, (), 10**6)
    scores = torch.from_numpy(score_labels(model, prompts))
    return outputs | {SCORES: scores, GREEDY: torch.tensor(new or FAILED)}


def by_transformers(
    directory: Path, dtype: str, adapter: str | None, texts: list[Ids], prompts: list[Prompt]
) -> Outputs:
    try:
        import peft
        import transformers
    except ImportError as error:
        advice = "pip install -r tests/requirements.txt, or give a file by --reference"
        raise UserError(f"{error.name} is not installed; {advice}") from None
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=DTYPES[dtype], attn_implementation="eager"
    )
    # A new one: the checkpoint's may ask for sampling, or for a penalty on repeated tokens.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0, use_cache=False
    )
    kept = {name: p for name, p in model.named_parameters() if name.endswith(FLOAT32)}
    if any(parameter.dtype != torch.float32 for parameter in kept.values()):
        kinds = " and ".join(f"*{end}" for end in FLOAT32)
        say(f"note: transformers rounds {kinds} to {dtype}; for the comparison both have float32")
        stored = read_tensors(directory, QwenConfig.from_json(directory / "config.json"))
        for name, parameter in kept.items():
            parameter.data = stored[name].float()
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter).get_base_model()
    model.eval()

    def forward(ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).logits

    def score(prompt: Prompt, label: Ids) -> float:
        logits = forward(torch.tensor([[*prompt.ids, *label[:-1]]]))[0, -len(label) :].float()
        return logits.log_softmax(-1)[range(len(label)), list(label)].sum().item()

    outputs = run_texts(model, forward, texts)
    scores = [[score(prompt, label) for label in prompt.labels] for prompt in prompts]
    ids = torch.tensor([prompts[0].ids])
    new = model.generate(ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :].tolist()
    return outputs | {SCORES: torch.tensor(scores), GREEDY: torch.tensor(new)}


def read_reference(path: Path, vocabulary: int) -> tuple[Outputs, list[Ids]]:
    """The outputs in a file, and the texts that they belong to."""
    about = path, "a file of input_ids and logits", "write one with --save"
    outputs, _ = read_safetensors(*about)
    with refuse_malformed(*about):
        ids, logits = outputs.pop("input_ids"), outputs["logits"]
        lengths = outputs.pop("lengths", torch.full(ids.shape[:-1], ids.shape[-1])).flatten()
        if logits.shape != (*ids.shape, vocabulary):
            expected = f"expected {[*ids.shape, vocabulary]}, as ids and vocab_size say"
            raise ValueError(f"logits are {[*logits.shape]}, {expected}")
        whole = not ids.is_floating_point() and lengths.min() > 0
        if not whole or not 0 <= ids.min() <= ids.max() < vocabulary:
            raise ValueError("an id is not in the vocabulary, or a text is empty")
        texts = [part.tolist() for part in ids.flatten().split(lengths.tolist())]
        for name in outputs.keys() - {SCORES, GREEDY}:
            outputs[name] = outputs[name].reshape(ids.numel(), -1)
    return outputs, texts


def differences(
    found: Outputs, expected: Outputs, own: tuple[Outputs, Outputs] | None, label_tokens: int
) -> dict[str, Difference]:
    """Of each name in both. own: one program's outputs in their dtype and in float32."""
    rows, limits = {}, {}
    for name in [name for name in found if name in expected]:
        a, b = found[name].float(), expected[name].float()
        if a.shape != b.shape:
            shapes = f"{[*a.shape]} here, {[*b.shape]} in the reference"
            raise UserError(f"{name}: {shapes}; compare one architecture and the same texts")
        if name == GREEDY:
            same = int((a == b).cumprod(dim=0).sum())
            other = same < NEW_TOKENS and own is None
            rows[name] = Difference((f"{same} of {NEW_TOKENS}",), other)
            continue
        largest, size = (a - b).abs().max().item(), b.abs().max().item()
        numbers, limits[name] = [f"{largest:.1e}", f"{largest / (size or 1):.1e}"], RELATIVE * size
        beyond = not largest <= limits[name]  # in this form NaN is beyond
        if own is not None:
            rounding = own[0][name].float() - own[1][name].float()
            mean, unit = (x.abs().mean().item() for x in (a - b, rounding))
            numbers.append(f"{mean / (unit or 1):.2f}")
            beyond = beyond and not mean <= OWN * unit  # without rounding, as in float32
            limits[name] += OWN * rounding.abs().max().item()
        if name == SCORES:  # too few for a mean
            beyond = not largest <= 2 * label_tokens * limits[LOGITS]
        rows[name] = Difference(tuple(numbers), beyond)
    return rows


def is_pinned(names: set[str], model: Qwen) -> bool:
    """Whether the logits are those that transformers' tests pin for a checkpoint of these names."""
    good = True
    for name in names & PINNED.keys() if model.config.vocab_size > max(PINNED_IDS) else ():
        means = model.logits(model(torch.tensor([PINNED_IDS])))[0].mean(dim=-1)
        largest = (means - torch.tensor(PINNED[name])).abs().max().item()
        good = good and largest <= PINNED_BOUND
        print(f"pinned logits of {name}: means differ by {largest:.1e}, bound {PINNED_BOUND}")
    return good


def print_table(columns: dict[str, dict[str, Difference]], order: Sequence[str]) -> bool:
    """Columns by title, rows in this order; returns whether all is within the bounds."""
    kinds = [("abs", "rel", "own")[: 2 + ("float32" not in title)] for title in columns]
    lines, first = [["module", *(str(Difference(kind, False)) for kind in kinds), ""]], {}
    for name in order:
        cells = [rows.get(name) for rows in columns.values()]
        new = {t: name for t, cell in zip(columns, cells, strict=True) if cell and cell.beyond}
        mark = "<- first beyond the bound" if new and not first else ""
        first = new | first
        if any(cells):
            lines.append([name, *(str(cell or "- ") for cell in cells), mark])
    print(text_table(["", *(f"{title} " for title in columns), ""], lines), end="\n\n")
    for title in columns:
        print(f"{title}: " + (f"beyond from {first[title]} on" if title in first else "good"))
    return not first


def read_prompts(directory: Path, config: QwenConfig, texts: Sequence[str]) -> list[Prompt]:
    tokenizer, prompts = read_tokenizer(directory), []
    for text in texts:
        if text != text.encode("utf-8", "replace").decode():
            raise UserError(f"--text {text!r}: is not valid UTF-8; type it again")
        # Encoded apart, whether they would merge or not: all programs read the same tokens.
        parts = (DEFAULT_TEMPLATE.replace(FIELD, text), *DEFAULT_LABELS)
        ids, *labels = (tuple(tokenizer.encode(part)) for part in parts)
        prompts.append(Prompt(ids, tuple(labels), False))
    if tokenizer.size > config.vocab_size:
        found = f"tokenizer.json has {tokenizer.size} tokens, vocab_size is {config.vocab_size}"
        raise UserError(f"{directory}: {found}; take both from one checkpoint")
    places = [f"text {i + 1}" for i in range(len(prompts))]
    check_lengths(prompts, config.max_position_embeddings, places, NEW_TOKENS)
    return prompts


def dtype_of(tensor: Tensor) -> str:
    """In which dtype to compute what is compared with `tensor`."""
    return next((name for name, dtype in DTYPES.items() if dtype == tensor.dtype), "float32")


@torch.inference_mode()
def compare(args: argparse.Namespace) -> int:
    directory = resolve_model(args.model)
    if args.save:
        refuse_inputs([args.save], [directory, args.adapter, args.reference])
    config = QwenConfig.from_json(directory / "config.json")
    prompts = read_prompts(directory, config, args.text or TEXTS)
    label_tokens = max(len(label) for prompt in prompts for label in prompt.labels)
    texts, given = [[*prompt.ids] for prompt in prompts], None
    if args.reference:
        given, of_file = read_reference(Path(args.reference), config.vocab_size)
        if of_file != texts:  # then its scores and greedy tokens are of other prompts
            given = {name: t for name, t in given.items() if name not in (SCORES, GREEDY)}
        texts, compared = of_file, dtype_of(given[LOGITS])
    else:
        compared = dtype_of(load_model(directory, note=say).lm_head_weight)
    say(f"{args.model}: {config.model_type}, {len(texts)} texts, {sum(map(len, texts))} tokens")
    parts = (*Path(args.model.partition("@")[0]).parts, *directory.parts)
    pinned = set() if args.adapter else {part.rpartition("--")[2] for part in parts}

    columns, exact, good = {}, None, True
    for dtype in dict.fromkeys(["float32", compared]):
        # One program after the other: of each model only the outputs stay in memory.
        model = load_model(directory, dtype)
        if args.adapter:
            base = {"base_fingerprint": fingerprint(directory)}
            attach_adapter(model, Path(args.adapter), base, args.model)
        ours = by_definition(model, texts, prompts)
        forms = {"definition": ours, "fast": by_fast_form(model, texts, prompts)}
        if dtype == "float32":
            good = is_pinned(pinned, model)
            if args.save:
                save(Path(args.save), ours, texts)
        del model
        expected = given
        if given is None:
            expected = by_transformers(directory, dtype, args.adapter, texts, prompts)
        elif dtype != compared:
            expected = {}
        if expected:
            own = (ours if given else expected, exact) if exact else None
            for form, found in forms.items():
                columns[f"{form} {dtype}"] = differences(found, expected, own, label_tokens)
        exact = ours if given else expected
    good &= print_table(columns, [*ours])
    if given is None:
        apart = {name.rpartition(".")[2] for name in ours.keys() ^ expected.keys()}
        print(f"modules of one program only: {', '.join(sorted(apart))}")
    return 0 if good else 1


def save(path: Path, outputs: Outputs, texts: list[Ids]) -> None:
    ids = torch.tensor([token for ids in texts for token in ids])
    where = {"input_ids": ids, "lengths": torch.tensor([*map(len, texts)])}
    write_atomically(path, safetensors.torch.save(outputs | where), "make room")


def say(line: str) -> None:
    print(line, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="tiny, a directory or a name on the hub")
    add("--text", action="append", help="a text for the prompt; can be repeated")
    add("--adapter", metavar="DIR", help="a LoRA in PEFT's format, for all programs")
    add("--reference", metavar="FILE", help="safetensors to compare with")
    add("--save", metavar="FILE", help="write what --reference reads")
    return run_command(compare, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
