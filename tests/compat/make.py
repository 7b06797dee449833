"""Make the files in this directory with an older version of the program, commit fe28c7e.

    git clone . /tmp/old && git -C /tmp/old checkout fe28c7e
    python tests/compat/make.py /tmp/old

The argument is a checkout of that commit. Everything here except this script and README.md
is deleted and made again. Every path that is recorded is relative. `--dtype float32` is used
everywhere, because only then can scores be compared to 1e-5.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
COMMIT = "fe28c7e"
KEPT = ("make.py", "README.md")
SMALL_LORA = ["--lora-targets", "q_proj,v_proj", "--r", "2", "--alpha", "4"]
# Large steps, so that the trained tensors move much further than the test's tolerance.
TRAIN = ["--data", "train.tsv", "--dtype", "float32", "--epochs", "1", "--lr", "0.01"]
NEWS = ["--model", "base", "--labels", "体育,财经,科技", "--template", "新闻：{text}\\n类别："]
NEWS_ROWS = [
    (
        "体育",
        ["主队在最后一分钟进球，赢了比赛。", "她打破了百米全国纪录。", "教练赛后批评了裁判。"],
    ),
    ("体育", ["奥运会明天开幕。", "这名后卫转会到了另一家俱乐部。", "决赛门票一小时内卖完。"]),
    ("财经", ["央行宣布降低利率。", "股市今天下跌了百分之二。", "这家银行公布了季度利润。"]),
    ("财经", ["油价连续三周上涨。", "公司计划明年上市。", "出口额比去年增加了一成。"]),
    ("科技", ["新手机的电池更耐用。", "研究人员发布了一个开源模型。", "卫星成功进入轨道。"]),
    ("科技", ["这款芯片功耗更低。", "软件更新修复了漏洞。", "机器人学会了叠衣服。"]),
]


def main() -> None:
    """Make everything, in the order in which later files need earlier ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help=f"a checkout of {COMMIT}")
    old = parser.parse_args().old.resolve()
    head = ["git", "-C", str(old), "rev-parse", "HEAD"]
    if not subprocess.check_output(head, text=True).startswith(COMMIT):
        sys.exit(f"{old} is not a checkout of {COMMIT}")
    for path in HERE.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    make_data(old)
    make_base()
    train(old, "head_only")
    train(old, "head_only", "--layer", "best", "--pooling", "mean", name="probe_best_mean")
    train(old, "lora_head", *SMALL_LORA)
    label_lora = [*SMALL_LORA, "--rslora", "--labels", "不太满意,非常满意"]
    train(old, "lora_label_scoring", *label_lora, "--max-text-tokens", "24")
    adapter = ["--adapter", "runs/lora_label_scoring/adapter"]
    train(old, "head_only", *adapter, name="probe_adapted")
    news = [*NEWS, "--data", "news.jsonl", "--train-embeddings", "--lora-targets"]
    train(old, "lora_head", *news, "q_proj,up_proj", "--r", "2", name="news_head")
    train(old, "lora_label_scoring", *news, "none", name="news_vectors")
    make_peft_adapter(old)

    for run in sorted(path.name for path in (HERE / "runs").iterdir()):
        data = "news.jsonl" if run.startswith("news") else "test.tsv"
        evaluate(old, "--run", f"runs/{run}", "--data", data)
    test = ["--data", "test.tsv"]
    evaluate(old, "--method", "transplanted_head", "--run", "runs/lora_head", *test)
    evaluate(old, "--run", "runs/lora_label_scoring", "--labels", "差,好", *test)
    more = ["--label-sets", "差,好;不太满意,非常满意", "--calibrate", "--train-data", "train.tsv"]
    evaluate(old, "--method", "zero_shot", *test, *more, name="zero_shot")
    evaluate(old, "--method", "zero_shot_generate", *test, name="zero_shot_generate")
    evaluate(old, "--method", "zero_shot", *NEWS, "--data", "news.jsonl", name="news_zero_shot")
    peft = ["--method", "lora_label_scoring", "--adapter", "peft_adapter"]
    evaluate(old, *peft, *test, name="peft_adapter")

    compared = ["runs/head_only", "runs/probe_adapted", "runs/lora_head", "zero_shot.json"]
    compared += ["zero_shot_generate.json", "peft_adapter.json"]
    report = ["-m", "qwen_min.report"]
    run_old(old, *report, *compared, "--output", "report.txt")
    run_old(old, *report, *compared, "--format", "markdown", "--output", "report.md")
    run_old(old, *report, *compared[-3:], "--format", "json", "--output", "report.json")

    # The first has evaluated before the stop and uses dropout; the second does neither.
    stop(old, "lora_head", "--lora-targets", "q_proj,v_proj", "--eval-every", "4")
    more = ["--lora-targets", "v_proj", "--eval-every", "100", "--dropout", "0"]
    stop(old, "lora_label_scoring", *more)
    print(sum(path.stat().st_size for path in HERE.rglob("*") if path.is_file()), "bytes")


