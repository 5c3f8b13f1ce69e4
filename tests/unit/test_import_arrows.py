"""The folders' import arrows, read from the syntax trees of all files."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nemo_rl"
STDLIB = sys.stdlib_module_names

# Folder or module -> parts of nemo_rl that it may import, besides itself.
ARROWS = {
    "refit": set(),
    "checkpoint": {"refit"},
    "trainer": {"refit", "checkpoint"},
    "generator": {"refit", "checkpoint"},
    "schema": set(),
    "config": {"schema"},
    "metrics": set(),
    "grpo": {"refit", "schema"},
    "preflight": {"config", "schema", "topology", "checkpoint", "grpo", "refit", "trainer", "generator"},
    "planview": {"refit", "trainer", "generator"},
    "cli": {"config", "schema", "generator", "planview", "preflight", "topology", "trainer"},
    "driver": {"actors", "cluster", "config", "schema", "grpo", "metrics", "preflight", "topology"},
    "topology": {"schema", "trainer"},
    "cluster": {"schema", "refit", "topology"},
    "actors": {"schema", "topology", "cluster", "refit", "grpo", "trainer", "generator"},
}
# External package -> the only parts of nemo_rl that may import it.
ONLY = {
    "megatron": {"trainer"},
    "vllm": {"generator"},
    "ray": {"cluster", "actors", "trainer", "generator"},
    "hydra": {"config"},
    "omegaconf": {"config"},
    "rich": {"metrics", "driver", "planview", "cli"},
    "matplotlib": {"metrics", "planview"},
}
REFIT_MAY = {"torch", "numpy", "nemo_rl", "triton", "cuda", "nccl"}  # the last three where there are GPUs


def imports_of(source: str, path: Path) -> list[tuple[int, str]]:
    """(line, absolute module) of every import statement, nested ones too; relative ones resolved."""
    found = []
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                base = ".".join([*parents, base] if base else parents)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def violations(source: str, path: Path) -> list[str]:
    part, out = part_of(path), []
    for line, module in imports_of(source, path):
        where, names = f"{path.relative_to(ROOT)}:{line}", module.split(".")
        top = names[0]
        if top == "nemo_rl":
            target = names[1] if len(names) > 1 else ""
            if target != part and target not in ARROWS.get(part, set()):
                out.append(f"{where}: {part} must not import nemo_rl.{target}")
        elif part not in ONLY.get(top, {part}):
            out.append(f"{where}: only {', '.join(sorted(ONLY[top]))} may import {top}")
        elif part == "refit" and top not in STDLIB and top not in REFIT_MAY:
            out.append(f"{where}: refit imports only torch, numpy and what comes with torch, not {top}")
    return out


def test_every_file_follows_the_arrows() -> None:
    files = [p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"]
    assert len(files) > 20
    assert not [v for path in files for v in violations(path.read_text(), path)]


def test_every_part_has_arrows() -> None:
    parts = {part_of(p) for p in PACKAGE.rglob("*.py")} - {"__init__"}
    assert parts <= set(ARROWS)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("trainer/x.py", "from nemo_rl.generator import engine"),
        ("generator/x.py", "import nemo_rl.trainer.model"),
        ("generator/x.py", "from nemo_rl import trainer"),
        ("generator/x.py", "from ..trainer import model"),
        ("refit/x.py", "import ray"),
        ("refit/transports/x.py", "def f():\n    from nemo_rl.config import Config"),
        ("refit/x.py", "import safetensors.torch"),
        ("grpo/x.py", "from vllm import LLM"),
        ("grpo/x.py", "import megatron.core"),
        ("checkpoint/x.py", "from nemo_rl.trainer import model"),
        ("cluster.py", "import omegaconf"),
    ],
)
def test_a_planted_arrow_is_caught(file: str, line: str) -> None:
    assert violations(line, PACKAGE / file)


def test_the_environment_is_read_in_one_place() -> None:
    """`os.environ` and `os.getenv` stand in config.py alone, but for what torch takes from the environment only."""
    readers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                readers.add(str(path.relative_to(PACKAGE)))
    assert readers <= {"config.py", "refit/transports/own_nccl.py"}
