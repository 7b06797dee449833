"""What each method trains on top of the base, and how that is saved and loaded.

A run directory, and each of its checkpoints, holds what its method trains:

    adapter/                 LoRA in PEFT's format; of lora_head with its head inside; and
                             prompt.json: how another program makes the input (not read here)
    head.safetensors         the head of head_only, and of lora_head without LoRA
    embeddings.safetensors   the token vectors, with --train-embeddings
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import lora
from lora.adapter import CONFIG_FILE, TENSOR_FILE
from qwen_min.command.task import Task
from qwen_min.errors import UserError
from qwen_min.files.disk import read_regular, write_atomically, write_json
from qwen_min.files.probe import load_head, save_head
from qwen_min.files.run import ADAPTER, HEAD, VECTORS, check_same, checkpoints, publish
from qwen_min.files.weights import checkpoint_fingerprint
from qwen_min.head import LinearHead
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt
from qwen_min.tokenizer import Tokenizer

TARGETS = {"attention": (*lora.ATTENTION, *lora.DELTA_RULE), "none": ()}
TARGETS["all"] = (*TARGETS["attention"], *lora.MLP)
GIVE_BASE = "give the checkpoint that it was trained on by --model"
PROMPT_FILE = "prompt.json"
PROMPT_INPUT = (
    "Remove markup such as <|im_end|> from a text. Cut the text (never the whole prompt) to its "
    "first max_text_tokens tokens, put it in the place of {text} in template, and encode this "
    "without adding special tokens. A class's score is the head's, or its word's log-probability."
)
KEPT = ("base_fingerprint", "tokenizer_hash")  # of a run's identity: also in its adapter


@dataclass(frozen=True)
class Parts:
    """Which parts a training adds to the base."""

    lora: bool
    head: Literal["adapter", "file"] | None  # where the head is kept; None: label words score
    vectors: bool = False  # token vectors


def parts_of(method: str, arguments: Mapping) -> Parts:
    """The parts that a training of `method` with these command-line arguments adds."""
    if method == "head_only":  # its LoRA was trained before; its head belongs to that LoRA's states
        return Parts(bool(arguments["adapter"]), "file")
    adapter = arguments["lora_targets"] != "none"
    head = None if method == "lora_label_scoring" else "adapter" if adapter else "file"
    return Parts(adapter, head, bool(arguments.get("train_embeddings")))  # older runs lack the last


def identity(task: Task, adapter: str | Path | None) -> dict:
    """What predictions depend on beside arguments and data: hashes, and the prompt's template.

    adapter: the directory of a LoRA, if there is one. The keys are those of `run.DEPENDS_ON`.
    """
    files = [Path(adapter) / name for name in (CONFIG_FILE, TENSOR_FILE)] if adapter else []
    # A missing file is an error where the adapter is loaded.
    parts = [read_regular(p, "an adapter's file", "save it again") for p in files if p.is_file()]
    return {
        "base_fingerprint": checkpoint_fingerprint(task.directory),
        "tokenizer_hash": hashlib.sha256(task.tokenizer.to_json().encode()).hexdigest(),
        "template": task.whole_template(),
        "adapter_hash": hashlib.sha256(b"".join(parts)).hexdigest() if adapter else None,
    }


def prompt_fields(task: Task) -> dict:
    """For other programs: how the model's input is made of a text."""
    text = {"input": PROMPT_INPUT, "max_text_tokens": task.max_text_tokens}
    if (trim := task.trim(task.template, [], [])) is not str:
        text["input"] += f" Once cut, trim the text as Python's {trim.__name__} does."
    return text | {"template": task.whole_template(), "labels": task.labels, "words": task.scored}