def run_old(old: Path, *command: str) -> None:
    """Run a Python command of the old program in this directory."""
    subprocess.run([sys.executable, *command], cwd=HERE, env=environment(old), check=True)


def environment(old: Path) -> dict[str, str]:
    """The old program's modules, one thread, no files beside its source."""
    return {"PYTHONPATH": str(old), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def train(old: Path, method: str, *more: str, name: str | None = None) -> None:
    """Train a run, and remove what an evaluation does not need."""
    run = HERE / "runs" / (name or method)
    output = ["--output", f"runs/{run.name}"]
    run_old(old, str(old / "train.py"), "--method", method, *TRAIN, *more, *output)
    for unused in ("features", "checkpoints"):
        shutil.rmtree(run / unused, ignore_errors=True)


def evaluate(old: Path, *args: str, name: str | None = None) -> None:
    """Evaluate; without `name` (of results and predictions) the files go into the run."""
    if name:
        args += ("--output", f"{name}.json", "--predictions", f"{name}.predictions.jsonl")
        args += ("--dtype", "float32")
    run_old(old, str(old / "evaluate.py"), *args)


def stop(old: Path, method: str, *more: str) -> None:
    """Stop a run by SIGINT, keep it, let the old program resume a copy, and keep the result."""
    run, copy = HERE / "unfinished" / method, HERE / "resumed"
    more += ("--r", "1", "--epochs", "3", "--lr", "0.001")
    command = [sys.executable, str(old / "train.py"), "--method", method, *TRAIN, *more]
    command += ["--output", f"unfinished/{method}"]
    process = subprocess.Popen(command, cwd=HERE, env=environment(old))
    while not (run / "log.jsonl").exists() or (run / "log.jsonl").read_text().count("\n") < 5:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 128 + signal.SIGINT
    shutil.copytree(run, copy)
    run_old(old, str(old / "train.py"), "--resume", "--output", "resumed")
    expected = HERE / "expected" / method
    expected.mkdir(parents=True)
    for kept in ("run.json", "log.jsonl"):
        shutil.copy(copy / kept, expected / kept)
    (last,) = (copy / "checkpoints").glob("step-15")  # 36 training rows, 8 in a step, 3 epochs
    tensors = load_file(last / "adapter/adapter_model.safetensors")
    save_file(tensors, expected / "last.safetensors")
    shutil.rmtree(copy)


def make_data(old: Path) -> None:
    """Rows of the embedded sample; two rows of test.tsv are in train.tsv too; and news.jsonl."""
    header, *training = (old / "qwen_min/sample/train.tsv").read_text("utf-8").splitlines()
    _, *test = (old / "qwen_min/sample/test.tsv").read_text("utf-8").splitlines()
    for name, rows in (("train", training[:40]), ("test", training[:2] + test[:28])):
        (HERE / f"{name}.tsv").write_text("\n".join([header, *rows]) + "\n", "utf-8")
    rows = [{"label": label, "text": text} for label, texts in NEWS_ROWS for text in texts]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (HERE / "news.jsonl").write_text("".join(lines), "utf-8")


def make_base() -> None:
    """A Qwen3 checkpoint so small that its trained token vectors can be kept; all values random."""
    base = HERE / "base"
    base.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text for _, texts in NEWS_ROWS for text in texts], trainer)
    markup = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in markup])
    tokenizer.save(str(base / "tokenizer.json"))

    d, heads, kv_heads, head_dim, mlp, vocab, layers = 16, 2, 1, 12, 24, 304, 2
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "vocab_size": vocab,
        "hidden_size": d,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "attention_bias": False,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (base / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    shapes = {"model.embed_tokens": (vocab, d), "model.norm": (d,)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm": (d,),
            f"{layer}.self_attn.q_proj": (heads * head_dim, d),
            f"{layer}.self_attn.k_proj": (kv_heads * head_dim, d),
            f"{layer}.self_attn.v_proj": (kv_heads * head_dim, d),
            f"{layer}.self_attn.o_proj": (d, heads * head_dim),
            f"{layer}.self_attn.q_norm": (head_dim,),
            f"{layer}.self_attn.k_norm": (head_dim,),
            f"{layer}.post_attention_layernorm": (d,),
            f"{layer}.mlp.gate_proj": (mlp, d),
            f"{layer}.mlp.up_proj": (mlp, d),
            f"{layer}.mlp.down_proj": (d, mlp),
        }
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator) * 0.3
        tensors[f"{name}.weight"] = (noise + ("norm" in name)).bfloat16()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def make_peft_adapter(old: Path) -> None:
    """An adapter for tiny that PEFT itself writes: without this project's metadata."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(old / "qwen_min/tiny", dtype=torch.float32)
    config = LoraConfig(r=1, lora_alpha=6, target_modules=["k_proj", "o_proj"], bias="none")
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.peft_config["default"].base_model_name_or_path = "tiny"
    model.save_pretrained(HERE / "peft_adapter")
    (HERE / "peft_adapter/README.md").unlink()


if __name__ == "__main__":
    main()
