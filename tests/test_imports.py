"""Who may import whom, and what may stand at the top: read from the source, nothing is run.

Each rule is also broken once, on a copy in memory, to see that it would be noticed.
"""

import ast
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

# The rooms of DESIGN: who may import whom directly. What is not listed is forbidden.
MECHANICS = (
    "config",
    "delta_rule",
    "model",
    "tokenizer",
    "prompt",
    "scoring",
    "head",
    "metrics",
    "training",
)
MAY_IMPORT = {
    "mechanics": {"mechanics"},
    "fast": {"mechanics", "fast"},
    "files": {"mechanics", "files"},
    "lab": {"mechanics", "fast", "files", "lab", "terminal"},
    "report": {"mechanics", "files", "report", "terminal", "cli"},
    "terminal": set(),
    "cli": {"mechanics", "fast", "terminal"},  # the exception class; how memory is kept
    "command": {"mechanics", "fast", "files", "lab", "command", "terminal", "cli", "lora"},
    "tiny": {"mechanics", "fast", "files", "cli"},
    "lora": {"lora"},
    "entry": {"report", "command"},  # qwen_min/__init__.py, audit.py and predict.py
    "scripts": {"mechanics", "fast", "files", "lab", "command", "terminal", "cli", "lora"},
}
# Of these a module imports some others of its own room, in this order only.
CHAINS = (
    ("config", "model", "scoring"),
    ("tokenizer", "prompt", "head"),
    ("metrics", "head", "training"),
)
# What is about text reaches nothing that is about the model.
TEXT, MODEL = ("tokenizer", "prompt", "metrics"), ("config", "delta_rule", "model")
COMMANDS = ("train", "evaluate")
# What a module may import beyond the standard library.
ONLY = {
    "qwen_min.metrics": {"numpy"},
    "lora.layer": {"torch", "lora.inject"},
    "lora.inject": {"torch", "lora.layer"},
}
# They run code that stands in the file, or hide an import from this test.
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}
UNSAFE_NAMES = {"torch.load", "torch.save", "torch.jit.load", "torch.jit.save", "__import__"}
UNSAFE_PREFIXES = ("torch.serialization.", "torch.package.", "importlib.import_module")
TOP = {"README.md", "requirements.txt", "qwen_min", "lora", "train.py", "evaluate.py", "tests"}