def result_hash(run: Path) -> str:
    """SHA-256 of a run's result: of the name and content of each file that is loaded from it."""
    names = (f"{ADAPTER}/{CONFIG_FILE}", f"{ADAPTER}/{TENSOR_FILE}", HEAD, VECTORS)
    files = [run / name for name in names if (run / name).is_file()]
    found = [(str(p.relative_to(run)), hashlib.sha256(p.read_bytes()).digest()) for p in files]
    return hashlib.sha256(str(found).encode()).hexdigest()


def load_parts(
    model: Qwen, directory: Path, adapter: Path, parts: Parts, own: Mapping, base: str = ""
) -> LinearHead | None:
    """Put the parts in `directory` (LoRA: in `adapter`) on the model, in place; returns the head.

    own, base: the `identity` of the base, with the result_hash of a run (older ones have none), and
    its name. Raises UserError if a part is missing, unreadable, or was trained on other weights,
    and if the run's parts are not those that its training wrote.
    """
    weight = None
    if parts.lora:
        weight = attach_adapter(model, adapter, own, base, parts.vectors)
        if parts.head != "file" and (weight is not None) != (parts.head == "adapter"):
            found = "no head" if weight is None else "a classifier's head"
            raise UserError(f"{adapter}: holds {found}; choose the --method that it was trained by")
    if parts.vectors:
        from qwen_min.lab import token_vectors

        token_vectors.load(directory / VECTORS, model, parts.head is None, own["base_fingerprint"])
    head = load_head(directory / HEAD) if parts.head == "file" else None
    if own.get("result_hash") not in (None, result_hash(directory)):
        found = f"{ADAPTER}/, {HEAD} or {VECTORS} is not what its training wrote"
        raise UserError(f"{directory}: {found} (result_hash differs); train again")
    return final_head(model, weight) if parts.head == "adapter" else head


def final_head(model: Qwen, weight: Tensor) -> LinearHead:
    """The head that lora_head trains: on the last token's final state, without bias."""
    return LinearHead(weight.float(), None, model.config.num_hidden_layers, "last")


def attach_adapter(
    model: Qwen, directory: Path, own: Mapping, base: str = "", vectors: bool = False
) -> Tensor | None:
    """Put the LoRA in `directory` on the model, in place; returns its head (C, D), fp32, or None.

    own: the `identity` of the base. base: its name. vectors: whether the caller also loads token
    vectors that were trained with the LoRA. Raises UserError for an adapter that cannot be read, or
    that was trained on other weights or with another tokenizer. In an adapter that PEFT wrote, only
    the name of its base is known: if it differs from `base`, stderr gets a warning.
    """
    try:
        config, head, metadata = lora.load_adapter(directory, model)
    except lora.LoRAError as error:
        raise UserError(str(error)) from None
    if any(name.endswith("lm_head") for name in lora.lora_modules(model)):
        raise UserError(f"{directory}: has a LoRA on lm_head, which stays frozen here; train anew")
    if metadata.get("token_vectors") and not vectors:
        raise UserError(f"{directory}: needs its run's {VECTORS} as well; give the run by --run")
    names = {_last_part(name) for name in (config.base_model, base) if name}
    if "base_fingerprint" not in metadata and len(names) == 2:
        known = f"{directory} was trained on {config.base_model}, by its adapter_config.json"
        print(f"warning: {known}; it is put on {base}", file=sys.stderr)
    check_same(metadata, own, directory, GIVE_BASE)
    return head


def _last_part(name: str) -> str:
    """The part of a model's path or hub name that stays when it moves, without a revision."""
    parts = Path(os.path.abspath(name)).parts
    cached = [p.replace("--", "/") for p in parts if p.startswith("models--")]  # the hub's cache
    return (cached or parts)[-1].rpartition("/")[2].partition("@")[0].lower()


