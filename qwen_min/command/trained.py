"""What each method trains on top of the base, and how that is saved and loaded.

A run directory, and each of its checkpoints, holds what its method trains:

    adapter/                 LoRA in PEFT's format; of lora_head with its head inside
    head.safetensors         the head of head_only, and of lora_head without LoRA
    embeddings.safetensors   the token vectors, with --train-embeddings
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lora import (
    ATTENTION,
    MLP,
    LoRAConfig,
    LoRAError,
    inject_lora,
    load_adapter,
    lora_modules,
    lora_parameters,
    save_adapter,
)
from qwen_min.command.arguments import UNTRAINED
from qwen_min.command.compute import Classifier
from qwen_min.command.task import Task
from qwen_min.errors import UserError
from qwen_min.files.probe import load_head, save_head
from qwen_min.files.run import publish, write_atomically
from qwen_min.files.weights import checkpoint_fingerprint, load_model
from qwen_min.head import LinearHead
from qwen_min.model import Qwen
from qwen_min.prompt import Prompt
from qwen_min.tokenizer import Tokenizer

TARGETS = {"attention": ATTENTION, "all": (*ATTENTION, *MLP), "none": ()}
ADAPTER, HEAD, VECTORS = "adapter", "head.safetensors", "embeddings.safetensors"


@dataclass(frozen=True)
class Parts:
    """Which parts a method adds to the base, as far as they were asked for."""

    lora: bool
    head: Literal["adapter", "file"] | None  # where the head is kept; None: label words score
    vectors: bool = False  # token vectors


def parts_of(method: str, arguments: Mapping) -> Parts:
    """The parts that a training of `method` with these command-line arguments makes."""
    if method == "head_only":  # its LoRA is not trained, but its head belongs to that LoRA's states
        return Parts(bool(arguments["adapter"]), "file")
    lora = arguments["lora_targets"] != "none"
    head = None if method == "lora_label_scoring" else "adapter" if lora else "file"
    return Parts(lora, head, bool(arguments.get("train_embeddings")))  # older runs lack the last


@dataclass(frozen=True)
class Source:
    """Where the weights of one evaluation come from: its checkpoint, and what was trained on it."""

    args: argparse.Namespace  # method, model, labels, dtype; run or adapter
    task: Task
    device: str
    record: dict | None  # of args.run

    def base(self) -> Qwen:
        """The checkpoint's model, frozen, in eval mode."""
        return load_model(self.task.directory, self.args.dtype, self.device)

    @property
    def parts(self) -> Parts:
        """What was trained: by the run's record, or in the directory of --adapter."""
        if self.args.run:
            return parts_of(self.record["method"], self.record["arguments"])
        return Parts(True, "adapter" if self.args.method == "lora_head" else None)

    @property
    def changes_base(self) -> bool:
        """Whether the method scores with another model than the base."""
        if self.args.method in (*UNTRAINED, "transplanted_head"):
            return False
        return self.parts.lora or self.parts.vectors

    def add_trained(self, model: Qwen) -> LinearHead | None:
        """Put what was trained on a base, in place; returns the head, if there is one.

        Raises UserError where something is missing or does not fit this base or these labels.
        """
        base_hash = checkpoint_fingerprint(self.task.directory)
        if self.record and self.record["base_fingerprint"] != base_hash:
            raise UserError(
                f"{self.args.run}: trained on other weights than those in {self.args.model} (their "
                "fingerprints differ); give the checkpoint that it was trained on by --model"
            )
        directory = Path(self.args.run or self.args.adapter)
        adapter = directory / ADAPTER if self.args.run else directory
        head = load_parts(model, directory, adapter, self.parts, base_hash)
        if head is not None:
            self.check_head(head, model)
        return head

    def check_head(self, head: LinearHead, model: Qwen) -> None:
        """Refuse a head that is for another model, or for other classes than those of --labels."""
        config, labels = model.config, self.task.labels
        fits = head.weight.shape[1] == config.hidden_size
        if not (fits and 0 <= head.layer <= config.num_hidden_layers):
            raise UserError(
                f"the head is for layer {head.layer} of {head.weight.shape[1]} numbers, the model "
                f"in {self.args.model} has {config.num_hidden_layers} layers of "
                f"{config.hidden_size}; give the model that it was trained on"
            )
        if self.record and list(labels) != self.record["labels"]:
            raise UserError(
                f"--labels {self.args.labels}: the head was trained for "
                f"{','.join(self.record['labels'])}; leave --labels out"
            )
        if len(head.weight) != len(labels):
            raise UserError(
                f"--labels names {len(labels)} classes, the trained head has {len(head.weight)}; "
                "name as many"
            )


def load_parts(
    model: Qwen, directory: Path, adapter: Path, parts: Parts, base_hash: str
) -> LinearHead | None:
    """Put the parts in `directory` (LoRA: in `adapter`) on the model, in place; returns the head.

    base_hash: the fingerprint of the model's checkpoint. Raises UserError where a part is missing,
    unreadable, or was trained on other weights.
    """
    weight = None
    if parts.lora:
        weight = attach_adapter(model, adapter, base_hash, vectors=parts.vectors)
        if parts.head != "file" and (weight is not None) != (parts.head == "adapter"):
            found, needed = (
                ("no head", "one") if weight is None else ("a classifier's head", "none")
            )
            raise UserError(f"{adapter}: found {found}, expected {needed}; name another --method")
    if parts.vectors:
        from qwen_min.lab import token_vectors

        token_vectors.load(directory / VECTORS, model, parts.head is None, base_hash)
    if parts.head == "file":
        return load_head(directory / HEAD)
    return None if weight is None else final_head(model, weight.float())


