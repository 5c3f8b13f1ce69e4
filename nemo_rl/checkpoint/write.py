"""Write one Hugging Face checkpoint from what many ranks hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from nemo_rl.checkpoint.headers import INDEX
from nemo_rl.refit.layout import Holding, TensorTable
from nemo_rl.refit.region import Region

Owners = dict[str, list[tuple[Region, int]]]
"""fqn -> its boxes, each with the rank that sends it."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf")


@dataclass(frozen=True, slots=True)
class _Ranks:
    """The ranks of torch.distributed's default group, or the only one there is."""

    rank: int
    size: int

    @classmethod
    def here(cls) -> _Ranks:
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls(0, 1)


def write(
    holdings: Sequence[Holding],
    table: TensorTable,
    folder: str | Path,
    beside: str | Path,
    *,
    file_bytes: int = 2 << 30,
) -> None:
    """Write the tensors of `table` to `folder`, and the configuration and tokenizer files of `beside` with them.

    Every rank of the default process group calls it. Rank 0 writes; it holds the tensors of one file of at most
    `file_bytes` (or one tensor) at a time, and gets each box from the lowest rank that holds it. `config.json` is
    written last, so that a folder that has one is complete.

    Raises:
        ValueError: on every rank: the boxes of all ranks do not cover a tensor exactly once, or `folder` is `beside`.
        OSError: on every rank, where rank 0 could not write.
    """
    target, origin, ranks = Path(folder), Path(beside), _Ranks.here()
    if target.resolve() == origin.resolve():
        raise ValueError(f"{target} is the folder that the model came from; export to another one")
    owners = _owners(holdings, table, ranks)
    mine = {(h.fqn, h.region): h.view for h in holdings}
    names = _file_names(table, file_bytes)
    failure = _begin(target) if ranks.rank == 0 else None
    for name, fqns in names.items():
        tensors = {fqn: _gather(fqn, table, owners[fqn], mine, ranks) for fqn in fqns}
        if ranks.rank == 0 and failure is None:
            failure = _save(tensors, target, name)
    if ranks.rank == 0 and failure is None:
        failure = _finish(target, origin, table, names)
    failure = _broadcast(failure, ranks)
    if failure is not None:
        raise OSError(f"export to {target} failed: {failure}")


def _owners(holdings: Sequence[Holding], table: TensorTable, ranks: _Ranks) -> Owners:
    """Who sends what; every rank comes to the same answer or the same error."""
    said = [(h.fqn, h.region) for h in holdings]
    everyone = [said]
    if ranks.size > 1:
        everyone = [[] for _ in range(ranks.size)]
        dist.all_gather_object(everyone, said)
    first: dict[tuple[str, Region], int] = {}
    for rank, rows in enumerate(everyone):
        for row in rows:
            first.setdefault(row, rank)
    owners: Owners = {fqn: [] for fqn in table}
    unknown = sorted({fqn for fqn, _ in first if fqn not in owners})
    for (fqn, region), rank in first.items():
        if fqn in owners:
            owners[fqn].append((region, rank))
    bad = [f"{fqn}: held, but not a tensor of the model" for fqn in unknown]
    bad += [text for fqn, boxes in owners.items() for text in _uncovered(fqn, [b for b, _ in boxes], table)]
    if bad:
        raise ValueError("export refused: " + "; ".join(bad))
    return owners


def _uncovered(fqn: str, boxes: list[Region], table: TensorTable) -> list[str]:
    """Disjoint boxes inside a tensor cover it exactly when their volumes add up to its own."""
    outside = [box for box in boxes if not box.fits(table[fqn].shape)]
    if outside:
        return [f"{fqn}: box {outside[0]} leaves shape {table[fqn].shape}"]
    for i, box in enumerate(boxes):
        if any(box.intersect(other) is not None for other in boxes[:i]):
            return [f"{fqn}: box {box} overlaps another rank's"]
    held, due = sum(box.volume for box in boxes), Region.whole(table[fqn].shape).volume
    return [] if held == due else [f"{fqn}: the ranks hold {held} of {due} elements"]


def _gather(
    fqn: str,
    table: TensorTable,
    boxes: list[tuple[Region, int]],
    mine: dict[tuple[str, Region], torch.Tensor],
    ranks: _Ranks,
) -> torch.Tensor:
    """The whole tensor on rank 0's CPU; elsewhere an empty one."""
    meta = table[fqn]
    full = torch.empty(meta.shape if ranks.rank == 0 else (0,), dtype=meta.dtype)
    for region, owner in boxes:
        if ranks.rank == owner and owner != 0:
            dist.send(mine[fqn, region].detach().contiguous(), dst=0)
        if ranks.rank == 0:
            part = mine[fqn, region].detach() if owner == 0 else _receive(region, meta.dtype, owner)
            full[region.slices_in(Region.whole(meta.shape))] = part.to("cpu")
    return full


def _receive(region: Region, dtype: torch.dtype, owner: int) -> torch.Tensor:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    part = torch.empty(region.sizes, dtype=dtype, device=device)
    dist.recv(part, src=owner)
    return part


def _file_names(table: TensorTable, file_bytes: int) -> dict[str, list[str]]:
    """File name -> its tensors, in the table's order."""
    groups: list[list[str]] = [[]]
    size = 0
    for fqn, meta in table.items():
        if groups[-1] and size + meta.num_bytes > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(fqn)
        size += meta.num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _begin(target: Path) -> str | None:
    """Make the folder, or make what stands there incomplete."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").unlink(missing_ok=True)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None


def _save(tensors: dict[str, torch.Tensor], target: Path, name: str) -> str | None:
    """Why the file could not be written, or None. The file appears under its name only when it is complete."""
    try:
        partial = target / f"{name}.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(target / name)
    except Exception as error:  # safetensors has an error type of its own for a full disk
        return f"{name}: {type(error).__name__}: {error}"
    return None


def _finish(target: Path, origin: Path, table: TensorTable, names: dict[str, list[str]]) -> str | None:
    """Write the index, copy what stands beside the weights, and write `config.json` last."""
    try:
        for stale in (p for p in target.glob("*.safetensors") if p.name not in names):
            stale.unlink()
        (target / INDEX).unlink(missing_ok=True)
        if len(names) > 1:
            weight_map = {fqn: name for name, fqns in names.items() for fqn in fqns}
            size = sum(meta.num_bytes for meta in table.values())
            (target / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
        for path in sorted(origin.iterdir()):
            if path.is_file() and path.suffix not in _WEIGHTS and path.name not in (INDEX, "config.json"):
                shutil.copyfile(path, target / path.name)
        config = json.loads((origin / "config.json").read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = str(next(iter(table.values())).dtype).removeprefix("torch.")
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _broadcast(text: str | None, ranks: _Ranks) -> str | None:
    if ranks.size == 1:
        return text
    box = [text]
    dist.broadcast_object_list(box, src=0)
    return box[0]