class Trainable:
    """What lora_head or lora_label_scoring trains on a model, in place: LoRA, head, token vectors.

    `parameters` are exactly these, by name; everything else of the model is frozen.
    """

    def __init__(self, model: Qwen, record: dict, run: Path):
        """Start from the seed, or from the last checkpoint in the directory `run` of `record`."""
        args = argparse.Namespace(**record["arguments"])
        found = checkpoints(run)
        self.checkpoint = checkpoint = found[-1][1] if found else None
        self.model, self.base_hash = model, record["base_fingerprint"]
        self.kept = {key: record[key] for key in KEPT if key in record}  # an older run has less
        self.parts = parts_of(record["method"], record["arguments"])
        torch.manual_seed(args.seed)
        weight, words = None, self.parts.head is None
        targets = tuple(args.lora_targets.split(","))
        if (names := TARGETS.get(args.lora_targets)) is not None:  # those that this model has
            targets = tuple(name for name in names if lora.targeted(model, [name]))
        numbers = (args.r, args.alpha, args.dropout)
        try:
            task_type = "CAUSAL_LM" if words else "SEQ_CLS"
            self.config = lora.LoRAConfig(*numbers, targets, args.rslora, task_type, args.model)
            if self.parts.lora and not checkpoint:
                lora.inject_lora(model, targets, *numbers, args.rslora)
        except lora.LoRAError as error:
            raise UserError(str(error)) from None
        if self.parts.lora and checkpoint:
            # The config in the checkpoint has the run's dropout.
            weight = attach_adapter(model, checkpoint / ADAPTER, record, "", self.parts.vectors)
        self.parameters = lora.lora_parameters(model)
        self.vectors, self.vectors_before = {}, {}
        if self.parts.vectors:
            from qwen_min.lab import token_vectors

            self.vectors_before = token_vectors.token_vectors(model, words)
            self.vectors = token_vectors.unfreeze(model, words)
            if checkpoint:
                token_vectors.load(checkpoint / VECTORS, model, words, self.base_hash)
            self.parameters |= self.vectors
        self.weight: nn.Parameter | None = None
        if not words:
            # Small random values, as transformers starts its classifiers; fp32 whatever the base's.
            drawn = torch.randn(len(record["labels"]), model.config.hidden_size) * 0.02
            if checkpoint and weight is None:
                weight = load_head(checkpoint / HEAD).weight
            self.weight = nn.Parameter((drawn if weight is None else weight).to(model.device))
            self.parameters["score"] = self.weight

    @property
    def head(self) -> LinearHead | None:
        """The head as it is now; None where label words score."""
        return None if self.weight is None else final_head(self.model, self.weight.detach())

    def save(self, directory: Path) -> None:
        """Write all parts."""
        if self.parts.lora:
            metadata = self.kept | ({"token_vectors": VECTORS} if self.vectors else {})
            head = self.weight if self.parts.head == "adapter" else None
            lora.save_adapter(directory / ADAPTER, self.model, self.config, head, metadata)
        if self.parts.head == "file":
            save_head(directory / HEAD, self.head)
        if self.vectors:
            from qwen_min.lab import token_vectors

            token_vectors.write(directory / VECTORS, self.vectors, self.base_hash)

    def publish(self, checkpoint: Path, run: Path, task: Task) -> None:
        """Copy the parts from a checkpoint into the run directory: they are the run's result."""
        if self.parts.lora:
            publish(checkpoint / ADAPTER, run / ADAPTER)
            write_json(run / ADAPTER / PROMPT_FILE, prompt_fields(task))
        for name in [HEAD] * (self.parts.head == "file") + [VECTORS] * bool(self.vectors):
            write_atomically(run / name, (checkpoint / name).read_bytes())

    def movement(self, run: Path, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> dict | None:
        """How far the published token vectors moved, printed as a table; None if none are trained.

        prompts: those trained on.
        """
        if not self.vectors:
            return None
        from qwen_min.lab import token_vectors

        token_vectors.load(run / VECTORS, self.model, self.parts.head is None, self.base_hash)
        moved = token_vectors.movements(self.vectors_before, self.vectors, tokenizer, prompts)
        print(token_vectors.format_movements(moved))
        return moved
