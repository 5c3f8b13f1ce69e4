"""Documents keep to what the code says: keys, make targets and links of all; errors and variables of docs/gpu.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nemo_rl.config import ENVIRONMENT, leaf_keys
from nemo_rl.refit.device import MULTICAST_OFF

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
KEY = r"\b(?:policy|grpo|loss_fn|cluster|data|start_model|logger)\.[a-z_]+(?:\.[a-z_]+)*(?!\.?\w)"
TEXT = (ROOT / "docs" / "gpu.md").read_text()
CODE = "\n".join(path.read_text() for path in (ROOT / "nemo_rl").rglob("*.py"))
JOINED = re.sub(r'"\s*\n\s*f?"', "", CODE)  # strings that go over lines


def errors() -> list[str]:
    rows = TEXT[TEXT.index("## When something says no") :].splitlines()
    return [words for row in rows if row.startswith("| `") for words in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_every_error_of_the_table_is_one_of_the_code() -> None:
    assert len(errors()) > 15
    assert [words for words in errors() if words not in JOINED] == []


def test_every_variable_is_told() -> None:
    names = [*ENVIRONMENT, "NRL_XFERDTENSOR_GOLDEN", *(f"{name}={value}" for name, value in MULTICAST_OFF.items())]
    assert [name for name in names if name not in TEXT] == []


def test_every_file_of_a_link_or_a_command_is_there() -> None:
    links = [ROOT / "docs" / path for path in re.findall(r"\]\(([^)#:]+)\)", TEXT)]
    named = [ROOT / path for path in re.findall(r"\b(?:examples|scripts|requirements)/[\w/.]+\.\w+", TEXT)]
    named += [ROOT / "examples" / "configs" / name for name in re.findall(r"`(grpo_\w+\.yaml)`", TEXT)]
    assert len(links) > 2 and len(named) > 5 and [p for p in (*links, *named) if not p.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_target_and_link_is_there(page: Path) -> None:
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    known = {key.rsplit(".", depth)[0] for key in leaf_keys() for depth in range(5)} | set(leaf_keys())
    assert set(re.findall(KEY, text)) - known - {"grpo.sbatch"} == set()
    commands = "\n".join(re.findall(r"`+[^`]*`+", text))
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", commands)) <= targets
    assert [path for path in re.findall(r"\]\(([^)#:]+)\)", text) if not (page.parent / path).exists()] == []


def test_a_wrong_key_of_a_page_is_seen() -> None:
    assert re.findall(KEY, "`policy.refit.transprt=auto`, see grpo.") == ["policy.refit.transprt"]
    assert len(set(re.findall(KEY, PAGES[0].read_text()))) > 10