def project() -> dict[str, str]:
    """Module name → source, for everything but the tests."""
    paths = [*REPO.glob("*.py"), *REPO.glob("qwen_min/**/*.py"), *REPO.glob("lora/**/*.py")]
    modules = {}
    for path in paths:
        parts = path.relative_to(REPO).with_suffix("").parts
        modules[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return modules


@cache
def read(source: str) -> tuple[frozenset[str], frozenset[str]]:
    """Every import in `source`, wherever it stands, and every dotted name that it uses.

    Of `from a import b` both a and a.b are imports. A name's first part is replaced by what it was
    imported as: `t.load` is torch.load after `import torch as t`.
    """
    imports, stands_for, names = set(), {}, set()
    nodes = list(ast.walk(ast.parse(source)))
    for node in nodes:
        if isinstance(node, ast.Import):
            imports |= {alias.name for alias in node.names}
            stands_for |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            imports |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
            stands_for |= {a.asname or a.name: f"{origin}.{a.name}" for a in node.names}
    for node in nodes:
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            names.add(".".join([stands_for.get(node.id, node.id), *reversed(parts)]))
    return frozenset(imports), frozenset(names | set(stands_for.values()))


def reachable(edges: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """For each module all that it imports, directly or through others."""
    reach = {}
    for module in edges:
        seen, waiting = set(), list(edges[module])
        while waiting:
            if (step := waiting.pop()) not in seen:
                seen.add(step)
                waiting += edges[step]
        reach[module] = seen
    return reach


def room(module: str) -> str:
    """The room of a module of the project."""
    top, _, rest = module.partition(".")
    if top == "lora":
        return "lora"
    if top != "qwen_min":
        return "scripts"
    if rest in (*MECHANICS, "errors"):
        return "mechanics"
    if rest in ("command.terminal", "command.cli"):
        return rest.removeprefix("command.")
    return rest.partition(".")[0] if rest not in ("", "audit", "predict") else "entry"


def imported_at_top(source: str) -> set[str]:
    """The modules that importing `source` imports at once."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def broken_rules(sources: Mapping[str, str]) -> list[str]:
    """One line for each rule that the project, module name → source, breaks."""
    imported = {module: read(source)[0] for module, source in sources.items()}
    # A package's __init__ holds no code that others use, so it is no way from one room to another.
    packages = {"qwen_min", *(f"qwen_min.{name}" for name in MAY_IMPORT)}
    edges = {m: (found & sources.keys()) - packages for m, found in imported.items()}
    direct = {
        module: {name for name in imported_at_top(source) if name in sources} - packages
        for module, source in sources.items()
    }
    reach = reachable(direct)
    broken = [f"{module} imports itself in a circle" for module in reach if module in reach[module]]
    for module, found in edges.items():
        for other in found:
            if room(other) not in MAY_IMPORT[room(module)]:
                broken.append(f"{module} ({room(module)}) imports {other} ({room(other)})")
    for module, source in sources.items():
        if room(module) in ("scripts", "command") and any(
            name.startswith("qwen_min.lab") for name in imported_at_top(source)
        ):
            broken.append(f"{module} imports the lab before it is asked for")
    for file in sources:
        parts = file.split(".")
        if parts[0] == "qwen_min" and len(parts) == 2 and room(file) not in (*MAY_IMPORT,):
            broken.append(f"{file} belongs to no room")

    def keep_apart(module: str, *forbidden: str) -> None:
        for other in forbidden:
            if other in reach.get(module, ()):
                broken.append(f"{module} reaches {other}")

    for chain in CHAINS:
        chain = [f"qwen_min.{name}" for name in chain]
        for i, module in enumerate(chain):
            keep_apart(module, *chain[i + 1 :])
    for name in TEXT:
        keep_apart(f"qwen_min.{name}", *(f"qwen_min.{other}" for other in MODEL))

    for module, found in imported.items():
        tops = {name.partition(".")[0] for name in found}
        for other in {*COMMANDS} & tops - {module}:
            broken.append(f"{module} imports {other}")
        if "tests" in tops:
            broken.append(f"{module} imports the tests")
        if "" in tops:  # which module a dot means is left to the reader, and to this one
            broken.append(f"{module} imports by a relative name")
        if module in ONLY:
            # Of a permitted package its parts too, and `lora` itself on the way to `lora.layer`.
            for name in found - {"lora"}:
                if name.partition(".")[0] not in sys.stdlib_module_names and not any(
                    f"{name}.".startswith(f"{permitted}.") for permitted in ONLY[module]
                ):
                    broken.append(f"{module} imports {name}")
        for unsafe in UNSAFE_MODULES & tops:
            broken.append(f"{module} imports {unsafe}")
        for name in read(sources[module])[1]:
            if name in UNSAFE_NAMES or name.startswith(UNSAFE_PREFIXES):
                broken.append(f"{module} uses {name}")
    return broken


def test_the_project_keeps_the_rules():
    sources = project()
    assert {"evaluate", "qwen_min.model", "qwen_min.metrics", "lora.layer"} <= sources.keys()
    assert broken_rules(sources) == []


@pytest.mark.parametrize(
    ("module", "line", "seen"),
    [
        ("qwen_min.metrics", "import torch", "qwen_min.metrics imports torch"),
        ("qwen_min.metrics", "from scipy.special import softmax", "imports scipy.special"),
        ("qwen_min.metrics", "from qwen_min.errors import UserError", "imports qwen_min.errors"),
        ("lora.layer", "import safetensors.torch", "lora.layer imports safetensors.torch"),
        (
            "lora.inject",
            "from lora.adapter import save_adapter",
            "lora.inject imports lora.adapter",
        ),
        ("lora.layer", "from lora.inject import inject_lora", "lora.layer imports itself"),
        ("lora.adapter", "import qwen_min.errors", "(lora) imports qwen_min.errors (mechanics)"),
        ("qwen_min.scoring", "def f():\n    import lora.layer", "(mechanics) imports lora.layer"),
        ("evaluate", "def f():\n    import train", "evaluate imports train"),
        ("train", "from evaluate import main", "train imports evaluate"),
        ("qwen_min.command.cli", "import evaluate", "qwen_min.command.cli imports evaluate"),
        ("lora.adapter", "from train import main", "lora.adapter imports train"),
        ("qwen_min.files.data", "from tests.conftest import CORPUS", "imports the tests"),
        ("qwen_min.config", "from qwen_min.model import Qwen", "config reaches qwen_min.model"),
        ("qwen_min.model", "from .config import QwenConfig", "imports by a relative name"),
        ("qwen_min.model", "from qwen_min.fast import kernels", "imports qwen_min.fast.kernels"),
        ("qwen_min.head", "import qwen_min.files.probe", "imports qwen_min.files.probe (files)"),
        ("qwen_min.training", "import qwen_min.command.cli", "(mechanics) imports"),
        ("qwen_min.prompt", "import qwen_min.config", "prompt reaches qwen_min.config"),
        ("qwen_min.tokenizer", "import qwen_min.prompt", "tokenizer reaches qwen_min.prompt"),
        ("qwen_min.fast.packed", "import qwen_min.files.weights", "(fast) imports"),
        ("qwen_min.fast.features", "import lora.layer", "(fast) imports lora.layer"),
        ("qwen_min.files.run", "import qwen_min.fast.batching", "(files) imports"),
        ("qwen_min.lab.calibration", "import qwen_min.command.task", "(lab) imports"),
        ("qwen_min.report.audit", "import qwen_min.fast.packed", "(report) imports"),
        ("qwen_min.report.compare", "import qwen_min.lab.chat", "(report) imports"),
        ("qwen_min.command.task", "import qwen_min.report.audit", "(command) imports"),
        ("qwen_min.command.task", "import qwen_min.lab.chat", "before it is asked for"),
        ("evaluate", "from qwen_min.lab.explain import explain_head", "before it is asked for"),
        ("qwen_min.extra", "", "qwen_min.extra belongs to no room"),
        ("qwen_min.files.run", "import pickle", "qwen_min.files.run imports pickle"),
        ("qwen_min.files.run", "from joblib import dump", "qwen_min.files.run imports joblib"),
        ("train", "import torch\ntorch.save(1, 'x')", "train uses torch.save"),
        ("train", "import torch as t\nx = t.load('x')", "train uses torch.load"),
        ("train", "from torch import load", "train uses torch.load"),
        ("train", "import torch.serialization as s\ns.load('x')", "uses torch.serialization.load"),
        ("train", "from importlib import import_module", "train uses importlib.import_module"),
        ("train", "__import__('pickle')", "train uses __import__"),
    ],
)
def test_a_broken_rule_is_seen(module, line, seen):
    sources = {"train": "", **project()}
    sources[module] = f"{sources.get(module, '')}\n{line}\n"
    assert any(seen in found for found in broken_rules(sources))


def test_the_top_level_holds_the_allowed_names_alone():
    if (REPO / ".git").exists():
        # The setting lets another user than the owner of the checkout ask.
        command = ["git", "-c", f"safe.directory={REPO}", "ls-files", "-z"]
        listed = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True)
        files = listed.stdout.split("\0")
    else:  # unpacked from an archive; what has been made since is not of the project
        made = {"__pycache__", "runs", "results"}
        files = [path.name for path in REPO.iterdir() if path.name not in made]
    visible = {file.partition("/")[0] for file in files if file and not file.startswith(".")}
    assert {"evaluate.py", "qwen_min", "lora", "tests"} <= visible
    assert visible <= TOP | {"LICENSE"}
