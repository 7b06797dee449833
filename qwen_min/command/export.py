"""A run's result as a checkpoint for other programs: `train.py --export DIR`."""

from pathlib import Path

from lora import merge_lora
from qwen_min.command.classifier import Source
from qwen_min.command.task import Task
from qwen_min.command.trained import PROMPT_FILE, load_parts, prompt_fields
from qwen_min.errors import UserError
from qwen_min.files.run import ADAPTER
from qwen_min.files.weights import save_model


def padding(task: Task) -> str:
    """The token that fills a batch: transformers pools at the last token that is another one.

    Raises UserError if every such token could be the last one of a prompt.
    """
    template = task.whole_template()
    for token in ("<|endoftext|>", *task.tokenizer.markup):
        if token in task.tokenizer.markup and not template.endswith(token):
            return token
    found = "no special token of the tokenizer, other than the template's last, can fill a batch"
    raise UserError(f"--export: {found}; end the template in another way")


def export(source: Source, run: Path) -> int:
    """Write base, LoRA and token vectors as one checkpoint, and print how to use it.

    lora_label_scoring: a causal language model. lora_head: transformers' classifier of this
    architecture, with the head in the base's dtype when transformers loads it.
    """
    model, task, out = source.base(), source.task, source.args.export
    head = load_parts(model, run, run / ADAPTER, source.parts, source.record)
    merge_lora(model)
    changes = {PROMPT_FILE: prompt_fields({"template": task.whole_template()} | source.record)}
    if head is None:
        save_model(model, task.directory, out, changes)
        print(f"{out}: base and LoRA, merged; use it with --model {out}")
        print(f"elsewhere it is a causal language model; {PROMPT_FILE} says how to make its input")
        return 0
    architecture = f"{task.config.model_type.capitalize()}ForSequenceClassification"
    pad, names = padding(task), dict(enumerate(task.labels))
    config = {"architectures": [architecture], "problem_type": "single_label_classification"}
    config |= {"id2label": names, "label2id": {name: y for y, name in names.items()}}
    changes["config.json"] = config | {"pad_token_id": task.tokenizer.markup[pad]}
    changes["tokenizer_config.json"] = {"pad_token": pad, "padding_side": "right"}
    changes["special_tokens_map.json"] = {"pad_token": pad}  # goes before tokenizer_config.json
    save_model(model, task.directory, out, changes, head.weight)
    plain = ", add_special_tokens=False" * bool(task.tokenizer.required)  # the template has them
    print(f"{out}: {architecture}; {PROMPT_FILE} says how to make its input")
    print("    from transformers import pipeline")
    print(f'    classify = pipeline("text-classification", model={str(out)!r})')
    print(f'    classify({task.whole_template()!r}.replace("{{text}}", text){plain})')
    return 0