def final_head(model: Qwen, weight: Tensor) -> LinearHead:
    """The head that lora_head trains: on the last token's final state, without bias."""
    return LinearHead(weight, None, model.config.num_hidden_layers, "last")


def attach_adapter(
    model: Qwen,
    directory: Path,
    base_hash: str,
    dropout: float | None = None,
    vectors: bool = False,
) -> Tensor | None:
    """Put the LoRA in `directory` on the model, in place; returns its head (C, D), fp32, or None.

    vectors: whether the caller also loads token vectors that were trained with it. Raises UserError
    for an adapter that cannot be read, or that was trained on other weights. An adapter that PEFT
    wrote does not say on which weights it was trained: that is not checked.
    """
    try:
        _, head, metadata = load_adapter(directory, model, dropout)
    except LoRAError as error:
        raise UserError(str(error)) from None
    if any(name.endswith("lm_head") for name in lora_modules(model)):
        raise UserError(f"{directory}: has a LoRA on lm_head, which stays frozen here; train anew")
    if metadata.get("token_vectors") and not vectors:
        raise UserError(
            f"{directory}: was trained together with the token vectors in its run's "
            f"{metadata['token_vectors']} and means nothing without them; give the run by --run"
        )
    if metadata.get("base_fingerprint", base_hash) != base_hash:
        raise UserError(
            f"{directory}: trained on another base (its fingerprint differs from the model's); "
            "give the checkpoint that it was trained on by --model"
        )
    return head


class Trainable:
    """What lora_head or lora_label_scoring trains on a model, in place: LoRA, head, token vectors.

    `parameters` are exactly these, by name; everything else of the model is frozen.
    """

    def __init__(
        self,
        model: Qwen,
        args: argparse.Namespace,
        labels: Sequence[str],
        base_hash: str,
        checkpoint: Path | None,
    ):
        """checkpoint: one of the same run to continue from; None: start from the seed."""
        self.model, self.base_hash = model, base_hash
        self.parts = parts = parts_of(args.method, vars(args))
        torch.manual_seed(args.seed)
        weight = None
        try:
            targets = TARGETS.get(args.lora_targets, tuple(args.lora_targets.split(",")))
            numbers = (args.r, args.alpha, args.dropout)
            task_type = "CAUSAL_LM" if parts.head is None else "SEQ_CLS"
            self.config = LoRAConfig(*numbers, targets, args.rslora, task_type, str(args.model))
            if parts.lora and not checkpoint:
                inject_lora(model, targets, *numbers, args.rslora)
        except LoRAError as error:
            raise UserError(str(error)) from None
        if parts.lora and checkpoint:
            weight = attach_adapter(
                model, checkpoint / ADAPTER, base_hash, args.dropout, parts.vectors
            )
        self.parameters = lora_parameters(model)
        self.vectors, self.vectors_before = {}, {}
        if parts.vectors:
            from qwen_min.lab import token_vectors

            self.vectors_before = token_vectors.token_vectors(model, parts.head is None)
            self.vectors = token_vectors.unfreeze(model, parts.head is None)
            if checkpoint:
                file = checkpoint / VECTORS
                token_vectors.load(file, model, parts.head is None, base_hash)
            self.parameters |= self.vectors
        self.weight: nn.Parameter | None = None
        if parts.head:
            # Small random values, as transformers starts its classifiers; fp32 whatever the base's.
            drawn = torch.randn(len(labels), model.config.hidden_size) * 0.02
            if checkpoint and weight is None:
                weight = load_head(checkpoint / HEAD).weight
            self.weight = nn.Parameter((drawn if weight is None else weight).to(model.device))
            self.parameters["score"] = self.weight

    @property
    def classifier(self) -> Classifier:
        """What is trained, as it is now: it scores by label words, or by the head."""
        if self.weight is None:
            return Classifier(self.model, "label words")
        return Classifier(self.model, "head", final_head(self.model, self.weight.detach()))

    def save(self, directory: Path) -> None:
        """Write all parts."""
        if self.parts.lora:
            metadata = {"base_fingerprint": self.base_hash}
            if self.vectors:
                metadata["token_vectors"] = VECTORS
            head = self.weight if self.parts.head == "adapter" else None
            save_adapter(directory / ADAPTER, self.model, self.config, head, metadata)
        if self.parts.head == "file":
            save_head(directory / HEAD, self.classifier.head)
        if self.vectors:
            from qwen_min.lab import token_vectors

            token_vectors.write(directory / VECTORS, self.vectors, self.base_hash)

    def publish(self, checkpoint: Path, run: Path) -> None:
        """Copy the parts from a checkpoint into the run directory: they are the run's result."""
        if self.parts.lora:
            publish(checkpoint / ADAPTER, run / ADAPTER)
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
