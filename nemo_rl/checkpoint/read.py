"""Read a checkpoint into what a rank holds, or compare them: each rank reads its own boxes and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from nemo_rl.checkpoint.headers import DTYPES, Entry, read_headers
from nemo_rl.refit.layout import Holding, TensorTable
from nemo_rl.refit.region import Region
from nemo_rl.refit.transports.base import as_bytes


def check(folder: str | Path, table: TensorTable, droppable: Collection[str] = ()) -> list[str]:
    """Everything that keeps the checkpoint in `folder` from being the model of `table`; reads headers only.

    Names missing tensors, tensors that the model does not have, other shapes, dtypes that are no floating-point
    weights, and files that are missing, truncated or damaged. A floating-point dtype other than the table's is none of
    these: values are converted.

    Args:
        droppable: names that may stand beside those of `table`.
    """
    entries, problems = read_headers(folder)
    problems += _mismatches(entries, {fqn: meta.shape for fqn, meta in table.items()}, complete=not problems)
    extra = [name for name in entries if name not in table and name not in droppable]
    if extra:
        problems.append(
            f"{folder}: {len(extra)} tensors that the model does not have: {_some(extra)}; "
            f"check that config.json belongs to these files"
        )
    return problems


def read_into(holdings: Sequence[Holding], folder: str | Path) -> None:
    """Fill every holding's view with its box of the checkpoint, converted to the view's dtype.

    Raises:
        ValueError: before anything is read, all at once: tensors that are missing, do not contain the box or are no
            floating-point weights; missing or damaged files.
    """
    with torch.no_grad():
        for holding, part in _parts(holdings, folder):
            holding.view.copy_(part)


def differences(holdings: Sequence[Holding], folder: str | Path) -> list[str]:
    """Boxes whose bytes are not those of the checkpoint, converted to the view's dtype; each with tensor and counts.

    Raises:
        ValueError: as `read_into`.
    """
    wrong = []
    for holding, part in _parts(holdings, folder):
        held, due = (as_bytes(t.to("cpu").contiguous()) for t in (holding.view, part.to(holding.view.dtype)))
        unequal = (held != due).view(holding.region.volume, -1).any(1) if len(held) else held
        if count := int(unequal.sum()):
            wrong.append(
                f"{holding.fqn} {holding.region}: {count} of {len(unequal)} elements are not those of {folder}"
            )
    return wrong


def _parts(holdings: Sequence[Holding], folder: str | Path) -> Iterator[tuple[Holding, torch.Tensor]]:
    """Every holding with its box of the checkpoint, file by file. Raises ValueError before the first."""
    entries, problems = read_headers(folder)
    ends: dict[str, tuple[int, ...]] = {}
    for holding in holdings:
        known = ends.get(holding.fqn, holding.region.ends)
        ends[holding.fqn] = tuple(map(max, known, holding.region.ends))
    problems += _mismatches(entries, ends, complete=not problems, whole=False)
    if problems:
        raise ValueError(f"checkpoint {folder} refused:\n" + "\n".join(f"  - {p}" for p in problems))
    by_file: dict[Path, list[Holding]] = {}
    for holding in holdings:
        by_file.setdefault(entries[holding.fqn].path, []).append(holding)
    for path, mine in by_file.items():
        with safe_open(path, framework="pt") as file:
            for holding in mine:
                index = holding.region.slices_in(Region.whole(entries[holding.fqn].shape))
                yield holding, file.get_slice(holding.fqn)[index] if index else file.get_tensor(holding.fqn)


def _mismatches(
    entries: dict[str, Entry], shapes: dict[str, tuple[int, ...]], *, complete: bool, whole: bool = True
) -> list[str]:
    """`shapes` against what the files hold; `whole` asks for equal shapes, else for shapes that contain these.

    Missing tensors are named only where the files are `complete`: else it is the files that are missing.
    """
    bad = []
    missing = [fqn for fqn in shapes if fqn not in entries]
    if missing and complete:
        bad.append(f"{len(missing)} tensors are missing: {_some(missing)}; fetch the files again or fix config.json")
    for fqn, shape in shapes.items():
        entry = entries.get(fqn)
        if entry is None:
            continue
        fits = entry.shape == shape if whole else Region.whole(shape).fits(entry.shape)
        if not fits:
            need = "needs" if whole else "reads up to"
            bad.append(f"{fqn}: {entry.path.name} holds shape {entry.shape}, the model {need} {shape}; fix config.json")
        if entry.dtype not in DTYPES:
            bad.append(
                f"{fqn}: {entry.path.name} holds dtype {entry.dtype}, which is none of {', '.join(DTYPES)}; "
                f"use the unquantized checkpoint"
            )
    return bad


def _some(names: Iterable[str], limit: int = 8) -> str:
    listed = list(names)
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")
