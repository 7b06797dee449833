"""A run's result as a checkpoint for other programs: `train.py --export DIR`."""

from pathlib import Path
from shlex import quote

from lora import merge_lora
from qwen_min.command import cli
from qwen_min.command.classifier import Source
from qwen_min.command.finite import dtype_name
from qwen_min.command.trained import PROMPT_FILE, load_parts, prompt_fields
from qwen_min.config import QWEN3_5
from qwen_min.errors import UserError
from qwen_min.files.run import ADAPTER
from qwen_min.files.weights import save_model

ARCHITECTURES = {"qwen2": "Qwen2", "qwen3": "Qwen3", QWEN3_5: "Qwen3_5Text"}  # in transformers


def export(source: Source, run: Path) -> int:
    """Write base, LoRA and token vectors as one checkpoint, and print how to use it.

    lora_label_scoring: a causal language model. lora_head: transformers' classifier of this
    architecture, with the head in the base's dtype when transformers loads it. Raises UserError if
    no token can fill up its batches.
    """
    if (ranks := cli.ranks()) and ranks.rank:  # the first process alone writes it
        return 0
    args, model, task, out = source.args, source.base(), source.task, source.args.export
    head = load_parts(model, run, run / ADAPTER, source.parts, source.record)
    merge_lora(model)
    weight, changes = None, {PROMPT_FILE: prompt_fields(task)}
    # Scores depend on these, so they are given in full, defaults included.
    given = {"model": out} | {name: vars(args)[name] for name in ("labels", "template", "system")}
    given = [f"--{name} {quote(str(v))}" for name, v in given.items() if v is not None]
    given += ["--chat"] * args.chat + [f"--max-text-tokens {args.max_text_tokens}"]
    use = f"a causal language model; here it is used with {' '.join(given)}"
    if (dtype := dtype_name(model)) != "float32":
        use += f" (rounded to {dtype}, so scores differ a little; not after training in float32)"
    if head is not None:
        # transformers pools at the last token that is not this one, which fills up a batch.
        ends = task.whole_template().endswith
        pad = next((token for token in task.tokenizer.markup if not ends(token)), None)
        if pad is None:
            found = "the tokenizer has no special token to fill a batch, but the template's last"
            raise UserError(f"--export: {found}; end the template in another way")
        weight, names = head.weight, dict(enumerate(task.labels))
        architecture = f"{ARCHITECTURES[task.config.model_type]}ForSequenceClassification"
        use = f'{architecture}, for pipeline("text-classification", model={str(out)!r})'
        config = {"architectures": [architecture], "pad_token_id": task.tokenizer.markup[pad]}
        config |= {"id2label": names, "label2id": {name: y for y, name in names.items()}}
        changes["config.json"] = config
        changes["tokenizer_config.json"] = {"pad_token": pad, "padding_side": "right"}
        changes["special_tokens_map.json"] = {"pad_token": pad}  # goes before tokenizer_config.json
    save_model(model, task.directory, out, changes, weight)
    print(f"{out}: {use}; {PROMPT_FILE} says how to make its input")
    return 0
