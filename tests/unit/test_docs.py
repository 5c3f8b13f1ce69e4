"""docs/gpu.md keeps to what the code says: errors by their words, every variable, every file that it names."""

from __future__ import annotations

import re
from pathlib import Path

from nemo_rl.config import ENVIRONMENT
from nemo_rl.refit.device import MULTICAST_OFF

ROOT = Path(__file__).parents[2]
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
