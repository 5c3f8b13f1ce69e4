"""What safetensors files say of themselves, read without touching their data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

INDEX = "model.safetensors.index.json"

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes of weights that can be read; values are converted to the dtype of the reader."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a checkpoint; `dtype` is safetensors' name of it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


def read_headers(folder: str | Path) -> tuple[dict[str, Entry], list[str]]:
    """Entries of all tensors of a folder, and everything that is wrong with its files, with the remedy."""
    paths, problems = _files(Path(folder))
    entries: dict[str, Entry] = {}
    for path in paths:
        try:
            entries |= _read_header(path)
        except (OSError, ValueError) as error:
            problems.append(f"{path}: {error}; fetch the file again")
    return entries, problems


def _files(folder: Path) -> tuple[list[Path], list[str]]:
    index = folder / INDEX
    if not index.is_file():
        found = sorted(folder.glob("*.safetensors"))
        missing = f"{folder}: no *.safetensors file; point policy.model_name at a Hugging Face checkpoint folder"
        return found, [] if found else [missing]
    try:
        names: Iterable[str] = json.loads(index.read_text())["weight_map"].values()
        paths = [folder / name for name in sorted(set(names))]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return [], [f"{index}: not an index of safetensors files ({type(error).__name__}: {error}); fetch it again"]
    gone = [f"{path} is missing, though {INDEX} names it; fetch the file again" for path in paths if not path.is_file()]
    return [path for path in paths if path.is_file()], gone


def _read_header(path: Path) -> dict[str, Entry]:
    """Raises ValueError where the file is damaged or shorter or longer than its header says."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            raise ValueError(f"truncated: {size} bytes, but the header alone needs {8 + length}")
        try:
            head = json.loads(file.read(length))
            tensors = {name: entry for name, entry in head.items() if name != "__metadata__"}
            due = 8 + length + max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
            found = {n: Entry(path, tuple(map(int, e["shape"])), str(e["dtype"])) for n, e in tensors.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"its header is damaged ({type(error).__name__}: {error})") from error
    if size != due:
        raise ValueError(f"{'truncated' if size < due else 'too long'}: {size} bytes of {due}")
    return found
